"""Give up what a process does not need before it looks at what nobody vouches for: Linux' Landlock, limits.

Landlock (landlock(7)) restricts the calling thread and those it starts later. Where the kernel lacks it,
the limits are what remains.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import stat
import struct
from collections.abc import Iterable

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on all architectures
_VERSION = 1  # flag of landlock_create_ruleset: tell the ABI instead
_PATH_BENEATH = 1
_SET_NO_NEW_PRIVS = 38  # prctl(2)

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_READ = _READ_FILE | _READ_DIR
_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
"""How many rights to files each ABI that brought new ones knows; they are numbered from 0."""

_NET_FROM, _NET = 4, 0b11  # bind and connect TCP
_SCOPE_FROM, _SCOPE = 6, 0b11  # abstract sockets and signals

_libc = ctypes.CDLL(None, use_errno=True)


def landlock_version() -> int:
    """Tell which ABI of Landlock the kernel has; 0 for none."""
    return max(int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)), 0)


def confine(*, read: Iterable[str] = (), run: Iterable[str] = ()) -> bool:
    """Take every right to open files, make any, or reach the network, but to read below `read`.

    What is below `run` may also be executed, under the same restrictions. Descriptors that are open stay
    usable. False when the kernel has no Landlock.
    """
    version = landlock_version()
    if not version:
        return False
    ruleset = _create_ruleset(version)
    try:
        for path in read:
            _allow(ruleset, path, _READ)
        for path in run:
            _allow(ruleset, path, _READ | _EXECUTE)
        _check(_libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        _check(_libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    return True


def limit(*, file_bytes: int, memory_bytes: int, cpu_s: int) -> None:
    """Bound this process: the size of files, memory, processor time; no more descriptors, processes, cores.

    Never raises a limit. The number of processes binds nobody who is root.
    """
    for kind, wanted in (
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (value, value))


def _create_ruleset(version: int) -> int:
    rights = (1 << max(count for since, count in _RIGHTS.items() if since <= version)) - 1
    attributes = struct.pack(
        "QQQ",
        rights,
        _NET if version >= _NET_FROM else 0,
        _SCOPE if version >= _SCOPE_FROM else 0,
    )
    return _check(_libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0))


def _allow(ruleset: int, path: str, rights: int) -> None:
    """Allow rights to a file, or below a directory; one that cannot be reached needs none."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= ~_READ_DIR
        rule = struct.pack("=Qi", rights, fd)
        _check(_libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))
    finally:
        os.close(fd)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno() or errno.EPERM
        raise OSError(number, os.strerror(number))
    return result
