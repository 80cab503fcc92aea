"""Ask root for something: one connection, one packet, one answer."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from banger.errors import HelperDown, from_dict
from banger.helper import wire
from banger.helper.requests import MAX_REQUEST, Request

ROOT = 0
MAX_ANSWER = 16 << 20
"""Bytes; a longer one is none of ours."""


class Answer(NamedTuple):
    """What root said: facts, descriptors that the caller has now, and the audit line's number, if any."""

    facts: dict[str, Any]
    fds: tuple[int, ...]
    audit: int | None


class _Error(msgspec.Struct, frozen=True):
    code: str
    message: str
    hint: str | None = None
    op: str | None = None


class _Wire(msgspec.Struct, frozen=True):
    ok: dict[str, Any] | None = None
    error: _Error | None = None
    audit: int | None = None


def ask(socket_path: Path, request: Request, fds: Sequence[int] = (), *, timeout_s: float = 30.0) -> Answer:
    """Send a request with descriptors, which stay the caller's, and wait for the answer.

    Raises HelperDown when nobody is there, when who is there is not root, hangs up, is silent for
    `timeout_s` or talks nonsense: whether it was done is then unknown, and asking again with the same
    key is safe. Raises the error that root answered with.
    """
    deadline = time.monotonic() + timeout_s
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            wire.connect(connection, os.fspath(socket_path), timeout_s)
            _check_root(connection)
            packet = _converse(connection, _encode(request), fds, deadline)
    except (OSError, ValueError) as error:
        raise HelperDown(f"The root helper does not answer: {error}.") from None
    try:
        return _read(packet)
    except BaseException:
        wire.close_all(packet.fds)
        raise


def _check_root(connection: socket.socket) -> None:
    """Raise HelperDown unless root listens: another could have made a socket at this path."""
    uid, _ = wire.peer(connection)
    if uid != ROOT:
        raise HelperDown(f"What listens on the root helper's socket is not root but user {uid}.")


def _encode(request: Request) -> bytes:
    data = msgspec.json.encode(request)
    assert len(data) <= MAX_REQUEST
    return data


def _converse(connection: socket.socket, data: bytes, fds: Sequence[int], deadline: float) -> wire.Packet:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # turned away: the reason may be there
        wire.send(connection, data, fds)
    connection.settimeout(max(deadline - time.monotonic(), 0.001))
    try:
        return wire.receive(connection)
    except ConnectionResetError:
        # Hanging up on what it has not read, the kernel tells this first and then the answer (unix(7)).
        return wire.receive(connection)


def _read(packet: wire.Packet) -> Answer:
    data, fds = packet.data, packet.fds
    if data == b"{}" and fds:  # too long for a packet: it is in a file beside it
        data, fds = _content(fds[-1]), fds[:-1]
    if not packet.whole or not data:
        raise HelperDown("The root helper hung up." if packet.whole else "The root helper's answer was cut.")
    try:
        answer = msgspec.json.decode(data, type=_Wire)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HelperDown(f"The root helper's answer cannot be read: {error}.") from None
    if answer.error is not None:
        raise from_dict(msgspec.to_builtins(answer.error))
    if answer.ok is None:
        raise HelperDown("The root helper's answer says nothing.")
    wire.close_all(packet.fds[len(fds) :])
    return Answer(answer.ok, fds, answer.audit)


def _content(fd: int) -> bytes:
    try:
        size = os.fstat(fd).st_size
        return os.pread(fd, size, 0) if size <= MAX_ANSWER else b""
    except OSError as error:
        raise HelperDown(f"The root helper's answer cannot be read: {error}.") from None
