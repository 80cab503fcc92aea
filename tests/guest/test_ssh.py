"""Waiting for a guest's SSH server, with servers of the tests' own in its place."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from banger import config
from banger.errors import Cancelled, GuestSilent, ProgramFailed
from banger.guest import ssh

GREETING = b"SSH-2.0-dropbear_2022.83\r\n"


@contextlib.contextmanager
def serving(port: int, says: bytes, after_s: float = 0.0) -> Iterator[None]:
    """Listen on a port after a while, and say this to whoever connects."""
    over = threading.Event()

    def serve() -> None:
        time.sleep(after_s)
        with socket.create_server(("127.0.0.1", port)) as server:
            server.settimeout(0.05)
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(says)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture
def wait(dirs: config.Dirs) -> Callable[..., None]:
    """Wait for a server at a port of 127.0.0.1."""

    def wait_for(port: int, timeout_s: float = 10.0, *, alive: bool = True, cancelled: bool = False) -> None:
        target = ssh.Target(vm="vm-00000001", port=port, paths=dirs.vm("vm-00000001"), key=dirs.user_key)
        ssh.wait_ready(
            target,
            timeout_s,
            cancelled=lambda: cancelled,
            alive=lambda: alive,
            report=lambda: "Kernel panic",
        )

    return wait_for


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        found: int = server.getsockname()[1]
    return found


def test_a_server_that_comes_late_is_heard(port: int, wait: Callable[..., None]) -> None:
    """Nobody listens at first, as while a guest boots; the greeting ends the wait."""
    with serving(port, GREETING, after_s=0.4):
        began = time.monotonic()
        wait(port)
        assert 0.4 <= time.monotonic() - began < 5


def test_another_server_is_not_taken_for_it(port: int, wait: Callable[..., None]) -> None:
    """What listens there and does not greet as an SSH server is waited out."""
    with serving(port, b"HTTP/1.1 400 Bad Request\r\n"), pytest.raises(GuestSilent):
        wait(port, 0.6)


def test_an_ended_vmm_ends_the_wait(port: int, wait: Callable[..., None]) -> None:
    """It is told with the last that it said."""
    with pytest.raises(ProgramFailed, match="Kernel panic"):
        wait(port, alive=False)


def test_a_wait_can_be_cancelled(port: int, wait: Callable[..., None]) -> None:
    with pytest.raises(Cancelled):
        wait(port, cancelled=True)
