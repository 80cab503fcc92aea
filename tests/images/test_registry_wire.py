"""TLS, addresses, and connections that somebody else cuts."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from banger.errors import Cancelled, RegistryError, RegistryUnreachable, RegistryUntrusted
from banger.images.remote import reference, registry, wire
from tests.images import hostile
from tests.images.hostile import Server

# Resolves to 127.0.0.1 and is no loopback address to look at: a registry somewhere in the network.
NAME = "127.1"
DATA = b"layer" * 1000


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for NAME that signs itself, in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "pem"
    pkcs8, open_key = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, pkcs8, open_key)
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def secure(certificate: Path) -> Iterator[Server]:
    """A server that speaks TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with Server(tls=context) as started:
        yield started


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's certificate store has the server's certificate."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))


def pull(server: Server, place: Path, limits: registry.Limits | None = None) -> list[bytes]:
    name = f"{NAME}:{server.server_port}/x:1"
    found = registry.pull(name, place, environ={"HOME": "/nonexistent"}, limits=limits)
    return [layer.path.read_bytes() for layer in found.layers]


@pytest.mark.usefixtures("trusted")
def test_a_registry_is_spoken_to_over_tls(secure: Server, tmp_path: Path) -> None:
    """With a certificate that the host trusts, and wherever it is: the user has named it."""
    secure.image(DATA)
    assert pull(secure, tmp_path) == [DATA]


def test_a_certificate_that_nobody_trusts_is_told(secure: Server, tmp_path: Path) -> None:
    """The reason is in the sentence, and nothing was asked."""
    secure.image(DATA)
    with pytest.raises(RegistryUnreachable, match="certificate is not valid"):
        pull(secure, tmp_path)
    assert secure.asked == []


def test_a_registry_without_tls_is_not_spoken_to(tmp_path: Path) -> None:
    """Off this machine there is no falling back to plain HTTP."""
    with Server() as plain:
        plain.image(DATA)
        with pytest.raises(RegistryUnreachable, match="TLS"):
            pull(plain, tmp_path)
        assert plain.asked == []


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(
    "url", ["http://{host}/x", "https://{host}/x", "https://localhost/x", "https://127.2/x"]
)
def test_a_registry_elsewhere_cannot_point_to_this_host(secure: Server, tmp_path: Path, url: str) -> None:
    """A redirect to loopback, in any spelling, by a registry that is not there itself, is not followed."""
    (path,) = secure.image(DATA)
    with Server() as inner:
        secure.answers[path] = hostile.redirect(url.format(host=inner.host))
        with pytest.raises(RegistryUntrusted, match="not followed"):
            pull(secure, tmp_path)
        assert inner.asked == []


@pytest.mark.usefixtures("trusted")
def test_a_login_is_not_sent_in_the_clear(secure: Server, tmp_path: Path) -> None:
    """A redirect and a realm on the registry's own host are not followed from https to http."""
    (path,) = secure.image(DATA)
    url = f"http://{NAME}:{secure.server_port}/x"
    secure.answers[path] = hostile.redirect(url)
    with pytest.raises(RegistryUntrusted, match="not encrypted"):
        pull(secure, tmp_path)
    secure.answers["/v2/x/manifests/1"] = hostile.challenged(f'Bearer realm="{url}"', "x", hostile.missing)
    with pytest.raises(RegistryUntrusted, match="not encrypted"):
        pull(secure, tmp_path)


@pytest.mark.usefixtures("trusted")
def test_a_silent_tls_connection_is_cut(secure: Server, tmp_path: Path) -> None:
    """Cancelling wakes a worker that sleeps inside TLS."""
    (path,) = secure.image(DATA)
    secure.answers[path] = hostile.held(DATA, 100)
    part = tmp_path / "sha256" / f"{path.rpartition(':')[2]}.part"
    begun = time.monotonic()
    with pytest.raises(Cancelled):
        registry.pull(
            f"{NAME}:{secure.server_port}/x:1",
            tmp_path,
            environ={"HOME": "/nonexistent"},
            cancelled=lambda: part.exists() and part.stat().st_size == 100,
        )
    assert time.monotonic() - begun < 2


def new_wire(name: str = "registry.example/x") -> wire.Wire:
    return wire.Wire(wire.Policy(reference.parse(name)), inactivity_s=30, min_bytes_s=1024)


def test_a_connection_that_is_being_made_is_cut() -> None:
    """A host that answers nothing does not hold a pull that is to end: full backlogs look like that."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(address)
        line = new_wire(f"127.0.0.1:{address[1]}/x")
        threading.Timer(0.3, line.interrupt, [Cancelled()]).start()
        begun = time.monotonic()
        with pytest.raises(Cancelled):
            line.dial("127.0.0.1", address[1], direct=True)
        assert 0.2 < time.monotonic() - begun < 2


def test_a_cut_wire_stays_cut() -> None:
    """The first reason counts, also for what begins later."""
    line = new_wire()
    line.interrupt(Cancelled("first"))
    line.interrupt(RegistryError("second"))
    for later in (line.check, lambda: line.pause(10), lambda: line.dial("127.0.0.1", 1, direct=False)):
        with pytest.raises(Cancelled, match="first"):
            later()


INNER = """0.0.0.0 10.0.0.1 100.64.0.1 127.0.0.1 169.254.169.254 172.16.0.1 192.0.0.1 192.168.0.1 198.18.0.1
224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 :: ::1 fc00::1 fe80::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1
64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 2002:7f00:1:: 2002:a00:1:: 2001:db8::1""".split()
OUTER = "1.1.1.1 9.9.9.9 172.32.0.1 2606:4700::1111 ::ffff:1.1.1.1 64:ff9b::101:101".split()


@pytest.mark.parametrize("address", INNER)
def test_no_inner_address_is_connected_to(address: str) -> None:
    """Whatever name it has: a redirect of a public registry, and one of a loopback registry beyond it."""
    with pytest.raises(RegistryUntrusted):
        new_wire().policy.check_address("cdn.example.com", address)
    found = ipaddress.ip_address(address)
    if not (found.is_loopback or "7f00" in address or "127.0.0.1" in address):
        with pytest.raises(RegistryUntrusted):
            new_wire("localhost/x").policy.check_address("cdn.example.com", address)


@pytest.mark.parametrize("address", OUTER)
def test_public_addresses_are_connected_to(address: str) -> None:
    """Where registries keep their blobs, also when this machine's registry is a mirror of one."""
    for name in ("registry.example/x", "localhost/x"):
        new_wire(name).policy.check_address("cdn.example.com", address)


def test_a_named_registry_may_be_anywhere_and_a_plain_one_only_here() -> None:
    """The host that the user named may be inner; spoken to without TLS it must be this machine."""
    new_wire("registry.corp/x").policy.check_address("registry.corp", "10.0.0.1")
    with pytest.raises(RegistryUntrusted):
        new_wire("localhost/x").policy.check_address("localhost", "10.0.0.1")
    with pytest.raises(RegistryUntrusted):
        new_wire("localhost/x").policy.check_address("localhost", "1.1.1.1")


class Proxy(socketserver.ThreadingTCPServer):
    """The user's own HTTP proxy (RFC 9110, section 9.3.6); keeps what it was asked to connect to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.asked: list[str] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class Tunnel(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        words = self.rfile.readline().decode().split()
        while self.rfile.readline().strip():
            pass
        assert isinstance(self.server, Proxy)
        self.server.asked.append(" ".join(words[:2]))
        host, _, port = words[1].rpartition(":")
        with socket.create_connection((host, int(port))) as there:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=copy, args=(there, self.request))
            back.start()
            copy(self.request, there)
            back.join()


def copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.mark.usefixtures("trusted")
def test_the_users_proxy_is_used_and_not_for_loopback(
    secure: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registry elsewhere is reached through HTTPS_PROXY; one on loopback directly, whatever is set."""
    (path,) = secure.image(DATA)
    with Proxy() as proxy, Server() as local:
        for name in ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_address[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        assert pull(secure, tmp_path / "a") == [DATA]
        assert set(proxy.asked) == {f"CONNECT {NAME}:{secure.server_port}"}
        secure.answers[path] = hostile.redirect("https://169.254.169.254/x")
        with pytest.raises(RegistryUntrusted):
            pull(secure, tmp_path / "b")
        assert not any("169.254" in asked for asked in proxy.asked)
        before = len(proxy.asked)
        local.image(DATA)
        registry.pull(f"{local.host}/x:1", tmp_path / "c", environ={"HOME": "/nonexistent"})
        assert len(proxy.asked) == before
