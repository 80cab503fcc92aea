"""Carry one guest command's streams over a client's connection.

After the reply to `vm.exec` both sides send frames: one byte type, four bytes big-endian length,
payload. From the client: `i` input, `e` end of input, `w` JSON [rows, cols], `s` a signal's name.
To the client: `o` output, `r` errors, and at the end `x` JSON {"exit": code} or `f` a JSON error.
"""

from __future__ import annotations

import asyncio
import shlex
import signal
import struct
from typing import Any

import asyncssh
import msgspec

from banger.errors import BangerError, GuestUnreachable

MAX_FRAME = 1 << 20
_HEAD = struct.Struct(">cI")
_ERRORS = asyncssh.EXTENDED_DATA_STDERR


def frame(kind: bytes, payload: bytes) -> bytes:
    """Encode one frame."""
    return _HEAD.pack(kind, len(payload)) + payload


class _Session(asyncssh.SSHClientSession[bytes]):
    """Writes what the guest says to the client, no faster than the client reads."""

    def __init__(self, client: asyncio.StreamWriter):
        self._client = client
        self._draining: asyncio.Task[None] | None = None
        self.channel: asyncssh.SSHClientChannel[bytes] | None = None
        self.ended: asyncio.Future[BangerError | None] = asyncio.get_running_loop().create_future()
        self.writable = asyncio.Event()
        self.writable.set()

    def connection_made(self, chan: asyncssh.SSHClientChannel[bytes]) -> None:
        self.channel = chan

    def data_received(self, data: bytes, datatype: int | None) -> None:
        self._client.write(frame(b"r" if datatype == _ERRORS else b"o", data))
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        assert self.channel is not None
        self.channel.pause_reading()
        try:
            await self._client.drain()
            self.channel.resume_reading()
        except ConnectionError:
            self.channel.abort()
        finally:
            self._draining = None

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.writable.set()
        if not self.ended.done():
            self.ended.set_result(
                None if exc is None else GuestUnreachable(f"The connection was lost: {exc}")
            )


async def run(
    connection: asyncssh.SSHClientConnection,
    words: list[str],
    *,
    terminal: tuple[str, int, int] | None,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """Run a command in a guest for one client, to its end or until the client goes away.

    `words` reach the guest exactly as they are: each is quoted, none is split again.
    `terminal` is (type, rows, cols), or None for plain pipes.
    """
    term: dict[str, Any] = {}
    if terminal is not None:
        kind, rows, cols = terminal
        term = {"term_type": kind, "term_size": (cols, rows)}
    try:
        session = _Session(writer)
        channel, _ = await connection.create_session(
            lambda: session, shlex.join(words), encoding=None, **term
        )
    except (asyncssh.Error, OSError) as error:
        raise GuestUnreachable(f"The guest refused to run the command: {error}") from None
    feeding = asyncio.create_task(_feed(reader, channel, session))
    try:
        waited: set[asyncio.Future[Any]] = {feeding, session.ended}
        done, _ = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if session.ended in done:
            writer.write(_ending(channel, session.ended.result()))
            await writer.drain()
        else:
            feeding.result()  # the client went away
    finally:
        feeding.cancel()
        channel.abort()


def _ending(channel: asyncssh.SSHClientChannel[bytes], lost: BangerError | None) -> bytes:
    if (died_of := channel.get_exit_signal()) is not None:
        number = getattr(signal, f"SIG{died_of[0]}", None)
        return frame(b"x", msgspec.json.encode({"exit": 128 + (number or 0)}))
    status = channel.get_exit_status()
    if status is None:
        error = lost or GuestUnreachable("The guest went away before the command ended.")
        return frame(b"f", msgspec.json.encode(error.to_dict()))
    return frame(b"x", msgspec.json.encode({"exit": status}))


async def _feed(
    reader: asyncio.StreamReader, channel: asyncssh.SSHClientChannel[bytes], session: _Session
) -> None:
    """Pass the client's frames on; returns when the client has closed its connection."""
    while True:
        try:
            kind, length = _HEAD.unpack(await reader.readexactly(_HEAD.size))
            if length > MAX_FRAME:
                return
            payload = await reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        if kind in (b"i", b"e"):
            await session.writable.wait()
            if channel.is_closing():  # also after `e`: then only signals and sizes go on
                continue
        elif session.ended.done():
            continue
        if kind == b"i":
            channel.write(payload)
        elif kind == b"e":
            channel.write_eof()
        elif kind == b"w":
            rows, cols = msgspec.json.decode(payload, type=tuple[int, int])
            channel.change_terminal_size(cols, rows)
        elif kind == b"s":
            channel.send_signal(payload.decode("ascii"))
