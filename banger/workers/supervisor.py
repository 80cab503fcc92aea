"""Fork the workers and keep their number. Started by the daemon.

Everything is imported before the fork and frozen, so the workers share their memory with this
process. It opens no database: a connection does not survive a fork.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import signal
import sys
import time
from types import FrameType

from banger import config
from banger import log as logging
from banger.config import Config, Dirs
from banger.workers import worker

LATE = ("banger.images.pulled", "banger.images.remote.client")
"""What steps import when they first need it: 0.14 s in each worker, or once here, in shared memory."""

PR_SET_PDEATHSIG = 1  # prctl(2)
SOON_S = 1.0
"""A worker that ended sooner than this after its start makes the next one wait as long."""


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGTERM when the parent ends; end at once if it has already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit(0)


class Supervisor:
    """Keeps the configured number of workers alive until SIGTERM, then ends them and waits for them."""

    def __init__(self, dirs: Dirs, settings: Config):
        self._dirs = dirs
        self._settings = settings
        self._count = config.workers(settings)
        self._started: dict[int, float] = {}
        self._stopping = False

    def run(self) -> None:
        """Fork, wait, fork again."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while not self._stopping:
            while len(self._started) < self._count and not self._stopping:
                self._fork()
            self._wait_one()
        while self._started:
            self._wait_one()

    def _stop(self, _: int, __: FrameType | None) -> None:
        self._stopping = True
        for pid in self._started:
            os.kill(pid, signal.SIGTERM)  # our own unreaped child: its pid cannot be another's

    def _fork(self) -> None:
        me = os.getpid()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            die_with_parent(me)
            worker.main(self._dirs, self._settings)
        self._started[pid] = time.monotonic()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _wait_one(self) -> None:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            self._started.clear()
            return
        began = self._started.pop(pid, 0.0)
        if self._stopping:
            return
        logging.get().warning("worker ended", worker=pid, status=os.waitstatus_to_exitcode(status))
        if time.monotonic() - began < SOON_S:
            time.sleep(SOON_S)  # not a wait for an event: a brake on a worker that cannot start


def main() -> None:
    """Run the supervisor; the first argument is the pid of the daemon that starts it."""
    die_with_parent(int(sys.argv[1]))
    os.umask(0o077)
    dirs = config.find_dirs()
    logging.setup("supervisor", dirs.log_file)
    supervisor = Supervisor(dirs, config.load(dirs))
    for late in LATE:
        importlib.import_module(late)
    gc.collect()
    gc.freeze()
    supervisor.run()


if __name__ == "__main__":
    main()
