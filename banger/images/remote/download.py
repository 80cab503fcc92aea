"""Get a file over HTTP: bounded, resumed after a break, and only from where it was asked for.

The way is a registry's (`wire`), with other rules for where it may lead: redirects lead neither from
https to http, nor from outside into this host's own networks. No password is sent to anyone.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import requests

from banger import layout
from banger.errors import (
    BangerError,
    Cancelled,
    DownloadFailed,
    InvalidImage,
    InvalidRequest,
    RegistryError,
    RegistryUnreachable,
    RegistryUntrusted,
)
from banger.images.remote import blobs, wire
from banger.images.remote.blobs import Blob, Body

INACTIVITY_S = 30.0
"""How long a server may send next to nothing."""

MIN_BYTES_S = 100
SMALL_S = 20.0
"""How long a small file may take as a whole."""

MAX_REDIRECTS = 5
RETRIES = 5
_LOOK_S = 0.1
_PROGRESS_S = 2.0
_CHUNK = 1 << 20
_BY_HAND = "Download it by hand if you trust where it leads, and name the file in a catalog of yours."

_T = TypeVar("_T")


def is_address(place: str) -> bool:
    """Tell whether a place is an address; else it is a path."""
    return re.match(r"https?://", place, re.IGNORECASE) is not None


def check_address(address: str, came_from: str | None = None) -> None:
    """Refuse an address that is not plainly http or https, or less safe than the one that led to it.

    Raises InvalidRequest.
    """
    try:
        parts = urlsplit(address)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if not sound or not address.isprintable() or re.search(r"[\s\\]", address):
        raise InvalidRequest(f"{address!r} is not an http or https address.")
    if parts.username is not None or parts.password is not None:
        raise InvalidRequest("An address with a user's name or password in it is not used.")
    if came_from is not None and parts.scheme == "http" and urlsplit(came_from).scheme == "https":
        raise InvalidRequest(f"{came_from!r} leads to {address!r}, which is not encrypted.")


def read(address: str, *, max_bytes: int, cancelled: Callable[[], bool] = lambda: False) -> bytes:
    """Give a small file's content. Raises DownloadFailed, InvalidRequest, Cancelled."""
    check_address(address)
    line = _line(address)

    def whole() -> bytes:
        with _opened(line, address, 0) as response:
            return b"".join(wire.bounded(wire.read(response, line), max_bytes + 1))

    data = _attend(line, whole, cancelled=cancelled, deadline=time.monotonic() + SMALL_S)
    if len(data) > max_bytes:
        raise DownloadFailed(f"{address!r} has more than {max_bytes} bytes.")
    return data


def fetch(
    address: str,
    into: Path,
    blob: Blob,
    *,
    origin: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Path:
    """Make it so that a file of known size and digest is in `into`, checked; give its path.

    `origin` is the address of who named it. What came before a break is not asked for again. Raises
    DownloadFailed or Cancelled (a beginning that helps is kept), InvalidImage when it is something else,
    InvalidRequest, DiskFull.
    """
    check_address(address, came_from=origin)
    line, board = _line(origin or address), _Board(blob.size, progress)

    @contextlib.contextmanager
    def opened(offset: int) -> Iterator[Body]:
        with _opened(line, address, offset) as response:
            start = _start(response, offset)
            length = response.headers.get("Content-Length", "")
            if re.fullmatch("[0-9]{1,18}", length) and start + int(length) != blob.size:
                raise RegistryUntrusted(f"It has {start + int(length)} bytes, not {blob.size}.")
            yield Body(start, wire.read(response, line))

    source = blobs.Source(read=opened, pause=line.pause, report=board.note, retries=RETRIES)
    try:
        blobs.check_room(into, blobs.missing(into, blob))
        return _attend(line, lambda: blobs.obtain(into, blob, source), cancelled=cancelled, board=board)
    except RegistryUntrusted as error:
        raise InvalidImage(f"{address!r} is refused: {error.message}", hint=_BY_HAND) from None


def copy(file: Path, into: Path, blob: Blob, *, cancelled: Callable[[], bool] = lambda: False) -> Path:
    """Make it so that a copy of a local file of known size and digest is in `into`, checked.

    Raises InvalidImage when it is something else, DownloadFailed when it is not there, Cancelled, DiskFull.
    """

    def pause(seconds: float) -> None:
        if cancelled():
            raise Cancelled
        time.sleep(seconds)

    @contextlib.contextmanager
    def opened(offset: int) -> Iterator[Body]:
        if not file.is_file():  # a FIFO would be waited for
            raise DownloadFailed(f"There is no file {str(file)!r}.", hint="Is the path right?")
        with file.open("rb") as content:
            size = os.fstat(content.fileno()).st_size
            if size != blob.size:
                raise RegistryUntrusted(f"It has {size} bytes, not {blob.size}.")
            content.seek(offset)
            yield Body(offset, _chunks(content.read, pause))

    source = blobs.Source(read=opened, pause=pause, report=lambda _: None, retries=0)
    try:
        blobs.check_room(into, blobs.missing(into, blob))
        return blobs.obtain(into, blob, source)
    except RegistryError as error:
        raise InvalidImage(f"{str(file)!r} is refused: {error.message}") from None


class _Policy(wire.Policy):
    """Where a download may lead: not from https to http, and not from outside to inside."""

    def __init__(self, first: str):
        parts = urlsplit(first)
        self.host = parts.hostname or ""
        self.plain = parts.scheme == "http"

    @functools.cached_property
    def _inside_too(self) -> bool:
        return _is_inside(self.host)

    def check_url(self, url: str) -> None:
        """Refuse a URL that must not be asked; raises RegistryUntrusted."""
        try:
            check_address(url, came_from=None if self.plain else f"https://{self.host}")
        except InvalidRequest as error:
            raise RegistryUntrusted(error.message) from None

    def check_address(self, host: str, address: str) -> None:
        """Refuse an address that a host's name resolves to; raises RegistryUntrusted."""
        if not _is_public(address) and not self._inside_too:
            raise RegistryUntrusted(f"{host!r} is inside this host's own network, where nothing led before.")


class _Board:
    """How much is here: noted by the one who fetches, told by the one who looks after him."""

    def __init__(self, size: int, progress: Callable[[str], None]):
        self._size, self._progress = size, progress
        self._have, self._told = 0, time.monotonic()

    def note(self, have: int) -> None:
        """Note how many bytes are here."""
        self._have = have

    def tell(self) -> None:
        """Tell it, at most every two seconds."""
        if time.monotonic() - self._told >= _PROGRESS_S:
            self._told = time.monotonic()
            self._progress(f"{layout.size(self._have)} of {layout.size(self._size)}")


def _line(first: str) -> wire.Wire:
    return wire.Wire(_Policy(first), inactivity_s=INACTIVITY_S, min_bytes_s=MIN_BYTES_S)


def _attend(
    line: wire.Wire,
    work: Callable[[], _T],
    *,
    cancelled: Callable[[], bool],
    deadline: float = float("inf"),
    board: _Board | None = None,
) -> _T:
    """Have work done in a thread, and cut its wire when it is silent, late, or not wanted any more."""
    with ThreadPoolExecutor(1, thread_name_prefix="download") as worker:
        future = worker.submit(work)
        try:
            while not wait([future], timeout=_LOOK_S).done:
                if board is not None:
                    board.tell()
                if (reason := _reason_to_cut(line, cancelled, deadline)) is not None:
                    line.interrupt(reason)
                    break
        except BaseException:  # what the caller's own functions raise
            line.interrupt(Cancelled())
            raise
        return _outcome(future)


def _reason_to_cut(line: wire.Wire, cancelled: Callable[[], bool], deadline: float) -> BangerError | None:
    if cancelled():
        return Cancelled()
    if time.monotonic() > deadline:
        return DownloadFailed(f"{line.policy.host} did not send it in time.")
    if line.slow():
        return DownloadFailed(f"{line.policy.host} sent next to nothing for {line.inactivity_s:g} s.")
    return None


def _outcome(future: Future[_T]) -> _T:
    """Give what the work gave, its failures in this room's words."""
    try:
        return future.result()
    except RegistryUnreachable as error:
        raise DownloadFailed(error.message) from None


@contextlib.contextmanager
def _opened(line: wire.Wire, address: str, offset: int) -> Iterator[requests.Response]:
    """Ask for a file from an offset on, following redirects."""
    with requests.Session() as session:
        session.trust_env = False  # the adapter knows the user's proxy; logins in ~/.netrc are not sent
        session.max_redirects = MAX_REDIRECTS
        for scheme in ("http://", "https://"):
            session.mount(scheme, wire.Adapter(line))
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
        try:
            response = session.get(address, headers=headers, stream=True)
        except (requests.RequestException, ValueError) as error:  # plain ones for a redirect that is no URL
            line.check()
            raise _told(line.policy.host, error) from None
        with response:
            _judge(response, line.policy.host)
            yield response


def _told(host: str, error: Exception) -> RegistryError:
    if isinstance(error, requests.TooManyRedirects):
        return RegistryUntrusted(f"{host} redirects more than {MAX_REDIRECTS} times.")
    if isinstance(error, ValueError):  # what requests says of an address or header it cannot use
        return RegistryUntrusted(f"{host} points to an address that is none.")
    return RegistryUnreachable(f"{host} cannot be reached: {wire.tell(error)}.")


def _judge(response: requests.Response, host: str) -> None:
    """Raise what an answer's status means, unless it is the thing itself."""
    status = response.status_code
    if status in (200, 206):
        return
    if status in (408, 429) or status >= 500:
        raise RegistryUnreachable(f"{host} answers {status} just now.")
    raise DownloadFailed(f"{host} answers {status}.", hint="Is the address right?")


def _start(response: requests.Response, offset: int) -> int:
    """Tell where in its file an answer begins (RFC 9110, section 14.4)."""
    if response.status_code != 206:
        return 0
    found = re.match(r"bytes ([0-9]{1,18})-", response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != offset:
        raise RegistryUntrusted("It was answered with another part than was asked for.")
    return offset


def _chunks(take: Callable[[int], bytes], pause: Callable[[float], None]) -> Iterator[bytes]:
    while chunk := take(_CHUNK):
        pause(0)
        yield chunk


def _is_inside(host: str) -> bool:
    """Tell whether a host is in this host's own networks, by asking for its addresses."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return not all(_is_public(str(address[0])) for *_, address in found)


def _is_public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        found = found.ipv4_mapped or found.sixtofour or found
    return found.is_global and not found.is_multicast
