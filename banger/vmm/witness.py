"""A lock that tells, without a race, whether any process of a VM exists.

Between fork and exec a child carries the environment of its parent, so a VMM whose launcher is
killed at that moment cannot be found by its mark, and appears a few milliseconds after the sweep
that looked for it. Therefore the launcher takes flock on the VM's directory and hands the
descriptor down: the kernel keeps the lock (flock(2): it belongs to the open file description)
until the last process that inherited it has gone, through fork, exec and kill -9. Who gets the
lock knows that nobody is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from banger import proc
from banger.errors import TimedOut
from banger.vmm.driver import MARK_VM

# flock has no deadline of its own; a child needs about a millisecond from fork to exec.
LOOK_AGAIN_S = 0.005
END_TIMEOUT_S = 15.0


@contextlib.contextmanager
def sole(vm: str, directory: Path) -> Iterator[int]:
    """End every process of the VM and give the lock that proves it, to be handed to the next one.

    Raises FileNotFoundError without the directory, TimedOut when a process cannot be ended.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + END_TIMEOUT_S
        while True:
            end_marked(vm)
            if _try_lock(fd):
                break
            if time.monotonic() >= deadline:
                raise TimedOut(
                    f"Something still holds {vm} after {END_TIMEOUT_S:g} s.",
                    hint=f"`fuser -v {directory}` shows which process it is.",
                )
            time.sleep(LOOK_AGAIN_S)
        yield fd
    finally:
        os.close(fd)


def wait_idle(directory: Path, timeout_s: float) -> bool:
    """Wait until no process of the VM is left, ending none; False when one still is after `timeout_s`."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + timeout_s
        while not (idle := _try_lock(fd)) and time.monotonic() < deadline:
            time.sleep(LOOK_AGAIN_S)
        return idle
    finally:
        os.close(fd)


def end_marked(vm: str) -> None:
    """SIGKILL every process that carries the VM's mark and wait until each is gone."""
    for process in proc.find_by_environ(MARK_VM, vm):
        proc.kill(process)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
