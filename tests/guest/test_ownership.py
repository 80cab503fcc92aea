"""What a guest sees of its image is what the archive says, entry by entry."""

from __future__ import annotations

import ast
import io
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from banger import config, proc
from banger.images import base, debian
from banger.storage import archive
from tests.guest import roots
from tests.guest.conftest import NAME, Boot

pytestmark = pytest.mark.guest

MOUNTED = (b"dev", b"proc", b"root", b"run", b"sys", b"tmp")
"""Where the boot mounts: what the image has there is below a mount, and the place is the mount's root."""

WRITTEN = (b"etc/hostname", b"etc/hosts", b"etc/resolv.conf")
"""What the boot writes into an image like Debian's; everything else is as it was."""

FIND = "find / -xdev -printf '%P\\0%y\\0%m\\0%U\\0%G\\0%s\\0%l\\0'"
OTHERS = """
import os, stat
found = {}
for top, directories, files in os.walk(b"/", followlinks=False):
    directories[:] = [d for d in directories if not os.path.ismount(os.path.join(top, d))]
    for path in [os.path.join(top, name) for name in directories + files] + ([top] if top == b"/" else []):
        status = os.lstat(path)
        device = status.st_rdev if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode) else 0
        values = {os.fsencode(n): os.getxattr(path, n, follow_symlinks=False)
                  for n in os.listxattr(path, follow_symlinks=False)}
        if device or values:
            found[path[1:]] = (os.major(device), os.minor(device)), values
print(ascii(found))
"""
"""Devices' numbers and extended attributes, which find does not print."""

Seen = tuple[bytes, int, int, int, int | None, bytes, tuple[int, int], dict[bytes, bytes]]
"""Type as find has it, permissions, uid, gid, size (not of directories), link target, device, attributes."""

TYPES = {"f": stat.S_IFREG, "d": stat.S_IFDIR, "l": stat.S_IFLNK, "p": stat.S_IFIFO, "c": stat.S_IFCHR,
         "b": stat.S_IFBLK}  # fmt: skip
LETTERS = {number: letter.encode() for letter, number in TYPES.items()}


NAMES = ("a\nb", "\x1b]0;x", "\"'`$()%s\\", "-rf", "\udcff\udcfe", "\u202e", "x" * 255)
CAPABILITY = "\x01\0\0\x02\0\x04" + "\0" * 14
"""CAP_NET_BIND_SERVICE, permitted (capabilities(7); struct vfs_cap_data, version 2)."""


def odd_members() -> list[tarfile.TarInfo]:
    """Give members with everything that an ordinary user could not unpack, under names no shell likes."""

    def one(name: str, mode: int, kind: bytes = tarfile.REGTYPE, **more: object) -> tarfile.TarInfo:
        member = tarfile.TarInfo(f"srv/{name}")
        member.mode, member.type = mode, kind
        for key, value in more.items():
            setattr(member, key, value)
        return member

    able = {f"{archive.XATTR}security.capability": CAPABILITY, f"{archive.XATTR}user.a": "\n="}
    return [
        one("set both", 0o6755, uid=65534, gid=4294967294),
        one("able", 0o755, uid=7, pax_headers=able),
        one("again", 0o755, tarfile.LNKTYPE, linkname="srv/able", uid=7),
        one("disk", 0o660, tarfile.BLKTYPE, gid=6, devmajor=259, devminor=70000),
        one("pipe", 0o640, tarfile.FIFOTYPE, uid=8, gid=9),
        one("drop box", 0o1733, tarfile.DIRTYPE, uid=100000, gid=100000),
        one("drop box/nothing", 0, mtime=-1),
        one("link", 0o777, tarfile.SYMTYPE, linkname="/../\n\udcff", uid=11),
        *(one(name, 0o644) for name in NAMES),
    ]


def archive_of(image: Path, out: Path) -> Path:
    """Turn the default image into an archive again, and add the odd members."""
    proc.run(["sh", "-c", 'exec sqfs2tar "$0" > "$1"', str(image), str(out)])
    with tarfile.open(out, "a", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
        for member in odd_members():
            tar.addfile(member, io.BytesIO())
    return out


def expected(tar: Path) -> dict[bytes, Seen]:
    """Give what a guest has to see, from the archive."""
    found: dict[bytes, Seen] = {}
    for entry in archive.entries(tar):
        if entry.same_as is not None:
            found[entry.path] = found[entry.same_as]
            continue
        link = entry.link or b""
        size = None if stat.S_ISDIR(entry.mode) else len(link) or entry.size
        kind = LETTERS[stat.S_IFMT(entry.mode)]
        permissions = stat.S_IMODE(entry.mode)
        found[entry.path] = (
            kind, permissions, entry.uid, entry.gid, size, link, entry.device, entry.xattrs
        )  # fmt: skip
    return found


def seen(run: Callable[[str], bytes]) -> dict[bytes, Seen]:
    """List a guest's root by scripts that `run` runs in it: find for what it knows, Python for the rest."""
    words = run(FIND).split(b"\0")[:-1]
    others = ast.literal_eval(run(f"python3 - << 'END'\n{OTHERS}\nEND").decode())
    found: dict[bytes, Seen] = {}
    for path, kind, mode, uid, gid, size, link in zip(*[iter(words)] * 7, strict=True):
        device, values = others.get(path, ((0, 0), {}))
        length = None if kind == b"d" else int(size)
        found[path] = (kind, int(mode, 8), int(uid), int(gid), length, link, device, values)
    return found


def differing(
    wanted: dict[bytes, Seen], found: dict[bytes, Seen]
) -> dict[bytes, tuple[Seen | None, Seen | None]]:
    """Give what a guest does not see as it should, but for what the boot mounts or writes."""
    wanted = {b"": (b"d", 0o755, 0, 0, None, b"", (0, 0), {}), **wanted}
    return {
        path: (wanted.get(path), found.get(path))
        for path in wanted.keys() | found.keys()
        if wanted.get(path) != found.get(path) and not ours(path)
    }


def ours(path: bytes) -> bool:
    """Tell whether the boot mounts or writes this."""
    return path in WRITTEN or path.split(b"/")[0] in MOUNTED


@pytest.mark.parametrize("form", ["squashfs", "ext4"])
def test_a_guest_sees_what_the_archive_says(
    boot: Boot, dirs: config.Dirs, tmp_path: Path, form: base.Format
) -> None:
    """Owner, mode, size, link, device and attributes of every entry of a Debian are as in its archive."""
    default = base.path_of(debian.build(debian.RECIPES[NAME], dirs.cache))
    tar = archive_of(default, tmp_path / "root.tar")
    guest = boot(roots.publish(tar, tmp_path / "cache", form))
    wanted = expected(tar)
    assert len(wanted) > 8000
    assert differing(wanted, seen(guest.run_bytes)) == {}
