"""The name server answers what it should, and nothing that is sent to it keeps it from doing so."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.query
import dns.rcode
import dns.resolver
import pytest

from banger.network import dns as server
from banger.network.user import HOST_ADDRESS

PAGE = Path(__file__).parents[2] / "docs/dns.md"
SBIN = "/usr/sbin:/usr/bin"
ANSWERED_S = 5.0
START_OF_AUTHORITY = "vm. 0 IN SOA localhost. nobody.invalid. 1 3600 1200 604800 0"


class Asked:
    """A server in a thread of its own, and what it is told of VMs."""

    def __init__(self) -> None:
        self.addresses = {"web": "172.16.0.2", "x" * 63: "172.16.255.254"}
        names = server.Names(address=self._address, name=self._name)
        self.server = server.Server(names)
        self.loop = asyncio.new_event_loop()
        self.port = self.loop.run_until_complete(self.server.listen(0))
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def _address(self, name: str) -> str | None:
        return self.addresses.get(name)

    def _name(self, address: str) -> str | None:
        return next((name for name, other in self.addresses.items() if other == address), None)

    def close(self) -> None:
        """Stop, and let every client's task end."""
        asyncio.run_coroutine_threadsafe(self._close(), self.loop).result(ANSWERED_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _close(self) -> None:
        self.server.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        if rest:
            await asyncio.wait(rest)

    def ask(
        self, name: str, kind: str = "A", *, tcp: bool = False, edns: int | None = None, rdclass: str = "IN"
    ) -> dns.message.Message:
        """Send one question and take its answer."""
        query = dns.message.make_query(name, kind, rdclass)
        query.use_edns(edns)
        return self.send(query, tcp=tcp)

    def send(self, query: dns.message.Message, *, tcp: bool = False) -> dns.message.Message:
        """Send a message and take its answer, of the same id and question."""
        way = dns.query.tcp if tcp else dns.query.udp
        return way(query, HOST_ADDRESS, port=self.port, timeout=ANSWERED_S)

    def raw(self, *datagrams: bytes) -> list[bytes]:
        """Send datagrams, then a question; give what came back before its answer."""
        last = dns.message.make_query("web.vm", "A")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(ANSWERED_S)
            sock.connect((HOST_ADDRESS, self.port))
            for datagram in (*datagrams, last.to_wire()):
                sock.send(datagram)
            answers: list[bytes] = []
            while True:
                answer = sock.recv(65535)
                if last.is_response(dns.message.from_wire(answer)):
                    return answers
                answers.append(answer)

    def connect(self) -> socket.socket:
        """Connect over TCP."""
        return socket.create_connection((HOST_ADDRESS, self.port), timeout=ANSWERED_S)


@pytest.fixture
def asked() -> Iterator[Asked]:
    with contextlib.closing(Asked()) as asked:
        yield asked


def dig(asked: Asked, *words: str) -> str:
    command = ["dig", "+tries=1", "+time=5", f"@{HOST_ADDRESS}", "-p", str(asked.port), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def shown(answer: dns.message.Message) -> tuple[str, bool, list[str], list[str]]:
    """Tell an answer's code, whether it claims authority, its answers and its authorities."""
    return (
        dns.rcode.to_text(answer.rcode()),
        bool(answer.flags & dns.flags.AA),
        sorted(line for rrset in answer.answer for line in rrset.to_text().splitlines()),
        [rrset.to_text() for rrset in answer.authority],
    )


@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
def test_a_resolver_finds_a_vm(asked: Asked, tcp: bool) -> None:
    """A resolver gets a VM's address by name and its name by address, and learns which name there is not."""
    resolver = dns.resolver.Resolver(configure=False)
    resolver.nameservers, resolver.port = [HOST_ADDRESS], asked.port
    assert [record.to_text() for record in resolver.resolve("web.vm", tcp=tcp)] == ["172.16.0.2"]
    assert [str(record) for record in resolver.resolve_address("172.16.0.2", tcp=tcp)] == ["web.vm."]
    with pytest.raises(dns.resolver.NXDOMAIN):
        resolver.resolve("nosuch.vm", tcp=tcp)
    with pytest.raises(dns.resolver.NoAnswer):
        resolver.resolve("web.vm", "AAAA", tcp=tcp)


@pytest.mark.parametrize("way", ["+notcp", "+tcp"])
def test_dig_finds_a_vm(asked: Asked, way: str) -> None:
    """BIND's dig, with the cookie and the EDNS options that it sends, gets an authoritative answer."""
    assert dig(asked, way, "+short", "web.vm") == "172.16.0.2\n"
    assert dig(asked, way, "+short", "-x", "172.16.0.2") == "web.vm.\n"
    whole = dig(asked, way, "nosuch.vm")
    assert "status: NXDOMAIN" in whole
    assert re.search(r"^;; flags: qr aa rd; ", whole, re.MULTILINE)
    assert re.search(r"^vm\.\s+0\s+IN\s+SOA\s", whole, re.MULTILINE)
    assert "WARNING: recursion requested but not available" in whole


@pytest.mark.parametrize(
    ("name", "kind", "code", "answers", "authorities"),
    [
        ("web.vm", "A", "NOERROR", ["web.vm. 0 IN A 172.16.0.2"], []),
        ("web.vm", "ANY", "NOERROR", ["web.vm. 0 IN A 172.16.0.2"], []),
        ("web.vm", "AAAA", "NOERROR", [], [START_OF_AUTHORITY]),
        ("web.vm", "TYPE65", "NOERROR", [], [START_OF_AUTHORITY]),
        ("web.vm", "SOA", "NOERROR", [], [START_OF_AUTHORITY]),
        ("nosuch.vm", "A", "NXDOMAIN", [], [START_OF_AUTHORITY]),
        ("nosuch.vm", "AAAA", "NXDOMAIN", [], [START_OF_AUTHORITY]),
        ("www.web.vm", "A", "NXDOMAIN", [], [START_OF_AUTHORITY]),
        (r"we\.b.vm", "A", "NXDOMAIN", [], [START_OF_AUTHORITY]),
        (r"\000\255'\;--.vm", "A", "NXDOMAIN", [], [START_OF_AUTHORITY]),
        ("vm", "SOA", "NOERROR", [START_OF_AUTHORITY], []),
        ("vm", "NS", "NOERROR", ["vm. 0 IN NS localhost."], []),
        ("vm", "A", "NOERROR", [], [START_OF_AUTHORITY]),
        ("2.0.16.172.in-addr.arpa", "PTR", "NOERROR", ["2.0.16.172.in-addr.arpa. 0 IN PTR web.vm."], []),
        ("2.0.16.172.in-addr.arpa", "A", "NOERROR", [], [f"2.0.16.172.in-addr.arpa{START_OF_AUTHORITY[2:]}"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
def test_a_name_of_ours_is_answered(
    asked: Asked, name: str, kind: str, code: str, answers: list[str], authorities: list[str], tcp: bool
) -> None:
    """A name below `vm` and the address of a VM get an authoritative answer, the empty ones with the SOA."""
    assert shown(asked.ask(name, kind, tcp=tcp)) == (code, True, answers, authorities)


@pytest.mark.parametrize(
    ("name", "kind", "rdclass"),
    [
        (".", "NS", "IN"),
        ("example.com", "A", "IN"),
        ("web", "A", "IN"),
        ("web.vm.example", "A", "IN"),
        ("webvm", "A", "IN"),
        ("3.0.16.172.in-addr.arpa", "PTR", "IN"),
        ("1.2.0.16.172.in-addr.arpa", "PTR", "IN"),
        ("02.0.16.172.in-addr.arpa", "PTR", "IN"),
        ("16.172.in-addr.arpa", "SOA", "IN"),
        ("vm", "AXFR", "IN"),
        ("vm", "IXFR", "IN"),
        ("vm", "MAILB", "IN"),
        ("version.bind", "TXT", "CH"),
        ("web.vm", "A", "CH"),
        ("web.vm", "A", "ANY"),
    ],
)
def test_what_is_not_ours_is_refused(asked: Asked, name: str, kind: str, rdclass: str) -> None:
    """Other zones, other classes and orders to transfer the zone get REFUSED, and no data."""
    query = dns.message.make_query(name, "A", rdclass)
    query.question[0].rdtype = dns.rdatatype.from_text(kind)
    assert shown(asked.send(query)) == ("REFUSED", False, [], [])


def test_case_does_not_matter_and_is_kept(asked: Asked) -> None:
    """A question in any spelling is answered in that spelling, to the byte: resolvers hide a secret in it."""
    query = dns.message.make_query("WeB.vM", "A")
    (reply,) = asked.raw(query.to_wire())
    assert b"\x03WeB\x02vM\x00" in reply
    assert shown(dns.message.from_wire(reply)) == ("NOERROR", True, ["WeB.vM. 0 IN A 172.16.0.2"], [])
    assert dns.message.from_wire(reply).answer[0].name.labels[0] == b"WeB"


def test_an_answer_is_never_old(asked: Asked) -> None:
    """A VM that was made, moved or deleted a moment ago is answered as it is now."""
    assert asked.ask("new.vm").rcode() == dns.rcode.NXDOMAIN
    for address in ("172.16.0.9", "172.16.0.10"):
        asked.addresses["new"] = address
        assert shown(asked.ask("new.vm"))[2] == [f"new.vm. 0 IN A {address}"]
    del asked.addresses["new"]
    assert asked.ask("new.vm").rcode() == dns.rcode.NXDOMAIN


def test_extensions_are_tolerated(asked: Asked) -> None:
    """EDNS with options that nobody knows is answered with EDNS, and a version that is none with BADVERS."""
    query = dns.message.make_query("web.vm", "A")
    query.use_edns(
        0, dns.flags.DO, 4096, options=[dns.edns.GenericOption(dns.edns.OptionType(65001), b"x" * 200)]
    )
    reply = asked.send(query)
    assert (reply.rcode(), reply.edns, reply.payload) == (dns.rcode.NOERROR, 0, server.MAX_QUERY_BYTES)
    assert asked.ask("web.vm").edns == -1
    later = asked.ask("web.vm", edns=1)
    assert (later.rcode(), later.edns, later.answer) == (dns.rcode.BADVERS, 0, [])


def test_the_longest_answer_fits_a_datagram(asked: Asked) -> None:
    """No question makes an answer that would be cut off at the 512 bytes of RFC 1035."""
    longest = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 58, "vm."])
    assert len(dns.name.from_text(longest).to_digestable()) == 255
    for name in (longest, f"{'x' * 63}.vm", "254.255.16.172.in-addr.arpa"):
        for kind in ("A", "PTR", "ANY"):
            query = dns.message.make_query(name, kind)
            query.use_edns(0)
            (reply,) = asked.raw(query.to_wire())
            assert len(reply) <= 512


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        b"\0\0\0\0\0\0\0\0",
        b"\0\2\0\0\0\0\0\0\1a\2vm\0\0\1\0\1\1a\2vm\0\0\1\0\1",
        b"\0\1\0\0\0\0\0\0\1a\2vm\0\0\1\0\1junk",
        b"\0\1\0\0\0\0\0\0\xc0\x0c\0\1\0\1",
        b"\0\1\0\0\0\0\0\0\x40web\0\0\1\0\1",
        b"\0\1\0\0\0\0\0\0\1a\2vm\0\0\1",
        b"\0\1\0\0\0\0\0\2\1a\2vm\0\0\1\0\1" + b"\0\0\x29\4\0\0\0\0\0\0\0" * 2,
        b"\0\1\0\0\0\0\0\1\1a\2vm\0\0\1\0\1\0\0\x29\4\0\0\0\0\0\4\xd0\xfd\xe9\4\xcc" + b"x" * 1228,
    ],
    ids=["cut off", "no question", "two", "more after it", "loop", "label", "short", "two OPT", "too long"],
)  # fmt: skip
def test_garbage_is_told_apart(asked: Asked, rest: bytes) -> None:
    """What cannot be read is answered with FORMERR, its id, its RD bit and nothing else."""
    header = b"\x12\x34\1\0" + (rest or b"\0\1\0\0\0\0\0\0")
    assert asked.raw(header) == [b"\x12\x34\x81\1" + bytes(8)]


@pytest.mark.parametrize("opcode", [n for n in range(16) if n != dns.opcode.QUERY])
def test_other_orders_are_not_implemented(asked: Asked, opcode: int) -> None:
    """Every opcode but QUERY is answered with NOTIMP, whatever follows its header."""
    (reply,) = asked.raw(bytes([0, 7, opcode << 3, 0]) + b"\xff" * 20)
    assert reply == bytes([0, 7, 0x80 | opcode << 3, 4]) + bytes(8)


def test_an_answer_is_not_answered(asked: Asked) -> None:
    """Responses, with which two servers could keep each other busy for ever, and stumps stay unanswered."""
    query = dns.message.make_query("web.vm", "A").to_wire()
    response = bytes([*query[:2], query[2] | 0x80, *query[3:]])
    assert asked.raw(response, response[:12], b"", query[:11], bytes([0, 1, 0xFF, 0xFF]) + bytes(8)) == []


def test_a_failing_look_up_is_told(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the log cannot be asked the answer is SERVFAIL, and the next one is right again."""
    addresses, asked.addresses = asked.addresses, None  # type: ignore[assignment]
    assert shown(asked.ask("web.vm"))[:3] == ("SERVFAIL", False, [])
    asked.addresses = addresses
    assert asked.ask("web.vm").rcode() == dns.rcode.NOERROR
    assert "a name could not be looked up" in capsys.readouterr().out


def test_random_datagrams_do_no_harm(asked: Asked) -> None:
    """After each hundred of 20,000 datagrams of noise and of damaged questions a question is answered."""
    rng = random.Random(5353)
    good = dns.message.make_query("web.vm", "A", use_edns=0).to_wire()

    def noise() -> bytes:
        if rng.random() < 0.3:
            return rng.randbytes(rng.randrange(1500))
        damaged = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        return bytes(damaged[: rng.randrange(len(damaged)) if rng.random() < 0.3 else None])

    answers = 0
    for _ in range(200):
        answers += len(asked.raw(*(noise() for _ in range(100))))
    assert 5_000 < answers <= 20_000
    assert shown(asked.ask("web.vm"))[2] == ["web.vm. 0 IN A 172.16.0.2"]


def closed(sock: socket.socket) -> bool:
    """Tell whether the other end closes, without a word, in time."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_client_may_ask_again(asked: Asked) -> None:
    """Several questions in one TCP connection, sent at once and in pieces, are answered in their order."""
    queries = [dns.message.make_query(name, "A") for name in ("web.vm", "nosuch.vm", "web.vm")]
    sent = b"".join(len(wire).to_bytes(2, "big") + wire for wire in (query.to_wire() for query in queries))
    with asked.connect() as sock:
        for n in range(0, len(sent), 7):
            sock.sendall(sent[n : n + 7])
        codes = [dns.query.receive_tcp(sock)[0].rcode() for _ in queries]
    assert codes == [dns.rcode.NOERROR, dns.rcode.NXDOMAIN, dns.rcode.NOERROR]


@pytest.mark.parametrize(
    "sent", [b"\xff\xff", b"\x04\xd1" + b"x" * 100, b"\0\0", b"\0\x0c\0\0\x80" + bytes(9)]
)
def test_a_message_that_is_none_ends_the_connection(asked: Asked, sent: bytes) -> None:
    """Over TCP, a message that is too long is not read, and a response or a stump is not answered."""
    with asked.connect() as sock:
        sock.sendall(sent)
        assert closed(sock)


@pytest.mark.parametrize("sent", [b"", b"\0", b"\0\x20abc"])
def test_an_idle_client_is_shown_out(asked: Asked, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection on which no whole question arrives in time is closed."""
    monkeypatch.setattr(server, "IDLE_S", 0.1)
    with asked.connect() as sock:
        sock.sendall(sent)
        assert closed(sock)


def test_a_client_that_does_not_read_is_shown_out(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that nobody takes do not pile up: the connection is closed when they have waited too long."""
    monkeypatch.setattr(server, "IDLE_S", 0.5)
    # Real answers are so short that it takes seconds to fill the kernel's buffers with them.
    monkeypatch.setattr(server, "answer", lambda *_: bytes(60_000))
    many = b"\0\x0c............" * 1_000_000
    with socket.socket() as sock:
        sock.settimeout(30)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((HOST_ADDRESS, asked.port))
        with pytest.raises(ConnectionError):
            sock.sendall(many)


def test_clients_are_bounded(asked: Asked) -> None:
    """One connection too many is closed at once, datagrams are served, and a place given up is had again."""
    with contextlib.ExitStack() as held:
        first, *_ = [held.enter_context(asked.connect()) for _ in range(server.MAX_CLIENTS)]
        with asked.connect() as refused:
            assert closed(refused)
        assert asked.ask("web.vm").rcode() == dns.rcode.NOERROR
        with pytest.raises((EOFError, ConnectionError)):
            asked.ask("web.vm", tcp=True)
        first.sendall(b"\xff\xff")
        assert closed(first)
        assert asked.ask("web.vm", tcp=True).rcode() == dns.rcode.NOERROR


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_a_port_that_is_taken_is_left_alone(kind: socket.SocketKind) -> None:
    """Where either half of the port is taken OSError is raised, and the other half is free as before."""
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind((HOST_ADDRESS, 0))
        if kind is socket.SOCK_STREAM:
            taken.listen()
        port = taken.getsockname()[1]
        names = server.Names(address=lambda _: None, name=lambda _: None)
        with pytest.raises(OSError):
            asyncio.run(server.Server(names).listen(port))
        other = socket.SOCK_DGRAM if kind is socket.SOCK_STREAM else socket.SOCK_STREAM
        with socket.socket(socket.AF_INET, other) as free:
            free.bind((HOST_ADDRESS, port))


def recipe(heading: str, *, port: int) -> str:
    """Give the first block of code below a heading of the documentation, for another port."""
    section = PAGE.read_text("utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    block = re.search(r"^```\w+\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert block is not None
    assert "42069" in block[1]
    return block[1].replace("42069", str(port))


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind((HOST_ADDRESS, 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], ready: str) -> Iterator[None]:
    """Run a resolver in the foreground until it has said that it is ready, and end it after the block."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = []
            while ready not in (line := process.stderr.readline()):
                lines.append(line)
                assert line, lines
            yield
        finally:
            process.terminate()
            process.communicate()


def dnsmasq(config: str, directory: Path, port: int) -> list[str]:
    file = directory / "dnsmasq.conf"
    file.write_text(f"stop-dns-rebind\n{config}")
    words = f"--no-daemon --no-resolv --no-hosts --bind-interfaces --listen-address={HOST_ADDRESS} --user="
    return ["dnsmasq", f"--conf-file={file}", f"--port={port}", *words.split(), "--pid-file="]


def unbound(config: str, directory: Path, port: int) -> list[str]:
    file = directory / "unbound.conf"
    alone = {
        "directory": str(directory),
        "interface": HOST_ADDRESS,
        "port": str(port),
        "private-address": "172.16.0.0/12",
        "use-syslog": "no",
        **dict.fromkeys(("chroot", "username", "pidfile"), "''"),
    }
    lines = [f"    {key}: {value}\n" for key, value in alone.items()]
    file.write_text(f"server:\n{''.join(lines)}{config}")
    return ["unbound", "-d", "-v", "-c", str(file)]


@pytest.mark.parametrize(
    ("program", "command", "ready"),
    [("dnsmasq", dnsmasq, "started"), ("unbound", unbound, "start of service")],
    ids=["dnsmasq", "unbound"],
)
def test_a_documented_recipe_works(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, command: object, ready: str
) -> None:
    """A resolver that is set up as documented, and distrusts private addresses, gives those of VMs."""
    monkeypatch.setenv("PATH", SBIN, prepend=":")
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    assert callable(command)
    port = free_port()
    with running(command(recipe(program, port=asked.port), tmp_path, port), ready):
        words = ["dig", "+tries=1", "+time=5", f"@{HOST_ADDRESS}", "-p", str(port), "+comments"]
        found = subprocess.run([*words, "+short", "web.vm"], capture_output=True, text=True, check=True)
        assert found.stdout.splitlines()[-1:] == ["172.16.0.2"]
        nothing = subprocess.run([*words, "nosuch.vm"], capture_output=True, text=True, check=True)
        assert "status: NXDOMAIN" in nothing.stdout
