"""Wake another process: one byte into a FIFO after a commit.

The byte stays until someone reads it, so a ring before the wait is not lost. If it is lost all
the same (the FIFO was replaced), whoever waits looks again after its timeout.
"""

from __future__ import annotations

import contextlib
import os
import select
from pathlib import Path


class Bell:
    """A FIFO that any number of processes ring and wait on."""

    def __init__(self, path: Path):
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        # O_RDWR: opening never blocks, and the FIFO never signals end-of-file.
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        """Give the descriptor, for an event loop's reader."""
        return self._fd

    def ring(self) -> None:
        """Wake one waiter, or the next one to wait."""
        with contextlib.suppress(BlockingIOError):  # full: everyone is awake already
            os.write(self._fd, b"\0")

    def wait(self, timeout_s: float) -> bool:
        """Wait for a ring and take it; False after `timeout_s` seconds."""
        ready, _, _ = select.select([self._fd], [], [], timeout_s)
        if not ready:
            return False
        try:
            return bool(os.read(self._fd, 1))
        except BlockingIOError:  # another waiter was faster
            return True

    def drain(self) -> None:
        """Take all rings; the caller is about to look at everything."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._fd, 4096):
                pass

    def close(self) -> None:
        """Close the descriptor; the FIFO stays for the others."""
        os.close(self._fd)
