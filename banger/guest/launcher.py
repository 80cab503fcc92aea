"""A shell that waits in a guest for the command that it becomes.

What an SSH server does to begin a command (fork, log-in shell, its start-up files) is done ahead, so a
command costs the way there and its own start. The shell leads a session of its own: one signal
reaches all that the command has started, and nothing that an earlier one has left.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Callable
from typing import Any, cast

import asyncssh

from banger.errors import GuestUnreachable, InvalidRequest
from banger.guest import words
from banger.guest.words import BUSYBOX, Command, as_bytes

START_S = 15.0
LONGEST_LINE = 2048
"""A shell reads its line a byte at a time; what is longer follows the line as a block."""

LONGEST_ON_TERMINAL = 8192
"""Bytes: dropbear takes 9000 (MAX_CMD_LEN), and through a terminal a line would be echoed."""

_MOST_NOISE = 65536
_GREETING = re.compile(rb"(?:^|\n)banger ([0-9]+)\r?\n")
_HELLO = "echo banger $$"
_WAIT = f'{_HELLO}; IFS= read -r c || exit; eval "$c"'
_LEAD = f"exec {BUSYBOX} setsid"
# These lines are for the log-in shell, whichever it is; what it starts is a POSIX one.
_START = (
    f"[ -x /bin/sh ] && {_LEAD} /bin/sh -c {shlex.quote(_WAIT)};"
    f" {_LEAD} /run/banger/bin/sh -c {shlex.quote(_WAIT)}"
)

Receiver = Callable[["Shell", bytes, int | None], None]
"""Gets what a shell says, and its kind: asyncssh.EXTENDED_DATA_STDERR, or None."""


class Shell(asyncssh.SSHClientSession[bytes]):
    """One channel. `receive` gets what comes once it is set; `ended` has how the channel ended."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.channel: asyncssh.SSHClientChannel[bytes]
        self.receive: Receiver | None = None
        self.ended: asyncio.Future[Exception | None] = loop.create_future()
        self.writable = asyncio.Event()
        self.writable.set()
        self.pid: asyncio.Future[int] = loop.create_future()
        """The shell's, then the command's; it is its session's and its process group's too."""
        self._heard = bytearray()

    def connection_made(self, chan: asyncssh.SSHClientChannel[bytes]) -> None:
        """Keep the channel (asyncssh calls this and the four below)."""
        self.channel = chan

    def data_received(self, data: bytes, datatype: int | None) -> None:
        """Pass on what came."""
        if self.receive is not None and self.pid.done():
            self.receive(self, data, datatype)
        elif datatype is None:  # start-up files may say something before, also on standard error
            self._greeted(data)

    def _greeted(self, data: bytes) -> None:
        self._heard += data
        found = _GREETING.search(bytes(self._heard))
        if found:
            rest = bytes(self._heard[found.end() :])
            self._heard.clear()
            self.pid.set_result(int(found[1]))
            if rest and self.receive is not None:
                self.receive(self, rest, None)
        elif len(self._heard) > _MOST_NOISE:
            self.channel.abort()

    def pause_writing(self) -> None:
        """Hold the writer back."""
        self.writable.clear()

    def resume_writing(self) -> None:
        """Let the writer go on."""
        self.writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell that the channel has ended."""
        self.writable.set()
        if not self.pid.done():
            self.pid.cancel()
        if not self.ended.done():
            self.ended.set_result(exc)

    def waits(self) -> bool:
        """Tell whether it still waits for its command."""
        return self.receive is None and not self.ended.done()

    def become(self, command: Command, receive: Receiver) -> None:
        """Run a command; what it says goes to `receive`."""
        text = as_bytes(words.script(command))
        self.receive = receive
        if len(text) > LONGEST_LINE or b"\n" in text:
            read = f"{BUSYBOX} dd bs={len(text)} count=1 iflag=fullblock 2> /dev/null"
            text = f'c=$({read}); eval "$c"\n'.encode() + text
        else:
            text += b"\n"
        self.channel.write(text)


async def wait_for_command(connection: asyncssh.SSHClientConnection) -> Shell:
    """Start a shell that waits. Raises GuestUnreachable."""
    return await _start(connection, Shell(), _START, None)


async def on_terminal(
    connection: asyncssh.SSHClientConnection,
    command: Command,
    receive: Receiver,
    terminal: tuple[str, int, int],
) -> Shell:
    """Run a command on a terminal (type, rows, columns). Raises GuestUnreachable, InvalidRequest."""
    shell = Shell()
    shell.receive = receive
    text = f"{_HELLO}; {words.script(command)}"
    quoted = shlex.quote(text)
    line = as_bytes(f"[ -x /bin/sh ] && exec /bin/sh -c {quoted}; exec /run/banger/bin/sh -c {quoted}")
    if len(line) > LONGEST_ON_TERMINAL:
        raise InvalidRequest(
            f"With a terminal a command may have {LONGEST_ON_TERMINAL} bytes.",
            hint="`-T` runs it without one, or put it into a file in the guest.",
        )
    return await _start(connection, shell, line, terminal)


async def _start(
    connection: asyncssh.SSHClientConnection,
    shell: Shell,
    line: str | bytes,
    terminal: tuple[str, int, int] | None,
) -> Shell:
    try:
        async with asyncio.timeout(START_S):
            # asyncssh takes bytes as they are, which its hints leave out, and no `None` for these two.
            more: dict[str, Any] = {}
            if terminal is not None:
                kind, rows, cols = terminal
                more = {"term_type": kind, "term_size": (cols, rows)}
            await connection.create_session(lambda: shell, cast("str", line), encoding=None, **more)
            await asyncio.wait([shell.pid])
    except (asyncssh.Error, OSError, TimeoutError) as error:
        raise GuestUnreachable(f"The guest refused to run the command: {error or 'it is silent'}") from None
    if shell.pid.cancelled():
        raise GuestUnreachable("The guest's shell does not start.")
    return shell
