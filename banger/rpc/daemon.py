"""The daemon: `python -m banger.rpc.daemon [--ready-fd N] [--read-only]`.

It serves clients, deals out events, keeps the workers' supervisor alive, gives up claims of dead
workers and ends steps that are past their deadline. It can be killed at any point: what is under
way is in the log, and VMs do not depend on it. It does not write to a log that is damaged; with
--read-only it only answers, and has no workers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from banger import config, proc
from banger import log as logging
from banger.errors import BangerError, LogDamaged, TimedOut
from banger.events import work
from banger.events.log import EventLog
from banger.guest.connections import Connections
from banger.rpc import dns, health
from banger.rpc.server import Server
from banger.rpc.service import Service
from banger.rpc.stale import Stale
from banger.rpc.tail import Tail
from banger.rpc.watch import Tethers, VmmWatch

HOUSEKEEPING_S = 1.0
STOP_S = 10.0


@contextlib.contextmanager
def only_one(dirs: config.Dirs) -> Iterator[None]:
    """Be the only daemon of this owner; the kernel frees the lock when the process ends.

    Raises BangerError when another daemon runs.
    """
    fd = os.open(dirs.daemon_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BangerError("Another daemon of this user is running.") from None
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(fd)


class Daemon:
    """Everything that lives as long as the daemon does."""

    def __init__(self, dirs: config.Dirs, settings: config.Config, *, read_only: bool):
        self.stopping = asyncio.Event()
        self._dirs = dirs
        self._settings = settings
        self._capacity = config.capacity(settings, dirs)
        self._log = EventLog(dirs.database, dirs.work_bell, dirs.event_bell, "daemon", read_only=read_only)
        self._service = Service(
            dirs, settings, self._log, since_us=time.time_ns() // 1000, stop=self.stopping.set
        )
        self._connections = Connections()
        self._tail = Tail(self._log)
        self._watch = VmmWatch(self._service, self._connections)
        self._tethers = Tethers(self._service)
        self._stale = Stale(self._service, self._connections)
        self._tail.listeners += [self._watch.heard, self._service.uses.heard]

    async def run(self, ready_fd: int | None) -> None:
        """Serve until `stopping` is set."""
        writes = not self._log.read_only
        if writes:
            self._keep_house()
        server = Server(self._service, self._tail, self._connections, self._tethers)
        listening = await server.listen(self._dirs.socket)
        names = await dns.start(self._log, self._settings)
        tasks = [asyncio.create_task(self._tail.run())]
        if writes:
            self._service.recover_lost()
            self._watch.adopt()
            self._tethers.adopt()
            tasks += [asyncio.create_task(self._keep_supervisor()), asyncio.create_task(self._housekeeping())]
        logging.get().info("ready", writes=writes)
        if ready_fd is not None:
            os.write(ready_fd, b"\n")
            os.close(ready_fd)
        if writes:
            tasks.append(asyncio.create_task(self._check_log()))
        stopped = asyncio.create_task(_until(self.stopping))
        # A background task that ends has failed: the daemon ends too, loudly, and is started again.
        done: set[asyncio.Task[Any]]
        done, _ = await asyncio.wait({stopped, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        self._tethers.stopping = True
        self._dirs.socket.unlink(missing_ok=True)
        listening.close()
        if names is not None:
            names.close()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=STOP_S)
        await self._connections.close()
        for task in done - {stopped}:
            task.result()

    async def _keep_supervisor(self) -> None:
        """Start the workers' supervisor, and again whenever it ends."""
        while True:
            began = time.monotonic()
            supervisor = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "banger.workers.supervisor",
                str(os.getpid()),
                stdin=asyncio.subprocess.DEVNULL,
            )
            try:
                status = await supervisor.wait()
            except asyncio.CancelledError:
                supervisor.terminate()
                await supervisor.wait()
                raise
            logging.get().error("supervisor ended", status=status)
            self._keep_house()
            if time.monotonic() - began < HOUSEKEEPING_S:
                await asyncio.sleep(HOUSEKEEPING_S)  # a brake, not a wait for an event

    async def _check_log(self) -> None:
        """Check the log all the while; it ends the daemon when it is damaged."""
        await health.keep_checking(self._dirs)

    def _keep_house(self) -> None:
        """Make lost projections again, free what dead workers hold.

        A log that cannot be written now is tried again in a second.
        """
        try:
            self._log.require_file()
            if self._log.mend():
                logging.get().warning("rows of the projections were lost; made again from the log")
            work.reap(self._log)
            work.tell_why(self._log, self._capacity)
        except LogDamaged:
            raise  # the daemon ends: whoever starts the next one is told
        except BangerError as error:
            logging.get().error("cannot keep house", error=error.message)

    async def _housekeeping(self) -> None:
        """Once a second: free what dead workers hold, end workers whose step is overdue, look around."""
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            self._keep_house()
            for op, worker in work.overdue(self._log):
                logging.get(op=op).error("step past its deadline", worker=worker.pid)
                with contextlib.suppress(TimedOut):  # in a system call that cannot be interrupted: later
                    await asyncio.to_thread(proc.kill, worker)
                self._keep_house()
            self._watch.look_again()
            self._tethers.look_again()
            self._stale.look()


def main() -> None:
    """Run the daemon until SIGTERM, SIGINT or `daemon stop`."""
    parser = argparse.ArgumentParser(prog="banger.rpc.daemon")
    parser.add_argument(
        "--ready-fd",
        type=int,
        help="a newline is written here when the socket answers, or what is wrong, as JSON",
    )
    parser.add_argument("--read-only", action="store_true", help="answer, and write nothing to the log")
    words = parser.parse_args()
    ready_fd: int | None = words.ready_fd
    os.umask(0o077)
    try:
        dirs = config.find_dirs()
        dirs.make()
        settings = config.load(dirs)
        with only_one(dirs):
            logging.setup("daemon", dirs.log_file)
            if not words.read_only:
                health.require_good(dirs)
            asyncio.run(_run(dirs, settings, ready_fd, read_only=words.read_only))
    except BangerError as error:
        if ready_fd is not None:  # whoever starts us shows it as its own
            os.write(ready_fd, msgspec.json.encode(error.to_dict()))
        sys.exit(f"{error.message} {error.hint or ''}".rstrip())


async def _until(event: asyncio.Event) -> None:
    await event.wait()


async def _run(dirs: config.Dirs, settings: config.Config, ready_fd: int | None, *, read_only: bool) -> None:
    daemon = Daemon(dirs, settings, read_only=read_only)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, daemon.stopping.set)
    await daemon.run(ready_fd)


if __name__ == "__main__":
    main()
