"""A bzImage becomes the ELF file that was packed into it."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from banger import config
from banger.errors import InvalidImage
from banger.images import kernel as kernels
from banger.images import vmlinux
from banger.network import user
from banger.vmm import tsc
from banger.vmm.accelerator import Accelerator
from banger.vmm.driver import Machine
from banger.vmm.qemu import Qemu

ELF = b"\x7fELF\x02\x01\x01".ljust(18, b"\0") + b"\x3e\0" + b"kernel " * 9000
OFFSET = 100
SETUP_SECTORS = 7


def lz4(content: bytes) -> bytes:
    """Pack as LZ4 does: literals, copies that overlap, and lengths of more than 15."""
    head, period = content[:27], 7
    rest = len(content) - len(head)
    literals = bytes([0xF0 | 15, len(head) - 15]) + head
    copy = struct.pack("<H", period) + b"\xff" * ((rest - 10 - 19) // 255) + bytes([(rest - 10 - 19) % 255])
    block = literals + copy + bytes([0xA0]) + content[-10:]
    return b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block


def bzimage(stream: bytes, size: int = len(ELF), protocol: int = 0x20F) -> bytes:
    """Make a kernel file around a packed kernel."""
    setup = bytearray((SETUP_SECTORS + 1) * 512)
    setup[0x1F1] = SETUP_SECTORS
    setup[0x1FE:0x206] = b"\x55\xaa\xeb\x66HdrS"
    struct.pack_into("<H", setup, 0x206, protocol)
    struct.pack_into("<II", setup, 0x248, OFFSET, len(stream) + 4)
    return bytes(setup) + b"u" * OFFSET + stream + struct.pack("<I", size) + b"behind"


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda content: lzma.compress(content, lzma.FORMAT_ALONE),
    "zstd": zstandard.ZstdCompressor().compress,
    "lz4": lz4,
}


@pytest.mark.parametrize("packer", PACKERS)
def test_each_compression_is_undone(tmp_path: Path, packer: str) -> None:
    """What Linux may be packed with is unpacked to what was packed, once, beside the kernel."""
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(bzimage(PACKERS[packer](ELF)))
    found = vmlinux.elf(kernel)
    assert found.read_bytes() == ELF
    before = found.stat().st_ino
    assert vmlinux.elf(kernel).stat().st_ino == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vmlinuz", "vmlinuz.elf"]


def test_an_elf_file_is_taken_as_it_is(tmp_path: Path) -> None:
    """Nothing is written where nothing is packed."""
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(ELF)
    assert vmlinux.elf(kernel) == kernel
    assert list(tmp_path.iterdir()) == [kernel]


@pytest.mark.parametrize("packer", PACKERS)
def test_a_kernel_that_is_damaged_is_refused(tmp_path: Path, packer: str) -> None:
    """Cut off, told to be longer than it is, or broken inside, it leaves nothing behind."""
    stream = PACKERS[packer](ELF)
    broken = bytearray(stream)
    broken[len(stream) // 2 :] = b"\xff" * (len(stream) - len(stream) // 2)
    for content in (
        bzimage(stream[: len(stream) // 2]),
        bzimage(stream, len(ELF) + 1),
        bzimage(bytes(broken)),
        bzimage(stream, 0xFFFFFFFF),
        bzimage(stream)[:-100],
        bzimage(stream, protocol=0x207),
    ):
        kernel = tmp_path / "vmlinuz"
        kernel.write_bytes(content)
        with pytest.raises(InvalidImage):
            vmlinux.elf(kernel)
        assert list(tmp_path.iterdir()) == [kernel]


@pytest.mark.parametrize(
    "stream", [b"", b"PK\x03\x04" + bytes(100), gzip.compress(b"text" * 100), lz4(b"x" * 80)[:9]]
)
def test_what_is_packed_is_a_kernel(tmp_path: Path, stream: bytes) -> None:
    """An unknown compression, or something else than a kernel inside, is refused."""
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(bzimage(stream, 400))
    with pytest.raises(InvalidImage):
        vmlinux.elf(kernel)


def test_a_small_file_does_not_fill_the_memory(tmp_path: Path) -> None:
    """A stream that would give more than the kernel says that it has is stopped there."""
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(bzimage(gzip.compress(ELF + bytes(50 << 20))))
    assert len(vmlinux.elf(kernel).read_bytes()) == len(ELF)


@pytest.mark.guest
def test_the_distributions_kernel_boots_unpacked(dirs: config.Dirs, tmp_path: Path) -> None:
    """The ELF file out of Debian's kernel boots to our initrd, whose first words are on the console."""
    vmlinuz, archive = kernels.kernel_paths(kernels.build(kernels.RECIPES["debian-12"], dirs.cache))
    shutil.copyfile(vmlinuz, tmp_path / "vmlinuz")
    paths = dirs.vm("vm-elf")
    paths.directory.mkdir()
    machine = Machine(
        vm="vm-elf",
        op="op-1",
        name="elf",
        vcpu=1,
        memory_mib=256,
        kernel=vmlinux.elf(tmp_path / "vmlinuz"),
        initrd=archive,
        words=("console=ttyS0", "quiet", "panic=-1"),
        disks=(),
        ssh_port=user.pick_port(()),
        mac="02:00:00:00:00:01",
        nat=False,
        paths=paths,
    )
    vmm = Qemu(Accelerator(name="tcg", why="a test", tsc_khz=tsc.host_khz()))
    try:
        process = vmm.launch(machine)
        assert vmm.wait_gone(process, 60)
        assert "banger: cannot mount the image" in paths.console.read_text()
    finally:
        vmm.destroy("vm-elf", paths)
