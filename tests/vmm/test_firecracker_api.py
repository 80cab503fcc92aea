"""The API's client against servers that misbehave; one that behaves is in test_firecracker."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from banger.errors import BangerError, ProgramFailed, TimedOut, WrongState
from banger.vmm import firecracker_api
from banger.vmm.firecracker_api import Api, parse_version

VERSION = b'{"firecracker_version": "1.7.0"}'
GOOD = b"HTTP/1.1 200 \r\nContent-Length: %d\r\n\r\n%s" % (len(VERSION), VERSION)
EMPTY = b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"


@contextmanager
def served(*answers: bytes, hang_up: bool = False, timeout_s: float = 5.0) -> Iterator[Api]:
    """Give a client whose server sends one answer for each request."""

    def serve() -> None:
        with server, suppress(OSError):  # the client may have had enough
            server.settimeout(5)
            for answer in answers:
                asked = server.recv(65536)
                if b"Content-Length" in asked and asked.endswith(b"\r\n\r\n"):  # its body comes by itself
                    server.recv(65536)
                server.sendall(answer)
            if not hang_up:
                done.wait(10)

    client, server = socket.socketpair()
    done = threading.Event()
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with firecracker_api.using(client, timeout_s) as api:
            yield api
    finally:
        done.set()
        thread.join(10)


def test_one_connection_serves_many_requests() -> None:
    """Answers with and without a body keep the connection, which may come from elsewhere, as a descriptor."""
    with served(GOOD, EMPTY, GOOD) as api:
        assert api.version() == (1, 7, 0)
        api.pause()
        assert api.version() == (1, 7, 0)


def test_a_refusal_tells_why() -> None:
    """Firecracker's own words, and which request they are about, are in the error."""
    body = b'{"fault_message": "no such luck"}'
    refusal = b"HTTP/1.1 400 \r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with served(refusal) as api, pytest.raises(ProgramFailed, match=r"PUT /actions: no such luck"):
        api.start()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", TimedOut),
        (b"HTTP/1.1", TimedOut),
        (b"HTTP/1.1 200 \r\nContent-Length: 500\r\n\r\n{", TimedOut),
        (b"hello\r\n\r\n", ProgramFailed),
        (b"HTTP/1.1 200 \r\nContent-Length: 3\r\n\r\n\xff{}", ProgramFailed),
        (b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{}", ProgramFailed),
        (b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n[]", ProgramFailed),
        (b"HTTP/1.1 400 \r\nContent-Length: 3\r\n\r\n\xff\xfe\xfd", ProgramFailed),
        (b"HTTP/1.1 200 \r\nX: " + b"x" * 70000 + b"\r\n\r\n", ProgramFailed),
        (b"HTTP/1.1 200 \r\nContent-Length: 3000000\r\n\r\n" + b" " * 3000000, ProgramFailed),
    ],
)
def test_a_strange_server_is_an_error_in_time(answer: bytes, error: type[BangerError]) -> None:
    """Silence, half an answer, an endless one and nonsense each end in an error before the deadline."""
    start = time.monotonic()
    with served(answer, timeout_s=0.5) as api, pytest.raises(error):
        api.version()
    assert time.monotonic() - start < 3


def test_drops_of_an_answer_do_not_move_the_deadline() -> None:
    """A server that sends a byte now and then is left at the deadline all the same."""

    def drip() -> None:
        with server, suppress(OSError):
            while not done.wait(0.05):
                server.sendall(b"H")

    client, server = socket.socketpair()
    done = threading.Event()
    thread = threading.Thread(target=drip)
    thread.start()
    start = time.monotonic()
    with firecracker_api.using(client, 0.4) as api, pytest.raises(TimedOut):
        api.version()
    assert time.monotonic() - start < 2
    done.set()
    thread.join(5)


@pytest.mark.parametrize("ask", [Api.version, Api.start, Api.pause])
def test_a_hang_up_means_that_nothing_runs(ask: Callable[[Api], object]) -> None:
    """A Firecracker that ends while it is asked is told apart from one that is silent or refuses."""
    with served(GOOD, hang_up=True) as api:
        api.version()
        with pytest.raises(WrongState):
            ask(api)


def test_nobody_at_the_socket(tmp_path: Path) -> None:
    """Where nobody listens, nothing runs."""
    with pytest.raises(WrongState):
        firecracker_api.connect(tmp_path / "s", 1)


@pytest.mark.parametrize(
    ("text", "version"), [("1.7.0", (1, 7, 0)), ("v1.10.1", (1, 10, 1)), ("1.17.0-dev", (1, 17, 0))]
)
def test_versions_are_read(text: str, version: tuple[int, int, int]) -> None:
    """A release, a tag and a build between two releases."""
    assert parse_version(text) == version


@pytest.mark.parametrize("text", ["", "1.7", "seven", "1.7.0.1", "1.99999.0", "None"])
def test_what_is_no_version_is_refused(text: str) -> None:
    """Nothing is guessed from half a version."""
    with pytest.raises(ProgramFailed):
        parse_version(text)
