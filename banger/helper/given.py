"""What may come with a request as a descriptor: files that root can read without waiting for their owner."""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat

from banger.errors import Refused

# Below a FUSE file system a process of the owner's answers, which could hold up the one thread that does
# root's work; an overlay may lie on one. Magic numbers: statfs(2).
FILE_SYSTEMS = {
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0xF2F52010: "f2fs",
    0xCA451A4E: "bcachefs",
    0x2FC12FC1: "zfs",
    0x01021994: "tmpfs",
}
_libc = ctypes.CDLL(None, use_errno=True)


def check_place(fd: int) -> None:
    """Refuse what is on a file system that root does not rely on.

    It may be the owner's own process that answers this, or does not. So it is asked before all else, by
    whoever can wait.
    """
    if _file_system(fd) not in FILE_SYSTEMS:
        raise Refused("A file that came with the request is on a file system that root does not rely on.")


def check_file(fd: int, what: str) -> os.stat_result:
    """Give a file's attributes if it is regular, can be read, and is where root relies on; else refuse."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink == 0:
        raise Refused(f"The {what} is not a regular file that has a name.")
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:
        raise Refused(f"The {what} is not open to be read.")
    check_place(fd)
    return found


def is_read_only(fd: int) -> bool:
    """Tell whether a descriptor that can be read is open for nothing else (fcntl(2), F_GETFL)."""
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def appends(fd: int) -> bool:
    """Tell whether all that is written to a descriptor goes to the end of its file."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND)


def _file_system(fd: int) -> int:
    # struct statfs begins with f_type, a long, and is 120 bytes (asm-generic/statfs.h).
    answer = (ctypes.c_ulong * 64)()
    if _libc.fstatfs(ctypes.c_int(fd), answer) != 0:
        raise Refused("A file that came with the request cannot be looked at.")
    return answer[0] & 0xFFFFFFFF
