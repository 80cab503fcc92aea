"""Tell what a file is by the numbers its format puts in it, whatever it is called.

Formats: the kernel's Documentation/filesystems/ext4 ("Super Block") and squashfs.rst, its
Documentation/arch/x86/boot.rst ("The Real-Mode Kernel Header"), System V ABI ("ELF Header").
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Literal

from banger.errors import InvalidImage

RootFormat = Literal["ext4", "squashfs"]
KernelFormat = Literal["bzImage", "ELF"]

_HEAD_BYTES = 4096
_X86_64 = 62
_LONGEST_VERSION = 255
_EXT4_INCOMPATIBLE, _EXT4_NEEDS_RECOVERY = 1024 + 0x60, 0x4


def root_format(path: Path) -> RootFormat:
    """Tell the format of a root file system. Raises InvalidImage when it is none that guests mount."""
    head = _head(path)
    if head[:4] == b"hsqs":
        return "squashfs"
    if head[1080:1082] == b"\x53\xef":
        (features,) = struct.unpack_from("<I", head, _EXT4_INCOMPATIBLE)
        if features & _EXT4_NEEDS_RECOVERY:
            raise InvalidImage(
                f"The file system in {path.name!r} was not unmounted: its journal is not empty.",
                hint="`e2fsck -fy FILE` brings it in order.",
            )
        return "ext4"
    raise InvalidImage(
        f"{path.name!r} is neither an ext4 nor a squashfs file system.",
        hint="A root file system is needed, not a disk with partitions or another machine's format.",
    )


def kernel_format(path: Path) -> KernelFormat:
    """Tell the format of a kernel for x86-64. Raises InvalidImage when it is none."""
    head = _head(path)
    if head[:6] == b"\x7fELF\x02\x01" and struct.unpack_from("<H", head, 18) == (_X86_64,):
        return "ELF"
    if head[0x1FE:0x200] == b"\x55\xaa" and head[0x202:0x206] == b"HdrS":
        return "bzImage"
    raise InvalidImage(
        f"{path.name!r} is not a Linux kernel for x86-64.", hint="Give a bzImage or a vmlinux."
    )


def kernel_version(path: Path) -> str:
    """Read the version a bzImage tells (`6.1.0-18-cloud-amd64`); empty where there is none to read."""
    with path.open("rb") as file:
        header = file.read(0x210)
        if header[0x202:0x206] != b"HdrS":
            return ""
        file.seek(0x200 + struct.unpack_from("<H", header, 0x20E)[0])
        words = file.read(_LONGEST_VERSION).partition(b"\0")[0].split()
    return words[0].decode("ascii", "replace") if words else ""


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES).ljust(_HEAD_BYTES, b"\0")
