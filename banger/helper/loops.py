"""Loop devices, through the kernel's own calls (linux/loop.h).

A file is attached by its descriptor: whoever renames or replaces it meanwhile changes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from banger.helper.disks import MAX_MARK, Backing, Loop

CONTROL = "/dev/loop-control"
BLOCK_DEVICES = Path("/sys/block")
MAJOR = 7
"""Of every loop device (the kernel's admin-guide/devices.txt)."""

_CONFIGURE, _CLEAR, _GET_STATUS, _GET_FREE = 0x4C0A, 0x4C01, 0x4C05, 0x4C82
_READ_ONLY, _AUTOCLEAR = 0x1, 0x4

# struct loop_info64: device, inode, rdevice, offset, sizelimit, number, encrypt_type, encrypt_key_size,
# flags, file_name, crypt_name, encrypt_key, init.
_INFO = struct.Struct("=QQQQQIIII64s64s32sQQ")
_CONFIG = struct.Struct(f"=II{_INFO.size}s64x")  # struct loop_config: fd, block_size, info, reserved
_TRIES = 64


class KernelLoops:
    """The kernel's loop devices; a `Loops`."""

    def attach(self, fd: int, mark: str, read_only: bool) -> int:
        """Attach a free loop device to the file that `fd` is open on; give its number."""
        text = mark.encode("ascii")
        if len(text) > MAX_MARK:
            raise ValueError(f"a mark of {len(text)} bytes")
        info = _INFO.pack(*[0] * 8, _READ_ONLY if read_only else 0, text, b"", b"", 0, 0)
        config = _CONFIG.pack(fd, 0, info)
        for _ in range(_TRIES):
            number = _free()
            with _opened(number, os.O_RDONLY if read_only else os.O_RDWR) as device:
                try:
                    fcntl.ioctl(device, _CONFIGURE, config)
                except OSError as error:
                    if error.errno != errno.EBUSY:  # another program was given the same free one
                        raise
                else:
                    return number
        raise OSError(errno.EBUSY, "No loop device stays free.")

    def loops(self) -> list[Loop]:
        """List those that are attached, whoever did it."""
        names = (re.fullmatch(r"loop([0-9]+)", path.name, re.ASCII) for path in BLOCK_DEVICES.iterdir())
        numbers = sorted(int(name[1]) for name in names if name)
        return [loop for loop in map(_look, numbers) if loop is not None]

    def detach(self, loop: Loop) -> None:
        """Detach it, unless it is on another file or has another mark by now."""
        # While it is held open nobody can attach it to another file: what is looked at is what goes.
        with contextlib.suppress(FileNotFoundError), _opened(loop.number, os.O_RDONLY) as device:
            found = _status(loop.number, device)
            if found is not None and (found.backing, found.mark) == (loop.backing, loop.mark):
                with _gone_is_fine():
                    fcntl.ioctl(device, _CLEAR)


def _free() -> int:
    control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(control, _GET_FREE)
    finally:
        os.close(control)


@contextlib.contextmanager
def _opened(number: int, flags: int) -> Iterator[int]:
    device = os.open(f"/dev/loop{number}", flags | os.O_CLOEXEC)
    try:
        yield device
    finally:
        os.close(device)


def _look(number: int) -> Loop | None:
    if not (BLOCK_DEVICES / f"loop{number}" / "loop").is_dir():  # there while it is attached
        return None
    with contextlib.suppress(FileNotFoundError), _opened(number, os.O_RDONLY) as device:
        return _status(number, device)
    return None


def _status(number: int, device: int) -> Loop | None:
    with _gone_is_fine():
        fields = _INFO.unpack(fcntl.ioctl(device, _GET_STATUS, bytes(_INFO.size)))
        flags, text = fields[8], fields[9]
        return Loop(
            number=number,
            backing=Backing(_decoded(fields[0]), fields[1]),
            mark=text.split(b"\0", 1)[0].decode("utf-8", "replace"),
            read_only=bool(flags & _READ_ONLY),
            leaving=bool(flags & _AUTOCLEAR),
        )
    return None


def _decoded(device: int) -> int:
    """Give the st_dev of what the kernel calls by its own number (kdev_t.h, new_decode_dev)."""
    return os.makedev(device >> 8 & 0xFFF, device & 0xFF | device >> 12 & 0xFFF00)


@contextlib.contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENXIO:  # not attached, loop(4)
            raise
