"""Images and kernels from the user's own files: kept where they are, or copied; never changed."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from banger import proc
from banger.errors import Cancelled, DiskFull, InvalidImage, InvalidRequest
from banger.images import base, custom, local, store
from banger.model import Artifact
from banger.storage import ext4

BZIMAGE = bytearray(8192)
BZIMAGE[0x1FE:0x206] = b"\x55\xaa\x00\x00HdrS"
BZIMAGE[0x20E:0x210] = struct.pack("<H", 0x400)
BZIMAGE[0x600:0x618] = b"6.1.0-test (me) #1 SMP\0 "
ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, 62) + bytes(100)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root file system of the user's own: ext4, with something in it, mostly holes."""
    (tree := tmp_path / "tree").mkdir()
    (tree / "hello").write_bytes(os.urandom(50_000))
    path = tmp_path / "my own.ext4"
    proc.run(["mkfs.ext4", "-q", "-F", "-d", str(tree), str(path), "64M"])
    return path


def registered(tmp_path: Path, root: Path) -> Artifact:
    return local.register(root, "mine", tmp_path / "cache")


def everything(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.name[-5:] != ".lock")


def test_a_registered_image_stays_where_it_is(tmp_path: Path, root: Path) -> None:
    """The cache has a link to the user's file, which is not copied, moved or changed."""
    before = (root.stat(), root.read_bytes())
    image = registered(tmp_path, root)
    assert base.path_of(image).resolve() == root
    assert image.size_bytes < 64 << 10
    assert image.details["file_sha256"] == hashlib.sha256(before[1]).hexdigest()
    assert (root.stat(), root.read_bytes()) == before
    assert store.find(tmp_path / "cache", "image", image.digest) == image
    local.check(image)


def test_squashfs_is_told_by_its_content(tmp_path: Path) -> None:
    """The file's name says nothing: its first bytes do."""
    (tmp_path / "tree").mkdir()
    proc.run(["mksquashfs", str(tmp_path / "tree"), str(tmp_path / "root.ext4"), "-quiet", "-no-progress"])
    assert registered(tmp_path, tmp_path / "root.ext4").details["format"] == "squashfs"


def test_a_file_that_changed_or_went_is_told(tmp_path: Path, root: Path) -> None:
    """Another size, another time and no file at all are each an error that names the file."""
    image = registered(tmp_path, root)
    size, when = root.stat().st_size, root.stat().st_mtime_ns
    os.truncate(root, size + 4096)
    os.utime(root, ns=(when, when))
    with pytest.raises(InvalidImage, match=r"my own\.ext4.*changed"):
        local.check(image)
    os.truncate(root, size)
    os.utime(root, ns=(when, when))
    local.check(image)
    os.utime(root, ns=(when, when + 1_000_000))
    with pytest.raises(InvalidImage, match="changed"):
        local.check(image)
    root.unlink()
    with pytest.raises(InvalidImage, match=r"my own\.ext4.*is gone"):
        local.check(image)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, root: Path) -> None:
    """What was hashed must be what is there after."""

    def touch() -> bool:
        os.utime(root, ns=(2, 2000))
        return False

    with pytest.raises(InvalidImage, match="while it was read"):
        local.register(root, "mine", tmp_path / "cache", cancelled=touch)
    assert not (tmp_path / "cache").exists()


def test_what_changed_can_be_registered_again(tmp_path: Path, root: Path) -> None:
    """The same file with a new time is another artifact, which is sound."""
    old = registered(tmp_path, root)
    os.utime(root, ns=(1, 1))
    image = registered(tmp_path, root)
    assert image.digest != old.digest
    local.check(image)


def test_an_artifact_whose_file_went_is_still_found_and_deleted(tmp_path: Path, root: Path) -> None:
    """A link that leads nowhere hinders neither list nor delete; delete does not follow one either."""
    image = registered(tmp_path, root)
    root.rename(aside := tmp_path / "aside")
    assert store.find(tmp_path / "cache", "image", image.digest) == image
    aside.rename(root)
    store.delete(tmp_path / "cache", "image", image.digest)
    assert root.stat().st_size == 64 << 20


def test_a_promoted_image_is_a_copy_with_the_same_holes(tmp_path: Path, root: Path) -> None:
    """The copy needs the user's file no more, takes no more room than that, and has each of its bytes."""
    before, blocks = root.read_bytes(), root.stat().st_blocks
    image = local.promote(registered(tmp_path, root), tmp_path / "cache")
    root.unlink()
    copy = base.path_of(image)
    assert not copy.is_symlink()
    assert copy.read_bytes() == before
    assert copy.stat().st_blocks <= blocks + 64
    assert ext4.check(copy) is False
    local.check(image)
    with pytest.raises(InvalidRequest, match="its own copy already"):
        local.promote(image, tmp_path / "cache")


def test_a_file_that_changed_is_not_promoted(tmp_path: Path, root: Path) -> None:
    """Neither one that says so nor one that hides it: the copy's digest is compared."""
    image = registered(tmp_path, root)
    at = root.stat()
    with root.open("r+b") as file:
        file.seek(2048)
        file.write(b"changed")
    os.utime(root, ns=(at.st_atime_ns, at.st_mtime_ns))
    local.check(image)
    with pytest.raises(InvalidImage, match="changed"):
        local.promote(image, tmp_path / "cache")
    assert everything(tmp_path / "cache") == [
        "images",
        f"images/{image.digest}",
        f"images/{image.digest}/base.img",
        f"images/{image.digest}/manifest.json",
        f"images/{image.digest}/seed.tar",
    ]


def test_a_file_that_went_is_not_promoted(tmp_path: Path, root: Path) -> None:
    """The error names the file that was registered, and nothing of a copy stays."""
    image = registered(tmp_path, root)
    before = everything(tmp_path / "cache")
    root.unlink()
    with pytest.raises(InvalidImage, match=r"my own\.ext4.*is gone"):
        local.promote(image, tmp_path / "cache")
    assert everything(tmp_path / "cache") == before


def test_a_promotion_can_be_cancelled(tmp_path: Path, root: Path) -> None:
    """The half of a copy does not stay."""
    image = registered(tmp_path, root)
    before = everything(tmp_path / "cache")
    said: list[str] = []
    with pytest.raises(Cancelled):
        local.promote(image, tmp_path / "cache", progress=said.append, cancelled=lambda: bool(said))
    assert everything(tmp_path / "cache") == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_stops_a_promotion(tmp_path: Path, root: Path) -> None:
    """It is told as such; half of the copy does not stay."""
    (tmp_path / "tree" / "large").write_bytes(os.urandom(8 << 20))
    proc.run(["mkfs.ext4", "-q", "-F", "-d", str(tmp_path / "tree"), str(root), "64M"])
    (small := tmp_path / "small").mkdir()
    proc.run(["mount", "-t", "tmpfs", "-o", "size=4M", "banger-test", str(small)])
    try:
        image = local.register(root, "mine", small)
        before = everything(small)
        with pytest.raises(DiskFull):
            local.promote(image, small)
        assert everything(small) == before
    finally:
        proc.run(["umount", str(small)])


@pytest.mark.parametrize("what", ["text", "directory", "fifo", "nothing", "device", "partitions"])
def test_what_is_no_root_file_system_is_refused(tmp_path: Path, what: str) -> None:
    """It is refused at once, by a sentence, and leaves nothing in the cache."""
    path = tmp_path / "root"
    make: dict[str, Callable[[], object]] = {
        "text": lambda: path.write_text("hsq"),
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "nothing": lambda: None,
        "device": lambda: path.symlink_to("/dev/zero"),
        "partitions": lambda: path.write_bytes(bytes(510) + b"\x55\xaa" + bytes(1 << 20)),
    }
    make[what]()
    with pytest.raises((InvalidRequest, InvalidImage)):
        registered(tmp_path, path)
    assert not (tmp_path / "cache").exists()


def test_an_unclean_file_system_is_refused(tmp_path: Path, root: Path) -> None:
    """One whose journal is not empty would be mounted without its last changes."""
    with root.open("r+b") as file:
        file.seek(1024 + 0x60)
        (features,) = struct.unpack("<I", file.read(4))
        file.seek(1024 + 0x60)
        file.write(struct.pack("<I", features | 4))
    with pytest.raises(InvalidImage, match="not unmounted"):
        registered(tmp_path, root)


@pytest.mark.parametrize(("content", "form"), [(bytes(BZIMAGE), "bzImage"), (ELF, "ELF")])
def test_a_kernel_with_its_initrd_is_taken_as_it_is(tmp_path: Path, content: bytes, form: str) -> None:
    """Both files are in the cache, byte by byte, and the user's own are no longer needed."""
    (kernel := tmp_path / "vmlinuz").write_bytes(content)
    (initrd := tmp_path / "initrd").write_bytes(b"any bytes at all")
    found = local.import_kernel(kernel, "mine", tmp_path / "cache", initrd=initrd)
    kernel.unlink()
    initrd.unlink()
    assert (found.path / custom.KERNEL).read_bytes() == content
    assert (found.path / custom.INITRD).read_bytes() == b"any bytes at all"
    assert found.details["format"] == form
    assert found.details["version"] == ("6.1.0-test" if form == "bzImage" else "")


@pytest.mark.parametrize("content", [b"", b"\x7fELF\x01\x01", bytes(8192), b"MZ" + bytes(600)])
def test_what_is_no_kernel_is_refused(tmp_path: Path, content: bytes) -> None:
    """An empty file, a 32-bit program and others are refused before anything is made."""
    (kernel := tmp_path / "vmlinuz").write_bytes(content)
    with pytest.raises(InvalidImage, match="not a Linux kernel"):
        local.import_kernel(kernel, "mine", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def module(depends: str = "", version: str = "6.1.0-test") -> bytes:
    """The section of a kernel module that says what it needs (modinfo)."""
    return b"\x7fELF\0license=GPL\0" + f"depends={depends}\0vermagic={version} SMP mod_unload \0".encode()


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"overlay.ko": module(version="5.0.0")}, "is for the kernel"),
        ({"overlay.ko": module("virtio_net"), "virtio_net.ko": module("overlay")}, "depend on"),
        ({"overlay.ko": module().replace(b"depends=", b"depends=\xff")}, "depend on"),
        ({"overlay.ko.xz": b"not xz"}, "is damaged"),
        ({"overlay.ko.zst": b"not zstd"}, "is damaged"),
        ({"overlay.ko.gz": b"not gzip"}, "is damaged"),
    ],
)
def test_modules_that_cannot_be_right_are_refused(
    tmp_path: Path, files: dict[str, bytes], reason: str
) -> None:
    """Another kernel's modules, a circle of dependencies and damaged files are each told."""
    (kernel := tmp_path / "vmlinuz").write_bytes(bytes(BZIMAGE))
    (directory := tmp_path / "modules" / "kernel").mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    with pytest.raises(InvalidImage, match=reason):
        local.import_kernel(kernel, "mine", tmp_path / "cache", modules=tmp_path / "modules")
    assert everything(tmp_path / "cache") == ["kernels"]
