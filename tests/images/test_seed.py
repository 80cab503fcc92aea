"""What an image has in /root is taken from its base file: all of it, by nobody who could do harm."""

from __future__ import annotations

import io
import socket
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from banger import proc
from banger.errors import Cancelled, InvalidImage
from banger.images import seed
from banger.images.layers import sandbox
from banger.images.layers.flatten import Limits
from banger.images.magic import RootFormat
from banger.storage import archive, ext4
from tests.images import tiny

FORMATS: tuple[RootFormat, ...] = ("squashfs", "ext4")
each_format = pytest.mark.parametrize("form", FORMATS)


def odd() -> bytes:
    """An image with everything in /root that an archive can tell of, one file linked with the outside."""
    able = {"SCHILY.xattr.user.a": "\n=\0b", "SCHILY.xattr.security.capability": "\1\0\0\2" + "\0" * 16}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **more: object) -> None:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(content)
            for key, value in more.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(content))

        add("bin", tarfile.DIRTYPE, mode=0o755)
        add("bin/tool", content=b"outside", mode=0o755)
        add("root", tarfile.DIRTYPE, mode=0o1777, uid=5, gid=6)
        add("root/a b", content=b"hello", mode=0o6755, uid=4294967294, gid=70000, mtime=7, pax_headers=able)
        add("root/again", tarfile.LNKTYPE, linkname="root/a b")
        add("root/tool", tarfile.LNKTYPE, linkname="bin/tool")
        add("root/link", tarfile.SYMTYPE, linkname="/../\n\udcff")
        add("root/long link", tarfile.SYMTYPE, linkname="l" * 200)
        add('root/a\nb\udcff"', content=b"odd")
        add("root/pipe", tarfile.FIFOTYPE, mode=0o640, uid=8)
        add("root/null", tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3)
        add("root/drop box", tarfile.DIRTYPE, mode=0o1733, uid=100000, gid=100000)
        add("root/drop box/" + "n" * 255, content=b"w" * 300_000, mode=0)
        add("root/empty")
    return out.getvalue()


def base(where: Path, content: bytes, form: RootFormat) -> Path:
    """Make a base file of an archive."""
    path = where / f"base.{form}"
    if form == "squashfs":
        path.write_bytes(tiny.squashfs(content))
    else:
        (where / "root.tar").write_bytes(content)
        ext4.make_from_tar(path, where / "root.tar", label="test")
    return path


def taken(where: Path, found: Path, form: RootFormat, **more: object) -> dict[bytes, tuple[object, ...]]:
    """Take a seed; give what it has, hard links as what they link to."""
    seed.take(found, form, where / seed.FILE, **more)  # type: ignore[arg-type]
    return told(where / seed.FILE)


def told(tar: Path) -> dict[bytes, tuple[object, ...]]:
    told: dict[bytes, tuple[object, ...]] = {}
    with tar.open("rb") as file:
        for entry in archive.entries(tar):
            if not entry.path:
                continue
            if entry.same_as is not None:
                told[entry.path] = told[entry.same_as]
                continue
            file.seek(entry.offset)
            mode = entry.mode if entry.link is None else stat.S_IFLNK
            owner, xattrs = (entry.uid, entry.gid, entry.mtime_s), tuple(sorted(entry.xattrs.items()))
            content = file.read(entry.size)
            told[entry.path] = (mode, *owner, entry.link, entry.device, content, xattrs)
    return told


def left(where: Path) -> set[str]:
    return {path.name for path in where.iterdir()}


@each_format
def test_a_seed_has_all_that_root_has(tmp_path: Path, form: RootFormat) -> None:
    """Owner, mode, time, link, device, attributes, content of each entry are the archive's; no more is."""
    found = taken(tmp_path, base(tmp_path, odd(), form), form)
    (tmp_path / "odd.tar").write_bytes(odd())
    whole = told(tmp_path / "odd.tar")
    assert found == {path: what for path, what in whole.items() if path.split(b"/")[0] == b"root"}
    assert len(found) == 12
    assert left(tmp_path) - {"root.tar", "odd.tar"} == {f"base.{form}", seed.FILE}


def test_the_seed_of_a_squashfs_of_ours_is_the_same(tmp_path: Path) -> None:
    """What was checked when the file was made is not checked again; no /root is an empty seed here, too."""
    found = base(tmp_path, odd(), "squashfs")
    wanted = taken(tmp_path, found, "squashfs")
    seed.take_of_ours(found, tmp_path / seed.FILE)
    assert told(tmp_path / seed.FILE) == wanted
    found.write_bytes(tiny.squashfs(bytes(10240)))
    seed.take_of_ours(found, tmp_path / seed.FILE)
    assert told(tmp_path / seed.FILE) == {}
    assert left(tmp_path) == {found.name, seed.FILE}


@each_format
@pytest.mark.parametrize("what", ["nothing", "a link", "a file", "an empty directory"])
def test_without_a_root_of_its_own_a_seed_is_empty(tmp_path: Path, form: RootFormat, what: str) -> None:
    """A link is not followed: what is there belongs to somebody else."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("home", "home/kept"):
            (member := tarfile.TarInfo(name)).type = tarfile.DIRTYPE
            tar.addfile(member)
        member = tarfile.TarInfo("root")
        member.type = {"a link": tarfile.SYMTYPE, "a file": tarfile.REGTYPE}.get(what, tarfile.DIRTYPE)
        member.linkname = "home" if what == "a link" else ""
        if what != "nothing":
            tar.addfile(member)
    found = taken(tmp_path, base(tmp_path, out.getvalue(), form), form)
    assert set(found) <= {b"root"}
    ext4.make_home(tmp_path / "disk", 64, seed=tmp_path / seed.FILE, below=seed.DIRECTORY)
    assert proc.run(["debugfs", "-R", "ls -p /", str(tmp_path / "disk")]).count("/") == 2 * 7


@each_format
@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(size=200_000), "MiB|large"),
        (Limits(entries=10), "entries"),
        (Limits(text=100), "names"),
    ],
)
def test_the_limits_of_images_hold(tmp_path: Path, form: RootFormat, limits: Limits, reason: str) -> None:
    """What is in /root may not come to more than a layer may, and nothing of it stays then."""
    found = base(tmp_path, odd(), form)
    before = left(tmp_path)
    with pytest.raises(InvalidImage, match=reason) as refused:
        taken(tmp_path, found, form, limits=limits)
    assert "/root" in refused.value.message
    assert left(tmp_path) == before


def damage(path: Path, *requests: str) -> None:
    for request in requests:
        subprocess.run(["debugfs", "-w", "-R", request, str(path)], check=True, capture_output=True)


LOOP: tuple[str, ...] = ("mkdir /root/a", "link /root /root/a/up")
HOSTILE: dict[str, tuple[tuple[str, ...], str]] = {
    "a directory in itself": (LOOP, "in itself"),
    "an inode that is not there": (("mkdir /root/a", "clri /root/a"), "no type"),
    "a size of terabytes": (("set_inode_field /root/.profile size 0x7fffffffffff",), "MiB"),
    "a directory whose blocks are elsewhere": (
        ("set_inode_field /root block[5] 77777777",),
        "could not be used",
    ),
    "a link longer than a path": (
        ("symlink /root/l x", "set_inode_field /root/l size 60000"),
        "link|target|ends",
    ),
    "an inode of no type": (("set_inode_field /root/.profile mode 0",), "no type"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_damaged_ext4_is_refused(tmp_path: Path, what: str) -> None:
    """What its maker did to the file system ends in a sentence, in no time and with nothing left."""
    requests, reason = HOSTILE[what]
    found = base(tmp_path, tiny.home(), "ext4")
    damage(found, *requests)
    before = left(tmp_path)
    with pytest.raises(InvalidImage, match=reason):
        seed.take(found, "ext4", tmp_path / seed.FILE, limits=Limits(timeout_s=20))
    assert left(tmp_path) == before


def test_a_name_with_a_slash_is_refused(tmp_path: Path) -> None:
    """A directory entry may hold any byte; a name that is a path is none."""
    found = base(tmp_path, tiny.home((tarfile.TarInfo("root/evil+name+here"), b"")), "ext4")
    content = found.read_bytes().replace(b"evil+name+here", b"../../tmp/evil")
    found.write_bytes(content)
    damage(found, "feature -metadata_csum")
    with pytest.raises(InvalidImage, match=r"no name|checksum"):
        seed.take(found, "ext4", tmp_path / seed.FILE)


@pytest.mark.parametrize("cut", [0, 96, 200, -4096])
def test_a_squashfs_that_is_cut_off_is_refused(tmp_path: Path, cut: int) -> None:
    """At its beginning, in its superblock, in its content: each is an error, never an empty seed."""
    whole = tiny.squashfs(odd())
    (found := tmp_path / "base").write_bytes(whole[:cut])
    with pytest.raises(InvalidImage, match="cannot be read"):
        seed.take(found, "squashfs", tmp_path / seed.FILE)
    assert left(tmp_path) == {"base"}


def test_a_socket_is_left_out(tmp_path: Path) -> None:
    """It is of a program that runs no more; archives cannot hold one."""
    (tree := tmp_path / "tree" / "root").mkdir(parents=True)
    (tree / "file").write_text("x")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tree / "agent"))
    proc.run(["mkfs.ext4", "-q", "-d", str(tree.parent), str(tmp_path / "e"), "16M"])
    proc.run(["mksquashfs", str(tree.parent), str(tmp_path / "s"), "-quiet", "-no-progress"])
    for path, form in zip((tmp_path / "s", tmp_path / "e"), FORMATS, strict=True):
        assert set(taken(tmp_path, path, form)) == {b"root", b"root/file"}


@each_format
def test_it_can_be_cancelled(tmp_path: Path, form: RootFormat) -> None:
    """Whoever waits for it may leave; nothing stays."""
    found = base(tmp_path, odd(), form)
    before = left(tmp_path)
    with pytest.raises(Cancelled):
        seed.take(found, form, tmp_path / seed.FILE, cancelled=lambda: True)
    assert left(tmp_path) == before


@pytest.mark.skipif(not sandbox.landlock_version(), reason="The kernel has no Landlock.")
def test_what_reads_squashfs_can_read_nothing_else(tmp_path: Path) -> None:
    """A program that runs under its restrictions sees the one file, neither its neighbours nor the host's."""
    (tmp_path / "base").write_text("base")
    (tmp_path / "secret").write_text("secret")
    program = (
        "import os, sys; from banger.images.layers import sandbox\n"
        "sandbox.confine(read=[sys.argv[1]], run=['/usr', '/lib', '/lib64'])\n"
        "os.execv('/bin/cat', ['cat', *sys.argv[1:]])\n"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "base"), str(tmp_path / "secret"), "/etc/passwd"]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr.count("denied")) == ("base", 2), ran.stderr
