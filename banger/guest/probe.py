"""Look into a guest through a connection that is there already: ask a shell, knock at a port.

A guest may say anything, for as long as it likes: every answer is bounded, and who asks has a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import ssl
import time
from pathlib import Path
from typing import Literal

import asyncssh

from banger.errors import GuestUnreachable
from banger.guest import statistics
from banger.model import Value

MOST_SAID = 4 << 20
KNOCK_S = 1.0
"""How long a port may take to say something, before it is taken for one that listens first."""

Speaks = Literal["http", "https", "tls", "other"]
_ASK = b"GET / HTTP/1.0\r\nHost: localhost\r\nConnection: close\r\n\r\n"
_PIECE = 16384
_LISTEN = "0A"
"""TCP_LISTEN in the `st` column of /proc/net/tcp (kernel: include/net/tcp_states.h)."""

PORTS = """\
b=/run/banger/bin/busybox
cd /proc
echo '== tcp'; $b cat net/tcp net/tcp6 2> /dev/null
echo '== fds'; $b ls -l [0-9]*/fd 2> /dev/null
echo '== names'; $b grep -s . [0-9]*/comm
"""
_HOLDER = re.compile(r"^(\d+)/fd:$|-> socket:\[(\d+)\]$", re.MULTILINE | re.ASCII)
_NAME = re.compile(r"^(\d+)/comm:(.{1,15})$", re.MULTILINE | re.ASCII)


class Listener(Value):
    """A TCP port on which something listens in a guest. Addresses are the guest's own."""

    port: int
    addresses: tuple[str, ...]
    process: str | None = None
    pid: int | None = None

    @property
    def only_inside(self) -> bool:
        """Whether nobody but the guest itself can reach it."""
        return all(ipaddress.ip_address(address).is_loopback for address in self.addresses)

    @property
    def knock_at(self) -> str:
        """The address at which it answers from inside: it may listen on one only."""
        everywhere = {"0.0.0.0", "::"} & set(self.addresses)  # noqa: S104 (nothing is bound here)
        return "127.0.0.1" if everywhere else self.addresses[0]


async def ask(connection: asyncssh.SSHClientConnection, script: str) -> str:
    """Have the guest's shell run a script; give what it printed. Raises GuestUnreachable."""
    try:
        process = await connection.create_process(script, encoding=None)
    except (asyncssh.Error, OSError) as error:
        raise GuestUnreachable(f"The guest refused to be asked: {error}.") from None
    said = b""
    try:
        process.stdin.write_eof()
        while len(said) <= MOST_SAID and (piece := await process.stdout.read(1 << 16)):
            said += piece
    except (asyncssh.Error, OSError) as error:
        raise GuestUnreachable(f"The guest did not answer: {error}.") from None
    except asyncio.CancelledError:
        connection.abort()  # its answer may never end: the next one who asks gets another connection
        raise
    finally:
        process.close()  # without waiting for the guest to agree
    if len(said) > MOST_SAID:
        raise GuestUnreachable("The guest has more to say than a guest should.")
    return said.decode("utf-8", "replace")


# -- the agent ---------------------------------------------------------------------------------


async def ping(path: Path, times: int = 3) -> list[float]:
    """Give the seconds of some round trips to the guest's agent, after one that wakes it.

    Raises GuestUnreachable when its channel is not there, or closes.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(path)
        with contextlib.closing(writer):
            trips = []
            for _ in range(times + 1):  # nobody was there: the first word waits until it looks again
                began = time.perf_counter()
                writer.write(b"ping\n")
                while await reader.readuntil(b"\n") != b"pong\n":
                    pass  # an answer that somebody before us did not wait for
                trips.append(time.perf_counter() - began)
            return trips[1:]
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        raise GuestUnreachable("The agent's channel is closed.") from None


# -- ports -------------------------------------------------------------------------------------


def listeners(said: str) -> list[Listener]:
    """Read what PORTS prints, by port. Formats: proc_pid_net(5) `tcp`, proc_pid_fd(5)."""
    part = statistics.sections(said)
    names = {int(pid): name for pid, name in _NAME.findall(part.get("names", ""))}
    holders = _holders(part.get("fds", ""))
    found: dict[int, list[tuple[str, int | None]]] = {}
    for address, port, inode in _listening(part.get("tcp", "")):
        found.setdefault(port, []).append((address, holders.get(inode)))
    return [_listener(port, found[port], names) for port in sorted(found)]


def _listener(port: int, ends: list[tuple[str, int | None]], names: dict[int, str]) -> Listener:
    pid = next((pid for _, pid in ends if pid is not None), None)
    return Listener(
        port=port,
        addresses=tuple(dict.fromkeys(address for address, _ in ends)),
        pid=pid,
        process=None if pid is None else names.get(pid),
    )


def _listening(table: str) -> list[tuple[str, int, str]]:
    found = []
    for line in table.splitlines():
        words = line.split()
        if len(words) > 9 and words[3] == _LISTEN:
            with contextlib.suppress(ValueError):
                address, port = words[1].split(":")
                found.append((_address(address), int(port, 16), words[9]))
    return found


def _address(hexadecimal: str) -> str:
    """Read an address as /proc has it: words of 32 bits, each in the byte order of x86."""
    raw = bytes.fromhex(hexadecimal)
    if len(raw) not in (4, 16):
        raise ValueError(hexadecimal)
    turned = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    return str(ipaddress.ip_address(turned))


def _holders(listing: str) -> dict[str, int]:
    """Map a socket's inode to the first process that has it open."""
    holders: dict[str, int] = {}
    pid = 0
    for match in _HOLDER.finditer(listing):
        if match[1]:
            pid = int(match[1])
        else:
            holders.setdefault(match[2], pid)
    return holders


async def speaks(connection: asyncssh.SSHClientConnection, address: str, port: int) -> Speaks:
    """Tell what a port of the guest speaks, by asking it through the connection: HTTP, then TLS."""
    said = await _heard(connection, address, port, _ASK)
    plain = said.startswith(b"HTTP/")
    if plain and said.split(b" ", 2)[1:2] != [b"400"]:
        return "http"  # a server of HTTPS may say 400 in plain HTTP
    return await _speaks_tls(connection, address, port) or ("http" if plain else "other")


async def _heard(connection: asyncssh.SSHClientConnection, address: str, port: int, said: bytes) -> bytes:
    """Say something to a port, and give what it says first; nothing when it does not answer in time."""
    with contextlib.suppress(asyncssh.Error, OSError, TimeoutError):
        async with asyncio.timeout(KNOCK_S):
            reader, writer = await connection.open_connection(address, port, encoding=None)
            with contextlib.closing(writer):
                writer.write(said)
                first: bytes = await reader.read(_PIECE)
                return first
    return b""


async def _speaks_tls(
    connection: asyncssh.SSHClientConnection, address: str, port: int
) -> Literal["https", "tls"] | None:
    """Shake hands with a port, whoever it is, and ask it as a browser does."""
    talk = _Talk()
    with contextlib.suppress(asyncssh.Error, OSError, TimeoutError):
        async with asyncio.timeout(KNOCK_S * 2):
            reader, writer = await connection.open_connection(address, port, encoding=None)
            with contextlib.closing(writer):
                while not talk.over:
                    writer.write(talk.say())
                    talk.hear(await reader.read(_PIECE))
    return talk.found


class _Talk:
    """A client of TLS between two buffers: what it has to say, and what it makes of what it hears."""

    def __init__(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is told to it
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        self._asked = False
        self.over = False
        self.found: Literal["https", "tls"] | None = None
        self._go_on()

    def say(self) -> bytes:
        """Give what is to be sent now."""
        return self._outgoing.read()

    def hear(self, piece: bytes) -> None:
        """Take what came; nothing, at the end."""
        self.over = not piece
        self._incoming.write(piece)
        self._go_on()

    def _go_on(self) -> None:
        try:
            if self.found is None:
                self._tls.do_handshake()
                self.found = "tls"
            if not self._asked:
                self._tls.write(_ASK)
                self._asked = True
            if self._tls.read(_PIECE).startswith(b"HTTP/"):
                self.found = "https"
            self.over = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            # One that answers with an alert of TLS speaks it, if not with us.
            self.over = True
            if self.found is None and "ALERT" in (error.reason or ""):
                self.found = "tls"
