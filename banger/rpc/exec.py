"""Carry one guest command's streams over a client's connection.

After the reply to `vm.exec` both sides send frames: one byte type, four bytes big-endian length,
payload. From the client: `i` input, `e` end of input, `w` JSON [rows, cols], `s` a signal's name.
To the client: `o` output, `r` errors, and at the end `x` JSON {"exit": code} or `f` a JSON error.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import struct
from collections.abc import AsyncIterator
from typing import Any

import asyncssh
import msgspec

from banger.errors import BangerError, GuestUnreachable, InvalidRequest
from banger.guest import launcher, words
from banger.guest.connections import Connections
from banger.guest.launcher import Shell
from banger.guest.ssh import Target
from banger.guest.words import Command
from banger.rpc import protocol as p

MAX_FRAME = 1 << 20
TIMED_OUT = 124
"""The exit code of a command that took too long, as timeout(1) has it."""

MERCY_S = 2.0
"""What a command has, after SIGTERM, to end before SIGKILL."""

SIGNAL_S = 10.0
HIGH_WATER = 1 << 20
"""Bytes that wait for a client before the guest must."""

_HEAD = struct.Struct(">cI")
_ERRORS = asyncssh.EXTENDED_DATA_STDERR
_SIGNALS = frozenset("HUP INT QUIT TERM USR1 USR2 KILL".split())


def frame(kind: bytes, payload: bytes) -> bytes:
    """Encode one frame."""
    return _HEAD.pack(kind, len(payload)) + payload


def command(request: p.VmExec) -> Command:
    """Read what is to run, and where. Raises InvalidRequest."""
    given = tuple(word.decode("utf-8", "surrogateescape") for word in request.raw)
    wanted = Command(
        words=given or request.argv,
        directory=request.directory,
        environ=request.environ,
        user=request.user,
    )
    words.check(wanted)
    return wanted


async def serve(
    request: p.VmExec,
    wanted: Command,
    connections: Connections,
    target: Target,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """Run a command in a guest for one client, to its end or until the client goes away.

    What then still runs of it gets SIGHUP, as from a terminal that is hung up. Raises GuestUnreachable.
    """
    async with _started(request, wanted, connections, target, writer) as shell:
        running = _Running(shell, connections, target)
        feeding = asyncio.create_task(running.feed(reader))
        try:
            waited: set[asyncio.Future[Any]] = {feeding, shell.ended}
            done, _ = await asyncio.wait(
                waited, timeout=request.timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if feeding in done and not shell.ended.done():
                feeding.result()
                return  # the client went away
            ending = _ending(shell) if done else await running.end()
            writer.write(ending)
            await writer.drain()
        finally:
            feeding.cancel()
            if not shell.ended.done():
                running.signal("HUP")
            shell.channel.abort()


@contextlib.asynccontextmanager
async def _started(
    request: p.VmExec,
    wanted: Command,
    connections: Connections,
    target: Target,
    writer: asyncio.StreamWriter,
) -> AsyncIterator[Shell]:
    """Start the command; what it says goes to the client at once."""
    say = _Voice(writer).say
    if not request.tty:
        async with connections.shell(target) as shell:
            shell.become(wanted, say)
            yield shell
        return
    async with connections.lease(target) as connection:
        yield await launcher.on_terminal(connection, wanted, say, (request.term, request.rows, request.cols))


class _Voice:
    """Writes what the guest says to the client, no faster than the client reads."""

    def __init__(self, client: asyncio.StreamWriter):
        self._client = client
        self._draining: asyncio.Task[None] | None = None

    def say(self, shell: Shell, data: bytes, datatype: int | None) -> None:
        """Pass on one piece."""
        self._client.write(_HEAD.pack(b"r" if datatype == _ERRORS else b"o", len(data)))
        self._client.write(data)
        if self._draining is None and self._client.transport.get_write_buffer_size() > HIGH_WATER:
            shell.channel.pause_reading()
            self._draining = asyncio.create_task(self._drain(shell))

    async def _drain(self, shell: Shell) -> None:
        try:
            await self._client.drain()
            shell.channel.resume_reading()
        except ConnectionError:
            shell.channel.abort()
        finally:
            self._draining = None


class _Running:
    """A command that runs: its input, its signals, its end."""

    def __init__(self, shell: Shell, connections: Connections, target: Target):
        self._shell = shell
        self._connections = connections
        self._target = target

    async def feed(self, reader: asyncio.StreamReader) -> None:
        """Pass the client's frames on; returns when the client has closed its connection."""
        shell, channel = self._shell, self._shell.channel
        while True:
            try:
                kind, length = _HEAD.unpack(await reader.readexactly(_HEAD.size))
                if length > MAX_FRAME:
                    return
                payload = await reader.readexactly(length)
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            if kind in (b"i", b"e"):
                await shell.writable.wait()
                if channel.is_closing():  # also after `e`: then only signals and sizes go on
                    continue
            elif shell.ended.done():
                continue
            if kind == b"i":
                channel.write(payload)
            elif kind == b"e":
                channel.write_eof()
            elif kind == b"w":
                rows, cols = msgspec.json.decode(payload, type=tuple[int, int])
                channel.change_terminal_size(cols, rows)
            elif kind == b"s":
                self.signal(payload.decode("ascii"))

    def signal(self, name: str) -> None:
        """Have a signal sent to all that the command has started; raises InvalidRequest."""
        if name not in _SIGNALS:
            raise InvalidRequest(f"{name!r} is no signal that can be passed on.")
        task = asyncio.create_task(self._signal(name))
        _SENDING.add(task)
        task.add_done_callback(_SENDING.discard)

    async def _signal(self, name: str) -> None:
        """Send a signal over another connection; one that cannot be sent has nobody left to reach."""
        group = f"-{self._shell.pid.result()}"
        with contextlib.suppress(BangerError, asyncssh.Error, TimeoutError):
            async with asyncio.timeout(SIGNAL_S), self._connections.shell(self._target) as other:
                other.become(Command(words=("kill", "-s", name, "--", group)), lambda *_: None)
                await other.ended

    async def end(self) -> bytes:
        """End a command that took too long, with all that it has started."""
        await self._signal("TERM")
        await asyncio.wait([self._shell.ended], timeout=MERCY_S)
        await self._signal("KILL")  # also when the command itself has ended: its children may not
        return frame(b"x", msgspec.json.encode({"exit": TIMED_OUT}))


_SENDING: set[asyncio.Task[None]] = set()
"""A task that nobody refers to may be collected before its end (asyncio.create_task)."""


def _ending(shell: Shell) -> bytes:
    channel, lost = shell.channel, shell.ended.result()
    if (died_of := channel.get_exit_signal()) is not None:
        number = getattr(signal, f"SIG{died_of[0]}", None)
        return frame(b"x", msgspec.json.encode({"exit": 128 + (number or 0)}))
    status = channel.get_exit_status()
    if status is None:
        why = "The guest went away before the command ended." if lost is None else f"It was lost: {lost}"
        return frame(b"f", msgspec.json.encode(GuestUnreachable(why).to_dict()))
    return frame(b"x", msgspec.json.encode({"exit": status}))
