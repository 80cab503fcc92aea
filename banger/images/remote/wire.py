"""The one way to a registry's network: where it may lead, how long it may be silent, how it is stopped.

Every request goes through `Adapter`, each hop of a redirect and each request for a token too. What it may
reach is decided twice: by its URL before it is sent, and by the address before it is connected to, so a
name that resolves to an inner address leads nowhere, however late it does.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from banger.errors import BangerError, RegistryUnreachable, RegistryUntrusted
from banger.images.remote.reference import Reference, is_loopback, split_host

CONNECT_S = 10.0
ANSWER_BYTES = 1 << 20
CHUNK = 1 << 18
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
BREAKS = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)
"""What a connection that breaks while a body is read raises."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Policy:
    """Where a pull may lead: to the registry that the user named, and from there to public hosts over TLS.

    A registry on this machine's loopback may also lead to others there; plain HTTP goes nowhere else.
    """

    def __init__(self, reference: Reference):
        self.host = split_host(reference.registry)
        self.plain = reference.plain

    def check_url(self, url: str) -> None:
        """Refuse a URL that must not be asked; raises RegistryUntrusted."""
        try:
            parts = urlsplit(url)
            host = (parts.hostname or "").lower()
        except ValueError:
            raise self._astray("a malformed address") from None
        if parts.scheme != "https" and not (parts.scheme == "http" and self.plain and is_loopback(host)):
            raise self._astray(f"{parts.scheme}://{host}, which is not encrypted")
        with contextlib.suppress(ValueError):
            self.check_address(host, host)

    def check_address(self, host: str, address: str) -> None:
        """Refuse an address that a host's name resolves to; raises RegistryUntrusted.

        The user has named the registry's own host, wherever that is.
        """
        found = _unwrap(ipaddress.ip_address(address))
        if self.plain:
            allowed = found.is_loopback or (host != self.host and _is_public(found))
        else:
            allowed = host == self.host or _is_public(found)
        if not allowed:
            raise self._astray(f"{host}, which is inside this host's own network")

    def _astray(self, where: str) -> RegistryUntrusted:
        return RegistryUntrusted(f"{self.host} points to {where}: not followed.")


def _is_public(address: Address) -> bool:
    return address.is_global and not address.is_multicast


def _unwrap(address: Address) -> Address:
    """Give the IPv4 address inside an IPv6 one (mapped, 6to4, NAT64), where there is one."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


class Stretch:
    """A time in which bytes are awaited: when it began, how many came since, and when the last did."""

    def __init__(self) -> None:
        self.since = self.last = time.monotonic()
        self.bytes = 0

    def came(self, count: int) -> None:
        """Count what came in."""
        self.bytes += count
        self.last = time.monotonic()

    def slow(self, now: float, inactivity_s: float, min_bytes_s: int) -> bool:
        """Tell whether it was silent for so long, or too slow for so long; begin anew when it was neither."""
        if now - self.last >= inactivity_s:
            return True
        if now - self.since < inactivity_s:
            return False
        enough = self.bytes >= min_bytes_s * inactivity_s
        self.since, self.bytes = now, 0
        return not enough


class Wire:
    """The connections of one pull, which another thread may look at and cut."""

    def __init__(self, policy: Policy, *, inactivity_s: float, min_bytes_s: int):
        self.policy = policy
        self.inactivity_s = inactivity_s
        self.min_bytes_s = min_bytes_s
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._stretches: set[Stretch] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._reason: BangerError | None = None

    def interrupt(self, reason: BangerError) -> None:
        """Cut all connections, now and from now on; `check` raises the first reason given."""
        with self._lock:
            self._reason = self._reason or reason
            self._stopped.set()
            sockets = list(self._sockets)
        for sock in sockets:
            # Not close(): another thread sleeps in recv() on it, and is woken by this. The base
            # class's: an SSLSocket's own would take its TLS away from under that thread.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def check(self) -> None:
        """Raise the reason for which the wire was cut, if it was."""
        if self._reason is not None:
            raise self._reason

    def pause(self, seconds: float) -> None:
        """Wait, but not longer than until the wire is cut; then raise the reason."""
        self._stopped.wait(seconds)
        self.check()

    @contextlib.contextmanager
    def awaiting(self) -> Iterator[Stretch]:
        """Wait for bytes under the eyes of `slow`; count what comes in the stretch given."""
        stretch = Stretch()
        with self._lock:
            self._stretches.add(stretch)
        try:
            yield stretch
        finally:
            with self._lock:
                self._stretches.discard(stretch)

    def slow(self) -> bool:
        """Tell whether something that is awaited is silent, or came too slowly for as long."""
        now = time.monotonic()
        with self._lock:
            awaited = list(self._stretches)
        return any(stretch.slow(now, self.inactivity_s, self.min_bytes_s) for stretch in awaited)

    def watch(self, sock: socket.socket) -> None:
        """Let `interrupt` cut this socket too; raise the reason when it has been there already."""
        with self._lock:
            self._sockets.add(sock)
        self.check()

    def dial(self, host: str, port: int, *, direct: bool) -> socket.socket:
        """Connect to the first address of a host that answers; `direct`: not to the user's own proxy.

        Raises RegistryUnreachable, or RegistryUntrusted when one of its addresses is not allowed.
        """
        host = host.strip("[]").lower()
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise RegistryUnreachable(f"{host} cannot be found: {tell(error)}.") from None
        if direct:
            for *_, address in found:
                self.policy.check_address(host, str(address[0]).partition("%")[0])
        return self._connect(host, found)

    def _connect(self, host: str, found: list[Any]) -> socket.socket:
        reason = "it has no address"
        for family, kind, protocol, _, address in found:
            sock = socket.socket(family, kind, protocol)
            try:
                self.watch(sock)
                sock.settimeout(CONNECT_S)
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except BaseException as error:
                sock.close()
                self.check()
                if not isinstance(error, OSError):
                    raise
                reason = tell(error)
            else:
                return sock
        raise RegistryUnreachable(f"{host} cannot be reached: {reason}.")


def tell(error: BaseException) -> str:
    """Say what broke in a few words. An exception's own text may hold a signed URL, so it is not used."""
    root: BaseException | None = error
    while root is not None:
        if isinstance(root, ssl.SSLCertVerificationError):
            return f"its certificate is not valid ({root.verify_message})"
        if isinstance(root, ssl.SSLError):
            return f"TLS fails ({root.reason})"
        if isinstance(root, TimeoutError | urllib3.exceptions.TimeoutError):
            return "it does not answer in time"
        if isinstance(root, OSError) and root.strerror:
            return root.strerror
        inner = [arg for arg in (getattr(root, "reason", None), *root.args) if isinstance(arg, BaseException)]
        root = inner[0] if inner else root.__cause__ or root.__context__
    return "the connection broke"


class Adapter(HTTPAdapter):
    """requests' way to the network, led over a wire: each hop is checked, bounded, and can be cut."""

    def __init__(self, wire: Wire):
        self._wire = wire
        self._pools = _pools(wire)
        # What the host's own certificate store trusts is trusted too; it takes 50 ms to load.
        self._tls: dict[str, Any] = {} if wire.policy.plain else {"ssl_context": ssl.create_default_context()}
        super().__init__(max_retries=0)

    def init_poolmanager(self, *words: Any, **more: Any) -> None:
        """Make connections ours."""
        more.update(self._tls)
        super().init_poolmanager(*words, **more)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **more: Any) -> Any:
        """Make connections to the user's proxy ours, too."""
        manager = super().proxy_manager_for(proxy, **self._tls, **more)
        manager.pool_classes_by_scheme = self._pools
        return manager

    def send(
        self, request: requests.PreparedRequest, stream: bool = False, *_: Any, verify: Any = True, **__: Any
    ) -> requests.Response:
        """Send one request, if it may go there; its answer is read later only when it is a wanted body."""
        wire, url = self._wire, request.url or ""
        wire.check()
        wire.policy.check_url(url)
        # A session that trusts the environment would also send logins of ~/.netrc, to any host.
        proxies = {} if is_loopback(urlsplit(url).hostname or "") else get_environ_proxies(url)
        # Who looks at `slow` ends what is silent; the socket's own timeout is for when nobody does.
        timeout = (CONNECT_S, 2 * wire.inactivity_s)
        with wire.awaiting():
            response = super().send(request, stream=True, timeout=timeout, verify=verify, proxies=proxies)
        if not stream or response.status_code not in (200, 206):
            # requests would read all of it, however much: a redirect's body, an error's, a token's.
            whole = b"".join(bounded(read(response, wire), ANSWER_BYTES))
            response.close()
            response.raw = io.BytesIO(whole)
        return response


def read(response: requests.Response, wire: Wire) -> Iterator[bytes]:
    """Give a body as it comes in, undecoded; raises RegistryUnreachable when the connection breaks."""
    try:
        with wire.awaiting() as stretch:
            while chunk := response.raw.read1(CHUNK, decode_content=False):
                wire.check()
                stretch.came(len(chunk))
                yield chunk
    except BREAKS as error:
        wire.check()
        raise RegistryUnreachable(f"The connection to {wire.policy.host} broke: {tell(error)}.") from None
    wire.check()  # a socket that was shut down ends like a body of unknown length


def bounded(chunks: Iterator[bytes], limit: int) -> Iterator[bytes]:
    """Pass on at most `limit` bytes and no chunk after; what is beyond is not read."""
    for chunk in chunks:
        yield chunk[:limit]
        limit -= len(chunk)
        if limit <= 0:
            return


def _pools(wire: Wire) -> dict[str, type[HTTPConnectionPool]]:
    """Make urllib3's pools for each scheme, with connections that are dialled by the wire."""

    class Plain(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return wire.dial(self.host, self.port, direct=self.proxy is None)

    class Secure(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return wire.dial(self.host, self.port, direct=self.proxy is None)

        def connect(self) -> None:
            super().connect()
            wire.watch(self.sock)  # TLS has put another socket in the place of the one that was dialled

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}
