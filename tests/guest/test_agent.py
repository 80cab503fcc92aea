import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from banger.errors import Cancelled, GuestSilent, ProgramFailed
from banger.guest import agent


@contextmanager
def channel(path: Path, play: Callable[[socket.socket], None]) -> Iterator[None]:
    """Be a VMM's end of the channel, with `play` for a guest."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as client:
                play(client)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


def wait(path: Path, timeout_s: float = 5.0, *, cancelled: bool = False) -> None:
    agent.wait_ready(
        path, timeout_s, cancelled=lambda: cancelled, alive=lambda: True, report=lambda: "a\nout of paper\n"
    )


def until_closed(client: socket.socket) -> None:
    while client.recv(100):
        pass


def test_ready_is_heard_in_pieces_and_after_noise(short_path: Path) -> None:
    """The word may come in any number of pieces, behind an answer to somebody else."""

    def play(client: socket.socket) -> None:
        assert client.recv(100) == b"hello\n"
        for piece in (b"pong\nre", b"ad", b"y\n"):
            client.sendall(piece)
            time.sleep(0.02)

    with channel(short_path / "a", play):
        wait(short_path / "a")


def test_a_vmm_that_ends_is_told_at_once(short_path: Path) -> None:
    """A hang-up ends the wait, with the last thing that was said."""
    began = time.monotonic()
    with (
        channel(short_path / "a", lambda _: None),
        pytest.raises(ProgramFailed, match="out of paper"),
    ):
        wait(short_path / "a", 60.0)
    assert time.monotonic() - began < 2


def test_no_vmm_at_all_is_told_at_once(short_path: Path) -> None:
    """A channel that is not there is an error, not a wait."""
    with pytest.raises(ProgramFailed):
        wait(short_path / "a", 60.0)


def test_a_silent_guest_has_a_deadline(short_path: Path) -> None:
    """A guest that says nothing is given up, in a way that is worth another try."""
    with channel(short_path / "a", until_closed), pytest.raises(GuestSilent) as caught:
        wait(short_path / "a", 0.3)
    assert caught.value.retry


def test_a_wait_can_be_cancelled(short_path: Path) -> None:
    """Cancelling ends the wait long before the deadline."""
    with channel(short_path / "a", until_closed), pytest.raises(Cancelled):
        wait(short_path / "a", 60.0, cancelled=True)
