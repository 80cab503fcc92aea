"""One worker process: claim an operation, advance it, again."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from banger import log as logging
from banger import proc
from banger.config import Config, Dirs, capacity
from banger.events import work
from banger.events.log import EventLog
from banger.tasks.context import World
from banger.tasks.registry import pipelines
from banger.tasks.saga import Saga
from banger.workers import queue

CRASHED = 70
"""Exit status of a worker that could not go on (EX_SOFTWARE of sysexits.h)."""


class Stop(BaseException):
    """SIGTERM: give the operation back and end."""


def main(dirs: Dirs, config: Config) -> NoReturn:
    """Work until SIGTERM. Ends by `os._exit`: a forked child must not run its parent's clean-up."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.setup("worker", dirs.log_file)
    status = 0
    try:
        _work(dirs, config)
    except Stop:
        pass
    except BaseException as error:
        logging.get().error("worker ends", exc_info=error)
        status = CRASHED
    sys.stderr.flush()
    os._exit(status)


def _stop(_: int, __: FrameType | None) -> None:
    raise Stop


def _work(dirs: Dirs, config: Config) -> None:
    log = EventLog(dirs.database, dirs.work_bell, dirs.event_bell, "worker")
    world = World(dirs, config)
    known = pipelines()

    def advance(op: str, epoch: int) -> None:
        try:
            saga = Saga(log, known, world, work.Claim(op, epoch))
            try:
                saga.advance()
            except Stop:
                saga.release()
                raise
        except Exception as error:
            # huey would swallow it and the claim would stay with a living worker for ever.
            logging.get(op=op).error("cannot record", exc_info=error)
            raise SystemExit(CRASHED) from error

    work.reap(log)
    huey = queue.connect(log, proc.me(), capacity(config, dirs), advance)
    while True:
        if (task := huey.dequeue()) is not None:
            huey.execute(task)
