"""An authoritative DNS server on 127.0.0.1 that knows VMs: `NAME.vm` gives an address, an address a name.

dnspython reads and writes the messages (RFC 1035). It takes 3 MB, so this room is imported by whoever
starts the server, and only then. There is no cache to be stale: each question is asked of `Names`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import NamedTuple, cast

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.reversename
import dns.rrset

from banger import log as logging
from banger.model import Value
from banger.network.user import HOST_ADDRESS

ZONE = dns.name.from_text("vm.")
REVERSE = dns.name.from_text("in-addr.arpa.")
# The host is its own name server, and there is nobody to write to (RFC 6303, section 3). All times that
# matter are 0: a VM that was made a moment ago has its name now, and one that is gone has none.
START_OF_AUTHORITY = "localhost. nobody.invalid. 1 3600 1200 604800 0"
NAME_SERVER = "localhost."
TTL_S = 0

HEADER_BYTES = 12
MAX_QUERY_BYTES = 1232
"""A question and its options take less; no answer of ours comes near (DNS flag day 2020)."""
MAX_CLIENTS = 32
IDLE_S = 5.0


class Names(Value):
    """Where answers come from: IPv4 addresses by names of VMs, names by addresses; None if there is none."""

    address: Callable[[str], str | None]
    name: Callable[[str], str | None]


class _Node(NamedTuple):
    """A place in a zone of ours and what is there; `records` is None where nothing is."""

    zone: dns.name.Name
    records: list[dns.rdata.Rdata] | None


def answer(query: bytes, names: Names) -> bytes | None:
    """Answer one message.

    Gives None for what must not be answered: a response, or two servers could keep each other busy for
    ever, and what is too short to have a header.
    """
    if len(query) < HEADER_BYTES or _flags(query) & dns.flags.QR:
        return None
    if dns.opcode.from_flags(_flags(query)) != dns.opcode.QUERY:
        return _bare(query, dns.rcode.NOTIMP)
    try:
        asked = dns.message.from_wire(query[: MAX_QUERY_BYTES + 1])
    except (dns.exception.DNSException, ValueError):
        return _bare(query, dns.rcode.FORMERR)
    if len(query) > MAX_QUERY_BYTES or len(asked.question) != 1:
        return _bare(query, dns.rcode.FORMERR)
    return _reply(asked, names).to_wire()


def _flags(message: bytes) -> int:
    return int.from_bytes(message[2:4], "big")


def _bare(query: bytes, rcode: dns.rcode.Rcode) -> bytes:
    """Refuse a message of which only the header was understood."""
    response = dns.message.Message(int.from_bytes(query[:2], "big"))
    response.flags = (_flags(query) & dns.flags.RD) | dns.flags.QR
    response.set_opcode(dns.opcode.from_flags(_flags(query)))
    response.set_rcode(rcode)
    return response.to_wire()


def _reply(query: dns.message.Message, names: Names) -> dns.message.Message:
    response = dns.message.make_response(query, our_payload=MAX_QUERY_BYTES)
    if query.edns > 0:
        response.set_rcode(dns.rcode.BADVERS)  # RFC 6891, section 6.1.3
        return response
    try:
        _fill(response, names)
    except Exception as error:
        logging.get().error("a name could not be looked up", exc_info=error)
        response.set_rcode(dns.rcode.SERVFAIL)
    return response


def _fill(response: dns.message.Message, names: Names) -> None:
    """Put in what is known. The question keeps its spelling: some resolvers check it, against forgers."""
    asked = response.question[0]
    node = _node(asked.name, names) if _is_about_data(asked) else None
    if node is None:
        response.set_rcode(dns.rcode.REFUSED)
        return
    response.flags |= dns.flags.AA
    if node.records is None:
        response.set_rcode(dns.rcode.NXDOMAIN)
    for record in node.records or []:
        if asked.rdtype in (record.rdtype, dns.rdatatype.ANY):
            response.answer.append(dns.rrset.from_rdata(asked.name, TTL_S, record))
    if not response.answer:
        response.authority.append(dns.rrset.from_rdata(node.zone, TTL_S, _record("SOA", START_OF_AUTHORITY)))


def _is_about_data(asked: dns.rrset.RRset) -> bool:
    """Tell an ordinary question from a transfer of the zone and other orders, and from other classes."""
    is_order = dns.rdatatype.is_metatype(asked.rdtype) and asked.rdtype != dns.rdatatype.ANY
    return asked.rdclass == dns.rdataclass.IN and not is_order


def _node(name: dns.name.Name, names: Names) -> _Node | None:
    """Find a name; None when it is in no zone of ours."""
    if name == ZONE:
        return _Node(ZONE, _authority())
    if name.is_subdomain(ZONE):
        address = _address(name, names)
        return _Node(ZONE, None if address is None else [_record("A", address)])
    if name.is_subdomain(REVERSE) and (vm := _vm_at(name, names)) is not None:
        # Whoever else has addresses of this network is not ours to deny: each VM's is a zone by itself.
        return _Node(name, [_record("PTR", f"{vm}.{ZONE}"), *_authority()])
    return None


def _address(name: dns.name.Name, names: Names) -> str | None:
    first, *above = name.relativize(ZONE).labels
    return names.address(first.decode("latin-1").lower()) if not above else None


def _vm_at(name: dns.name.Name, names: Names) -> str | None:
    try:
        return names.name(dns.reversename.to_address(name))
    except dns.exception.DNSException:
        return None


def _authority() -> list[dns.rdata.Rdata]:
    return [_record("SOA", START_OF_AUTHORITY), _record("NS", NAME_SERVER)]


def _record(kind: str, text: str) -> dns.rdata.Rdata:
    return dns.rdata.from_text("IN", kind, text)


class Server:
    """Answers over UDP and TCP, on the same port of 127.0.0.1."""

    def __init__(self, names: Names):
        self._names = names
        self._clients: set[asyncio.StreamWriter] = set()
        self._closing = contextlib.ExitStack()

    async def listen(self, port: int) -> int:
        """Start to answer, and give the port: any free one for 0. Raises OSError when it is taken."""
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as undo:
            streams = await asyncio.start_server(self._serve, HOST_ADDRESS, port, limit=MAX_QUERY_BYTES)
            undo.callback(streams.close)
            bound: int = streams.sockets[0].getsockname()[1]
            transport, _ = await loop.create_datagram_endpoint(
                lambda: _Datagrams(self._names), local_addr=(HOST_ADDRESS, bound)
            )
            undo.callback(transport.close)
            self._closing = undo.pop_all()
        return bound

    def close(self) -> None:
        """Stop to answer."""
        self._closing.close()
        for writer in list(self._clients):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer a client's questions one after another, for as long as it keeps asking."""
        if len(self._clients) >= MAX_CLIENTS:
            writer.transport.abort()
            return
        self._clients.add(writer)
        try:
            while await self._one(reader, writer):
                pass
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # it is slow, has gone away, or the server stops
        finally:
            self._clients.discard(writer)
            writer.transport.abort()  # close() would wait for a client that does not read

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Read a message after its length (RFC 1035, section 4.2.2) and answer it; tell if it was one."""
        async with asyncio.timeout(IDLE_S):
            length = int.from_bytes(await reader.readexactly(2), "big")
            if length > MAX_QUERY_BYTES:
                return False
            reply = answer(await reader.readexactly(length), self._names)
            if reply is not None:
                writer.write(len(reply).to_bytes(2, "big") + reply)
                await writer.drain()
            return reply is not None


class _Datagrams(asyncio.DatagramProtocol):
    """Answers each datagram with at most one."""

    def __init__(self, names: Names):
        self._names = names
        self._full = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        reply = answer(data, self._names)
        if reply is not None and not self._full:
            self._transport.sendto(reply, addr)

    def pause_writing(self) -> None:
        """Drop answers: those that wait, wait for a client that does not read."""
        self._full = True

    def resume_writing(self) -> None:
        """Answer again."""
        self._full = False
