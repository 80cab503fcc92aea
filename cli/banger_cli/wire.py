"""Speak with the daemon: one line of JSON per request, over its unix socket."""

from __future__ import annotations

import json
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

from banger.errors import DaemonDown, InvalidRequest, from_dict
from banger_cli import place

Json = dict[str, Any]

PATIENCE_S = 10.0
TICK_S = 0.1


class ConnectionLost(DaemonDown):
    """The daemon went away before it answered."""

    default_hint = "`banger ops list` shows what goes on; an operation survives its daemon."


class Connection:
    """One connection to the daemon; several requests may follow one another on it."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self._buffer = bytearray()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._method = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def request(self, method: str, **params: Any) -> Json:
        """Ask once and give the result; None among the params means: not given.

        Raises the daemon's error, ConnectionLost, or DaemonDown when it accepts but is silent.
        """
        self._send(method, params)
        return self._result(self._line(self._on_silence))

    def stream(self, method: str, *, idle: Callable[[], None] | None = None, **params: Any) -> Iterator[Json]:
        """Ask, and give every line of the answer; the last one has `result`.

        `idle` is called every tenth of a second in which nothing comes. Raises as `request` does.
        """
        self._send(method, params)
        while True:
            line = self._line(self._check_alive, idle)
            if "error" in line:
                raise from_dict(line["error"])
            yield line
            if "result" in line:
                return

    def text(self, method: str, **params: Any) -> str:
        """Ask for an answer that is plain text up to the end of the connection."""
        self._send(method, params)
        self._wait(self._on_silence, None)
        reply = b"".join(iter(lambda: self._sock.recv(65536), b""))
        if reply.startswith(b"{"):
            raise from_dict(json.loads(reply)["error"])
        if not reply:
            raise ConnectionLost
        return reply.decode("utf-8", "replace")

    def hello(self) -> Json:
        """Ask whether the daemon answers at all; raises DaemonDown when it does not in time."""
        self._send("hello", {})
        return self._result(self._line(_give_up))

    def take(self) -> tuple[socket.socket, bytearray]:
        """Give the socket and the bytes already read from it: from here on it speaks frames."""
        return self._sock, self._buffer

    def daemon_pid(self) -> int:
        """Give the pid of the process that listens, also when it is hung (SO_PEERCRED, unix(7))."""
        raw = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", raw)[0]
        return pid

    def wait_closed(self, timeout_s: float) -> bool:
        """Wait until the daemon has closed the connection; False when it has not in time."""
        if not self._poll.poll(timeout_s * 1000):
            return False
        try:
            return not self._sock.recv(1)
        except OSError:
            return True

    def _send(self, method: str, params: Json) -> None:
        self._method = method
        given = {key: value for key, value in params.items() if value is not None}
        try:
            line = json.dumps({"method": method, "params": given}, ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError:
            raise InvalidRequest(
                "A word has bytes that are not UTF-8 and cannot be carried as an argument.",
                hint="Pass such bytes through standard input or a file.",
            ) from None
        try:
            self._sock.sendall(line)
        except OSError as error:
            raise ConnectionLost from error

    def _line(self, silent: Callable[[], None], idle: Callable[[], None] | None = None) -> Json:
        while (end := self._buffer.find(b"\n")) < 0:
            self._wait(silent, idle)
            try:
                data = self._sock.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                raise ConnectionLost
            self._buffer += data
        line: Json = json.loads(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _wait(self, silent: Callable[[], None], idle: Callable[[], None] | None) -> None:
        pause_s = PATIENCE_S if idle is None else TICK_S
        since = time.monotonic()
        while not self._poll.poll(pause_s * 1000):
            if idle is not None:
                idle()
            if time.monotonic() - since >= PATIENCE_S:
                silent()
                since = time.monotonic()

    def _result(self, line: Json) -> Json:
        if "error" in line:
            raise from_dict(line["error"])
        result: Json = line["result"]
        return result

    def _check_alive(self) -> None:
        """Tell a daemon that is at work from one that is hung, by asking on a second connection."""
        with connect(start=False) as second:
            second.hello()

    def _on_silence(self) -> None:
        self._check_alive()
        print(f"banger: the daemon is still working on {self._method}", file=sys.stderr)


def _give_up() -> None:
    raise DaemonDown("The daemon accepts connections but does not answer.")


def connect(*, start: bool = True, read_only: bool = False) -> Connection:
    """Connect to the daemon, starting it when there is none; one that only reads, if asked to.

    Raises DaemonDown when it cannot be started, or when `start` is false and there is none.
    """
    sock = dial()
    if sock is None and start:
        from banger_cli import start as starter

        sock = starter.start(read_only=read_only)
    if sock is None:
        raise DaemonDown("No daemon is running.", hint="Any command that needs it starts it.")
    return Connection(sock)


def dial() -> socket.socket | None:
    """Connect to the socket; None when nobody listens there.

    Raises DaemonDown when the daemon is there but lets nobody in.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    # A unix socket's connect waits, for as long as a send may, for room in the backlog; with a
    # Python timeout it would fail at once instead, and a burst of clients with it.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(PATIENCE_S), 0))
    try:
        sock.connect(place.socket())
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except BlockingIOError as error:
        sock.close()
        raise DaemonDown("The daemon accepts no more connections.") from error
    except OSError as error:
        sock.close()
        raise _explain(error) from error
    return sock


def _explain(error: OSError) -> DaemonDown:
    from banger.config import find_dirs

    find_dirs()  # raises the better error when the path is too long for a socket
    return DaemonDown(f"The daemon's socket cannot be used: {error}.")


def call(method: str, **params: Any) -> Json:
    """Ask the daemon one thing on a connection of its own; see `Connection.request`."""
    with connect() as daemon:
        return daemon.request(method, **params)
