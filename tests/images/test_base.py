from __future__ import annotations

import io
import os
import stat
import sys
import tarfile
from pathlib import Path

import pytest

from banger import proc
from banger.errors import BangerError, Cancelled, InvalidRequest
from banger.images import base
from banger.model import Artifact
from banger.storage import archive, ext4_files
from banger.storage.archive import Entry

FORMATS: list[base.Format] = ["squashfs", "ext4"]
REG, DIR, SYM, LNK, FIFO, CHR, BLK = (
    tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE,
    tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
)  # fmt: skip
NAMES = [
    "a\nb", "c\rd", "\x1b]0;x", "\x07", '"', "'", "`", "$()", "%s", "-dash", "\\", "\udcff\udcfe", "\u202e",
    "x" * 255, " space ", "tab\t", "a=b", "#c", "<2>", ".wh",
]  # fmt: skip


class Maker:
    """Writes a tar archive entry by entry."""

    def __init__(self, path: Path):
        self.path = path
        self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT, errors="surrogateescape")  # noqa: SIM115

    def add(self, name: str, kind: bytes = REG, content: bytes = b"", **more: object) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.size, member.mtime = kind, len(content), 1
        for key, value in more.items():
            setattr(member, key, value)
        self._tar.addfile(member, io.BytesIO(content))

    def done(self) -> Path:
        self._tar.close()
        return self.path


def xattrs(**values: str) -> dict[str, str]:
    return {f"SCHILY.xattr.{name.replace('_', '.', 1)}": value for name, value in values.items()}


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """An archive with every type, odd owners, names, modes, attributes, hard links and a root of its own."""
    tar = Maker(tmp_path / "odd.tar")
    tar.add("./", DIR, mode=0o2711, uid=7, gid=8, pax_headers=xattrs(user_root="r"))
    tar.add("d", DIR, mode=0o1777, uid=4294967294, gid=4294967294, pax_headers=xattrs(user_dir="v"))
    able = xattrs(security_capability="\x01\0\0\x02\0\x04" + "\0" * 14, user_näm="q\0r\n=")
    tar.add("d/su", content=b"x" * 5000, mode=0o6755, uid=65534, gid=12345678, pax_headers=able)
    for number in range(40):
        tar.add(f"hard{number}", LNK, linkname="d/su", mode=0o6755)
    for name in NAMES:
        tar.add(f"d/{name}", content=name.encode("utf-8", "surrogateescape"), mode=0o600, uid=1)
        tar.add(f"d/l{name[:200]}", SYM, linkname=name, mode=0o777, uid=3)
    tar.add("large", content=bytes(3_000_000) + b"1")
    tar.add("hole", content=bytes(3_000_000))
    tar.add("pipe", FIFO, mode=0o640, uid=9, gid=9)
    tar.add("null", CHR, devmajor=1, devminor=3)
    tar.add("disk", BLK, gid=6, devmajor=259, devminor=70000)
    tar.add("link", SYM, mode=0o777, linkname="/" + "t" * 4094)
    tar.add("none", mode=0)
    tar.add("lost+found", SYM, mode=0o777, linkname="nowhere")
    for size in (3500, 4040, 4041, 60000):
        tar.add(f"attribute of {size}", pax_headers=xattrs(user_big="v" * size, user_small="w" * 40))
    tar.add("no/parent/named", content=b"x")
    tar.add("/".join(["deep"] * 300) + "/end", content=b"x")
    return tar.done()


def content_of(entry: Entry, tar: Path) -> bytes:
    with tar.open("rb") as file:
        file.seek(entry.offset)
        return file.read(entry.size)


def listing(tar: Path) -> dict[bytes, tuple[object, ...]]:
    """Give all that an archive says of each path, with content, and hard links as what they name."""
    found: dict[bytes, tuple[object, ...]] = {}
    for entry in archive.entries(tar):
        if entry.same_as is not None:
            found[entry.path] = found[entry.same_as]
        else:
            found[entry.path] = (
                entry.mode, entry.uid, entry.gid, entry.mtime_s, entry.link, entry.device,
                sorted(entry.xattrs.items()), content_of(entry, tar),
            )  # fmt: skip
    return found


def out_of_squashfs(image: Path, out: Path) -> dict[bytes, tuple[object, ...]]:
    proc.run(["sh", "-c", 'exec sqfs2tar --root-becomes . "$0" > "$1"', str(image), str(out)])
    return listing(out)


def test_squashfs_holds_what_the_archive_does(odd: Path, tmp_path: Path) -> None:
    """Every entry comes back with its owner, mode, time, target, device, attributes and content."""
    made = base.make(odd, tmp_path / "base.img", label="odd")
    assert (made.format, made.size_bytes) == ("squashfs", (tmp_path / "base.img").stat().st_blocks * 512)
    wanted, found = listing(odd), out_of_squashfs(tmp_path / "base.img", tmp_path / "back.tar")
    implied = {path for path in found if path not in wanted}
    assert {found[path][:3] for path in implied} == {(stat.S_IFDIR | 0o755, 0, 0)}
    assert {path: found.get(path) for path in wanted} == wanted


def test_ext4_holds_what_the_archive_does_and_is_sound(odd: Path, tmp_path: Path) -> None:
    """e2fsck finds nothing to say of it, and debugfs reads back owners, content and attributes.

    Links, devices and the names that debugfs cannot be told: tests/guest/test_ownership.py.
    """
    image = tmp_path / "base.img"
    base.make(odd, image, label="odd", format="ext4")
    proc.run(["e2fsck", "-f", "-n", str(image)])
    looked = 0
    for path, (mode, uid, gid, _, _, _, attributes, content) in listing(odd).items():
        name = "/" + path.decode("utf-8", "surrogateescape")
        try:
            found = ext4_files.status(image, name)
        except InvalidRequest:
            continue
        assert found is not None, path
        assert (found.mode, found.uid, found.gid) == (mode, uid, gid), path
        if stat.S_ISREG(found.mode):
            assert ext4_files.read(image, name) == content, path
        assert isinstance(attributes, list)
        for key, value in attributes:
            assert attribute(image, found.inode, key.decode(), tmp_path / "value") == value, path
        looked += 1
    assert looked > 80


def attribute(image: Path, inode: int, key: str, beside: Path) -> bytes:
    """Read an extended attribute with debugfs."""
    beside.unlink(missing_ok=True)
    proc.run(["debugfs", "-R", f"ea_get -f {beside} <{inode}> {key}", str(image)])
    return beside.read_bytes()


@pytest.mark.parametrize("form", FORMATS)
def test_a_directory_of_many_and_a_large_file_come_through(tmp_path: Path, form: base.Format) -> None:
    """A directory grows over many blocks, and a file over more than one group of them."""
    tar = Maker(tmp_path / "many.tar")
    for number in range(3000):
        tar.add(f"many/{number:0200}", uid=number)
    blob = bytes(range(256)) * 4096 * 160  # 160 MiB
    tar.add("large", content=blob)
    image = tmp_path / "base.img"
    base.make(tar.done(), image, label="many", format=form)
    if form == "ext4":
        proc.run(["e2fsck", "-f", "-n", str(image)])
        found = ext4_files.status(image, f"/many/{2999:0200}")
        assert found is not None
        assert found.uid == 2999
        assert ext4_files.read(image, "/large", most_bytes=len(blob)) == blob
    else:
        back = out_of_squashfs(image, tmp_path / "back.tar")
        wanted = listing(tar.path)
        assert {path: back.get(path) for path in wanted} == wanted
        assert back.keys() - wanted.keys() == {b"", b"many"}


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_is_left_of_what_could_not_be_made(tmp_path: Path, form: base.Format) -> None:
    """A cut archive, or a cancellation, leaves the archive alone in the directory."""
    tar = Maker(tmp_path / "a.tar")
    tar.add("f", content=bytes(range(256)) * 40000)
    whole = tar.done().read_bytes()
    target = tmp_path / "base.img"
    with pytest.raises(Cancelled):
        base.make(tar.path, target, label="x", format=form, cancelled=lambda: True)
    tar.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BangerError):
        base.make(tar.path, target, label="x", format=form)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


SMALL_DISK = """
import os, subprocess, sys
from pathlib import Path
from banger.errors import DiskFull
from banger.images import base
tar, place, form = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], check=True)
try:
    base.make(Path(tar), Path(place, "base.img"), label="x", format=form)
except DiskFull as full:
    print(full, os.listdir(place))
"""


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk_is_told_and_nothing_is_left_on_it(tmp_path: Path, form: base.Format) -> None:
    """No space is an error of its own kind, for either format (on a disk of 8 MiB, in a mount namespace)."""
    tar = Maker(tmp_path / "a.tar")
    for number in range(40):
        tar.add(f"noise {number}", content=os.urandom(1 << 20))
    (tmp_path / "small").mkdir()
    words = [sys.executable, "-c", SMALL_DISK, str(tar.done()), str(tmp_path / "small"), form]
    said = proc.run(["unshare", "--map-root-user", "--mount", *words])
    assert said.startswith("There is no space left on the disk")
    assert said.endswith(" []\n")


def test_access_control_lists_are_left_out_of_squashfs(tmp_path: Path) -> None:
    """Those that a local build may have (of the journal) cannot be held; all else is kept."""
    acl = "\x02\0\0\0" + "\x01\0\x07\0" + "\x7f" * 4
    tar = Maker(tmp_path / "a.tar")
    tar.add("journal", DIR, mode=0o2755, pax_headers=xattrs(system_posix_acl_default=acl, user_a="kept"))
    tar.add("journal/file", content=b"x", uid=5)
    base.make(tar.done(), tmp_path / "base.img", label="x")
    found = out_of_squashfs(tmp_path / "base.img", tmp_path / "back.tar")
    wanted = listing(tar.path)
    assert found[b"journal"][-2:] == ([(b"user.a", b"kept")], b"")
    assert found[b"journal/file"] == wanted[b"journal/file"]


def test_an_equal_archive_makes_an_equal_squashfs(odd: Path, tmp_path: Path) -> None:
    """Nothing of the moment or the machine gets into the base file."""
    for name in ("one", "two"):
        base.make(odd, tmp_path / name, label=name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_image_from_before_squashfs_is_found(tmp_path: Path) -> None:
    """VMs may stand on a file that was called otherwise."""
    image = Artifact(
        kind="image", name="x", digest="0" * 64, path=tmp_path, size_bytes=0, created_us=0, details={}
    )  # fmt: skip
    assert base.path_of(image) == tmp_path / "base.img"
    (tmp_path / "root.ext4").touch()
    assert base.path_of(image) == tmp_path / "root.ext4"
