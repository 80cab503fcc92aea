"""A small client of the QEMU Machine Protocol (QEMU: docs/interop/qmp-spec.rst).

JSON objects, one per line. QEMU serves one client at a time: a second one waits in the socket's
backlog, so connections are short and everything has a deadline.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from banger.errors import ProgramFailed, TimedOut, WrongState

# The answers that banger asks for are below 1 KiB.
MAX_REPLY_BYTES = 1 << 20


class Qmp:
    """One negotiated connection; use `connect`."""

    def __init__(self, connection: socket.socket, deadline: float):
        self._connection = connection
        self._deadline = deadline
        self._pending = b""

    def negotiate(self) -> None:
        """Read the greeting and leave capabilities negotiation (qmp-spec, section 4)."""
        greeting = self._read()
        if "QMP" not in greeting:
            raise ProgramFailed("QEMU's control socket gave no QMP greeting.")
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and give what it returned; events that arrive meanwhile are dropped.

        Raises ProgramFailed with QEMU's words, TimedOut, WrongState when QEMU hangs up.
        """
        request = {"execute": command, "arguments": arguments}
        self._within_deadline()
        try:
            self._connection.sendall(json.dumps(request).encode() + b"\n")
        except TimeoutError:
            raise _silent() from None
        except OSError:
            raise _gone() from None
        while True:
            reply = self._read()
            if "return" in reply:
                return reply["return"]
            if "error" in reply:
                raise ProgramFailed(f"QEMU refused {command}: {reply['error'].get('desc')}")

    def _read(self) -> dict[str, Any]:
        """Read one object."""
        while b"\n" not in self._pending:
            if len(self._pending) > MAX_REPLY_BYTES:
                raise ProgramFailed(f"QEMU's answer is longer than {MAX_REPLY_BYTES} bytes.")
            self._pending += self._receive()
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            reply = json.loads(line)
        except ValueError:
            raise ProgramFailed("QEMU's answer is not JSON.") from None
        if not isinstance(reply, dict):
            raise ProgramFailed("QEMU's answer is not a JSON object.")
        return reply

    def _receive(self) -> bytes:
        self._within_deadline()
        try:
            data = self._connection.recv(65536)
        except TimeoutError:
            raise _silent() from None
        except OSError:
            raise _gone() from None
        if not data:
            raise _gone()
        return data

    def _within_deadline(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise _silent()
        self._connection.settimeout(left)


def _silent() -> TimedOut:
    return TimedOut("QEMU's control socket does not answer.")


def _gone() -> WrongState:
    return WrongState("QEMU is not running.", hint="`banger vm show NAME` tells the VM's state.")


@contextlib.contextmanager
def connect(path: Path, timeout_s: float) -> Iterator[Qmp]:
    """Connect and negotiate; `timeout_s` bounds everything until the connection is closed.

    Raises WrongState when nobody listens, TimedOut, ProgramFailed.
    """
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
        except TimeoutError:
            raise _silent() from None
        except OSError:
            raise _gone() from None
        qmp = Qmp(connection, deadline)
        qmp.negotiate()
        yield qmp
