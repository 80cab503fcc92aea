"""Packets with descriptors, on a socket that keeps their boundaries (SOCK_SEQPACKET of unix(7))."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterable
from typing import NamedTuple

MAX_PACKET = 64 * 1024
MAX_FDS = 16
"""Descriptors in one packet; more are refused."""

_UCRED = struct.Struct("iII")  # pid, uid, gid: SO_PEERCRED of socket(7)
_TIMEVAL = struct.Struct("ll")  # struct timeval of SO_SNDTIMEO
_INT = array.array("i").itemsize


class Packet(NamedTuple):
    """What came in one piece. `whole` is false when the kernel had to cut bytes or descriptors off."""

    data: bytes
    fds: tuple[int, ...]
    whole: bool


def peer(connection: socket.socket) -> tuple[int, int]:
    """Give uid and gid of the other end as they were when it called connect(2) or listen(2)."""
    _, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return uid, gid


def connect(connection: socket.socket, path: str, timeout_s: float) -> None:
    """Connect, waiting for a place in the queue, and give all that follows a timeout. Raises OSError.

    Python's own timeout makes connect(2) non-blocking, and a full queue then an error (unix(7), EAGAIN).
    """
    seconds = int(timeout_s)
    wait = _TIMEVAL.pack(seconds, max(int((timeout_s - seconds) * 1e6), 1))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
    connection.connect(path)
    connection.settimeout(timeout_s)


def receive(connection: socket.socket) -> Packet:
    """Receive one packet; an empty one means that the other end is gone. Raises OSError."""
    data, ancillary, flags, _ = connection.recvmsg(
        MAX_PACKET, socket.CMSG_SPACE(MAX_FDS * _INT), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) // _INT * _INT])
    return Packet(data, tuple(fds), not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC))


def send(connection: socket.socket, data: bytes, fds: Iterable[int] = ()) -> None:
    """Send one packet. Raises OSError."""
    rights = array.array("i", fds)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
    connection.sendmsg([data], ancillary)


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that nobody else has."""
    for fd in fds:
        os.close(fd)
