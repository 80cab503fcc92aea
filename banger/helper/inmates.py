"""Which processes are in a jail: told by the kernel, never by a pid that somebody remembers.

A process is in a jail if its user is the one that the jail belongs to and its root directory is the
jail's. Until the jailer has given up root it is known by its standard output, which is a memory file
that root made and named (memfd_create(2)).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

from banger.helper import names
from banger.helper.jails import Inmate

MAX_STATUS = 16 * 1024
"""Bytes; the kernel's own text about a process is much shorter."""

_UIDS = re.compile(rb"\nUid:\t([0-9]+)\t([0-9]+)\t([0-9]+)\t([0-9]+)\n")  # proc_pid_status(5)
_NAMED = re.compile(r"/memfd:(.+) \(deleted\)", re.ASCII)  # how readlink(2) shows a memory file
_libc = ctypes.CDLL(None, use_errno=True)


def inmates(jail: str, root: int) -> list[Inmate]:
    """List what runs in a jail, whose root directory is open as `root`."""
    found = (_inmate(pid, jail, root) for pid in _pids())
    return [inmate for inmate in found if inmate]


def send(jail: str, root: int, inmate: Inmate, number: int) -> None:
    """Send a signal to an inmate, if it still is one.

    The descriptor holds on to one process, so that it does not matter if the pid is another's between
    the look and the signal: that other would not be who was looked at, or the descriptor not its own.
    """
    with _held(inmate) as pidfd:
        if pidfd is not None and _inmate(inmate.pid, jail, root) == inmate:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)


def ended(inmate: Inmate, timeout_s: float) -> bool:
    """Wait until it has ended (a zombie has), tell whether it has."""
    with _held(inmate) as pidfd:
        if pidfd is None or _identity(inmate.pid) != (inmate.start_ticks, inmate.boot_id):
            return True
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))


def live_uids(among: range) -> set[int]:
    """List which of these uids any process has now; a zombie does nothing with its own."""
    return {uid for pid in _pids() for uid in _uids(pid) if uid in among and _identity(pid)}


@contextlib.contextmanager
def seen_as(uid: int) -> Iterator[None]:
    """Look at /proc as a user: the kernel then shows what that user's processes show each other.

    As root without CAP_SYS_PTRACE one is shown less (ptrace(2), access mode checking). The kernel
    asks for all of the process's uids and gids, so this is a check of them as well. It changes this
    thread alone (setfsuid(2)), but for two things: the process dumps no core any more, and a signal
    that it had asked for at its parent's death is forgotten.
    """
    _libc.setfsgid(uid)
    _libc.setfsuid(uid)
    try:
        yield
    finally:
        _libc.setfsuid(0)
        _libc.setfsgid(0)


def _inmate(pid: int, jail: str, root: int) -> Inmate | None:
    uids = _uids(pid)
    match uids:
        case [0]:
            inside = _is_jailer(pid, jail)
        case [uid]:
            # The jailer gives the directory to the uid before it takes that on: look at it now, not before.
            inside = _in_root(pid, uid, os.fstat(root))
        case _:
            return None
    if inside:
        identity = _identity(pid)
        return identity and Inmate(pid=pid, start_ticks=identity[0], boot_id=identity[1], uid=uids[0])
    if uids == [0] and _uids(pid) != uids:  # it gave up root between two looks
        return _inmate(pid, jail, root)
    return None


def _is_jailer(pid: int, jail: str) -> bool:
    """Tell whether a process of root's writes to the console of this jail.

    Its owner can make a memory file of the same name, or has the console to read, and can start a program
    as root with that (sudo(8)): neither is root's own and open to be written.
    """
    console = Path(f"/proc/{pid}/fd/1")
    try:
        return (
            is_console(str(console.readlink()), jail)
            and console.stat().st_uid == 0
            and bool(console.lstat().st_mode & stat.S_IWUSR)  # how it is open: proc_pid_fd(5)
        )
    except OSError:
        return False


def is_console(link: str, jail: str) -> bool:
    """Tell whether /proc shows the console of this jail so: a memory file with the mark of its VM."""
    named = _NAMED.fullmatch(link)
    mark = names.read_mark(named[1]) if named else None
    return mark is not None and names.jail(mark.uid, mark.vm) == jail


def _in_root(pid: int, uid: int, root: os.stat_result) -> bool:
    """Tell whether a process is of the jail's own user and has its root there.

    One that does not let itself be looked at (PR_SET_DUMPABLE of prctl(2)) is taken to be there:
    nobody else has this uid, and it must not live on by hiding.
    """
    if uid != root.st_uid:
        return False
    try:
        with seen_as(uid):
            there = Path(f"/proc/{pid}/root").stat()
    except PermissionError:
        return True
    except OSError:
        return False  # it has ended, or is a zombie
    return (there.st_dev, there.st_ino) == (root.st_dev, root.st_ino)


def _pids() -> list[int]:
    return [
        int(path.name) for path in Path("/proc").iterdir() if path.name.isascii() and path.name.isdecimal()
    ]


def _uids(pid: int) -> list[int]:
    """Give a process's uids: one when real, effective, saved and file system's are the same."""
    found = _UIDS.search(_text(pid, "status"))
    return sorted({int(uid) for uid in found.groups()}) if found else []


def _identity(pid: int) -> tuple[int, str] | None:
    """Give a live process's start time in clock ticks and the boot; None for a zombie or none at all."""
    # The command's name is in parentheses and may hold spaces and parentheses itself.
    fields = _text(pid, "stat").rpartition(b")")[2].split()
    return (int(fields[19]), boot_id()) if fields and fields[0] not in b"ZX" else None


def boot_id() -> str:
    """Name this boot of the host, as `banger.proc.boot_id` does."""
    fd = os.open("/proc/sys/kernel/random/boot_id", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 8).decode("ascii")
    finally:
        os.close(fd)


def _text(pid: int, name: str) -> bytes:
    try:
        fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, MAX_STATUS)
    except ProcessLookupError:
        return b""
    finally:
        os.close(fd)


@contextlib.contextmanager
def _held(inmate: Inmate) -> Iterator[int | None]:
    """Hold on to whatever has this pid now; None when nothing has."""
    try:
        pidfd = os.pidfd_open(inmate.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield pidfd
    finally:
        os.close(pidfd)
