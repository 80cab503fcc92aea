"""Reaching a guest's port, against devices that do all that a device may do."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from banger.errors import BangerError, Cancelled, GuestSilent, ProgramFailed, WrongState
from banger.vmm import vsock


@contextmanager
def device(answer: bytes, *, hang_up: bool = False) -> Iterator[vsock.Dial]:
    """Make a device that takes one connection and answers it."""
    client, server = socket.socketpair()

    def serve() -> None:
        server.settimeout(5)
        assert server.recv(100) == b"CONNECT 1024\n"
        server.sendall(answer)
        if hang_up:
            server.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield lambda: client
    finally:
        thread.join(10)
        server.close()


def test_what_the_guest_says_first_is_left_in_the_socket() -> None:
    """The device's line is read and not a byte more, even when the guest's words come with it."""
    with device(b"OK 1073741824\nready\n") as dial, vsock.connect(dial, 1024, 5) as connection:
        assert connection.recv(100) == b"ready\n"


@pytest.mark.parametrize(
    ("answer", "hang_up", "error"),
    [
        (b"", True, WrongState),
        (b"OK", True, WrongState),
        (b"OK x\n", False, WrongState),
        (b"NO 1024\n", False, WrongState),
        (b"\xff" * 100, False, WrongState),
        (b"OK 10", False, GuestSilent),
    ],
)
def test_another_answer_is_an_error(answer: bytes, hang_up: bool, error: type[BangerError]) -> None:
    """A device that hangs up, talks nonsense or says half a line gives no connection."""
    with device(answer, hang_up=hang_up) as dial, pytest.raises(error):
        vsock.connect(dial, 1024, 0.3)


def nobody() -> socket.socket:
    raise WrongState("Firecracker is not running.")


def test_waiting_for_a_guest_ends() -> None:
    """At the deadline, when the VMM is gone, and when the wait is cancelled."""
    start = time.monotonic()
    with pytest.raises(GuestSilent):
        vsock.wait_connected(nobody, 1024, 0.3, cancelled=lambda: False, alive=lambda: True)
    with pytest.raises(WrongState):
        vsock.wait_connected(nobody, 1024, 30, cancelled=lambda: False, alive=lambda: False)
    with pytest.raises(Cancelled):
        vsock.wait_connected(nobody, 1024, 30, cancelled=lambda: True, alive=lambda: True)
    assert time.monotonic() - start < 5


def test_an_agent_that_never_comes_is_told_of_as_ever() -> None:
    """Its errors are those of the other channel: a silent guest, a VMM that ended, a cancelled wait."""
    agent = vsock.Agent(lambda _: nobody())
    for cancelled, alive, error in (
        (False, True, GuestSilent),
        (False, False, ProgramFailed),
        (True, True, Cancelled),
    ):
        with pytest.raises(error) as caught:
            agent.wait_ready(
                Path("/s"),
                0.3,
                cancelled=lambda cancelled=cancelled: cancelled,  # type: ignore[misc]
                alive=lambda alive=alive: alive,  # type: ignore[misc]
                report=lambda: "the last line",
            )
        assert "the last line" in str(caught.value) or error is Cancelled
