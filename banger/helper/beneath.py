"""Open what is below a held directory, and nothing else: openat2(2), which does it in one step.

To look at a path first and use it after is a race that its owner can win. Everything that follows
works on the descriptor given here.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat

from banger.errors import HostLacks, Refused

_OPENAT2 = 437  # on every architecture (syscall tables of Linux 5.6)
_NO_XDEV, _NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 0x01, 0x02, 0x04, 0x08  # openat2(2)
_RESOLVE = _NO_XDEV | _NO_MAGICLINKS | _NO_SYMLINKS | _BENEATH
_PATH_MAX = 4096  # with its NUL: limits.h

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_beneath(directory: int, relative: str, flags: int = os.O_PATH) -> int:
    """Open a file below a held directory without following any link or entering another file system.

    `flags` as of open(2); O_CLOEXEC and O_NOFOLLOW are added, O_CREAT is not for here.
    Raises Refused when the path is not plain, leads out, or is not there; HostLacks when the kernel
    has no openat2 (Linux 5.6): there is no second-best way.
    """
    words = os.fsencode(_plain(relative))
    how = _OpenHow(flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0, _RESOLVE)
    fd = _syscall(
        ctypes.c_long(_OPENAT2),
        ctypes.c_int(directory),
        ctypes.c_char_p(words),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    if fd < 0:
        raise _refusal(ctypes.get_errno(), relative)
    return int(fd)


def check_owned_file(fd: int, uid: int) -> os.stat_result:
    """Give what is behind a descriptor if it is a regular file of this user with one name; else refuse.

    A second name could be in a directory where another user put it (link(2) needs no right to read).
    """
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise Refused("A descriptor that came with the request is not a regular file.")
    if found.st_uid != uid:
        raise Refused("A file that came with the request is not yours.")
    if found.st_nlink != 1:
        raise Refused("A file that came with the request does not have exactly one name.")
    return found


def _plain(relative: str) -> str:
    """Give back a path of whole names only: no empty one, no `.`, no `..`."""
    try:
        size = len(relative.encode())
    except UnicodeEncodeError:
        raise Refused("The path is not UTF-8.") from None
    if size >= _PATH_MAX or "\0" in relative or {"", ".", ".."} & set(relative.split("/")):
        raise Refused("The path is not a plain one below the directory.")
    return relative


def _refusal(number: int, relative: str) -> Exception:
    if number == errno.ENOSYS:
        return HostLacks("The kernel has no openat2.", hint="Linux 5.6 or newer is needed.")
    return Refused(f"{relative!r} cannot be opened: {os.strerror(number)}.")
