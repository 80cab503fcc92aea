"""Do something in a forked process, and learn how that ended."""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections.abc import Callable
from typing import NoReturn

from banger.model import Value

CRASHED = 70
"""Exit status of a process whose job raised something (EX_SOFTWARE of sysexits.h)."""


class Ending(Value):
    """How a process ended (minus a signal's number), and what it said: its result, or its traceback."""

    status: int
    said: bytes

    @property
    def killed(self) -> bool:
        """It was ended by SIGKILL."""
        return self.status == -signal.SIGKILL

    def result(self) -> bytes:
        """Give what its job gave; fails when it did not end well."""
        assert self.status == 0, self.said.decode()
        return self.said


class Child:
    """A process that is forked to do one job; it runs none of our clean-up."""

    def __init__(self, job: Callable[[], bytes]):
        self._out, into = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._out)
            _do(job, into)
        os.close(into)

    def ended(self) -> Ending:
        """Wait for its end."""
        with os.fdopen(self._out, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(self._pid, 0)
        return Ending(status=os.waitstatus_to_exitcode(status), said=said)


def _do(job: Callable[[], bytes], into: int) -> NoReturn:
    status = 0
    try:
        said = job()
    except BaseException:
        said, status = traceback.format_exc().encode(), CRASHED
    with contextlib.suppress(BrokenPipeError), os.fdopen(into, "wb") as pipe:
        pipe.write(said)
    os._exit(status)
