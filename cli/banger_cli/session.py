"""A command inside a guest: its streams, its signals, its terminal.

Frames both ways: one byte of type, four bytes of length (big-endian), the payload.
To the daemon: `i` stdin, `e` its end, `w` JSON [rows, columns], `s` a signal's name.
From it: `o` stdout, `r` stderr, `x` JSON {"exit": code} at the end, `f` JSON error at a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import sys
from collections.abc import Callable, Iterator

# What is not imported here is imported where it is needed: `vm exec` is to cost little.
TYPE_CHECKING = False  # as typing has it, at no cost
if TYPE_CHECKING:
    import _socket
    from typing import Protocol

    class Carrier(Protocol):
        """A connection to the daemon on which a command runs."""

        def take(self) -> tuple[_socket.socket, bytearray]:
            """Give the socket and the bytes already read from it."""


Sink = Callable[[bytes], object]

_HEAD = struct.Struct(">cI")
_CHUNK = 65536
# One direction must never wait for the other: what is not yet sent is kept, up to here.
_HIGH_WATER = 4 * _CHUNK
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# A guest that does not answer signals must not hold the user's terminal: the third one leaves.
_LEAVE_AFTER = 3


class Session:
    """One running command; `run` returns its exit code."""

    def __init__(self, daemon: Carrier, *, stdin: int | None, stdout: Sink, stderr: Sink):
        self._sock, self._in = daemon.take()
        self._out = bytearray()
        self._stdin = stdin
        self._sinks = {b"o": stdout, b"r": stderr}
        self._signals = 0
        self._exit: int | None = None

    def run(self) -> int:
        """Carry bytes and signals until the command ends; its exit code, 128+n for signal n.

        Raises the daemon's error, ConnectionLost when the daemon dies, KeyboardInterrupt at the
        third signal, BrokenPipeError when nobody reads the output any more.
        """
        if self._stdin is None:
            self._send(b"e")
        self._sock.setblocking(False)
        with caught_signals() as bell:
            self._take_frames()
            while self._exit is None:
                self._turn(bell)
        return self._exit

    def _turn(self, bell: int) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN | (select.POLLOUT if self._out else 0))
        poll.register(bell, select.POLLIN)
        if self._stdin is not None and len(self._out) < _HIGH_WATER:
            poll.register(self._stdin, select.POLLIN)
        for fd, event in poll.poll():
            if fd == bell:
                self._signalled(os.read(bell, 64))
            elif fd == self._stdin:
                self._read_stdin(fd)
            else:
                self._carry(event)

    def _carry(self, event: int) -> None:
        if event & select.POLLOUT:
            self._flush()
        if event & ~select.POLLOUT:
            self._receive()

    def _flush(self) -> None:
        try:
            del self._out[: self._sock.send(self._out)]
        except BlockingIOError:
            return
        except OSError:
            self._out.clear()  # what the daemon last said is still to be read

    def _receive(self) -> None:
        try:
            data = self._sock.recv(_CHUNK)
        except ConnectionResetError:
            data = b""
        if not data:
            from banger_cli.wire import ConnectionLost

            raise ConnectionLost("The daemon went away; the command in the guest may still run.")
        self._in += data
        self._take_frames()

    def _take_frames(self) -> None:
        while len(self._in) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._in)
            end = _HEAD.size + length
            if len(self._in) < end:
                return
            payload = bytes(self._in[_HEAD.size : end])
            del self._in[:end]
            self._take(kind, payload)

    def _take(self, kind: bytes, payload: bytes) -> None:
        if sink := self._sinks.get(kind):
            sink(payload)
        elif kind == b"x":
            self._exit = json.loads(payload)["exit"]
        elif kind == b"f":
            from banger.errors import from_dict

            raise from_dict(json.loads(payload))

    def _read_stdin(self, fd: int) -> None:
        try:
            data = os.read(fd, _CHUNK)
        except OSError:
            data = b""  # EIO: the terminal was hung up
        if data:
            self._send(b"i", data)
        else:
            self._stdin = None
            self._send(b"e")

    def _signalled(self, numbers: bytes) -> None:
        for number in numbers:
            if number == signal.SIGWINCH:
                self._send(b"w", json.dumps(window()).encode())
                continue
            self._signals += 1
            if self._signals == _LEAVE_AFTER:
                raise KeyboardInterrupt
            self._send(b"s", signal.Signals(number).name.removeprefix("SIG").encode())

    def _send(self, kind: bytes, payload: bytes = b"") -> None:
        self._out += _HEAD.pack(kind, len(payload)) + payload


@contextlib.contextmanager
def caught_signals() -> Iterator[int]:
    """Turn signals into bytes, their numbers, on a descriptor; put the old handlers back at the end."""
    bell, hammer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    numbers = (*_FORWARDED, signal.SIGWINCH)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    wakeup = signal.set_wakeup_fd(hammer, warn_on_full_buffer=False)
    try:
        yield bell
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(bell)
        os.close(hammer)


@contextlib.contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """Let every key reach the guest; the terminal is put back as it was, whatever happens."""
    import termios
    import tty

    before = termios.tcgetattr(fd)
    tty.setraw(fd)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal may be gone by now
            termios.tcsetattr(fd, termios.TCSADRAIN, before)


def window() -> tuple[int, int]:
    """Give the terminal's size as rows and columns."""
    for fd in (0, 1, 2):
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(fd)
            if size.lines and size.columns:
                return size.lines, size.columns
    return 24, 80


def write_to(fd: int) -> Sink:
    """Give a sink that writes all of each piece to a descriptor, and waits for a slow reader."""

    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:  # someone else made our terminal non-blocking
                select.select([], [fd], [])

    return write


def stdin_is_terminal() -> bool:
    """Tell whether there is a standard input and it is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()
