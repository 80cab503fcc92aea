"""The control socket's client against servers that misbehave; the real QEMU is in test_contract."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from banger.errors import BangerError, ProgramFailed, TimedOut, WrongState
from banger.vmm import qmp

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\n'
NEGOTIATED = b'{"return": {}}\n'


@contextmanager
def server(path: Path, *answers: bytes, hang_up: bool = False) -> Iterator[None]:
    """Serve one client: the first answer at once, each further one when it has asked."""

    def serve() -> None:
        client, _ = listener.accept()
        with client:
            client.settimeout(5)
            with suppress(OSError):  # the client may have had enough
                client.sendall(answers[0])
                for answer in answers[1:]:
                    client.recv(65536)
                    client.sendall(answer)
            if not hang_up:
                done.wait(10)

    done = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(10)


def ask(path: Path, timeout_s: float = 5.0) -> object:
    with qmp.connect(path, timeout_s) as control:
        return control.execute("query-status")


def test_events_are_not_answers(tmp_path: Path) -> None:
    """An event that arrives before the answer is passed over, even in pieces."""
    with server(
        tmp_path / "s", GREETING, NEGOTIATED, b'{"event": "STOP"}\n{"return": {"status": "paused"}}\n'
    ):
        assert ask(tmp_path / "s") == {"status": "paused"}


def test_a_refusal_tells_why(tmp_path: Path) -> None:
    """QEMU's own words are in the error."""
    refusal = b'{"error": {"class": "GenericError", "desc": "no such thing"}}\n'
    with (
        server(tmp_path / "s", GREETING, NEGOTIATED, refusal),
        pytest.raises(ProgramFailed, match="no such thing"),
    ):
        ask(tmp_path / "s")


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ((b"",), TimedOut),
        ((b"{",), TimedOut),
        ((GREETING,), TimedOut),
        ((b"hello\n",), ProgramFailed),
        ((b"[1]\n",), ProgramFailed),
        ((b"\xff\xfe\n",), ProgramFailed),
        ((b"{}\n",), ProgramFailed),
    ],
)
def test_a_strange_server_is_an_error_in_time(
    tmp_path: Path, answers: tuple[bytes, ...], error: type[BangerError]
) -> None:
    """Silence, half a line and nonsense each end in an error before the deadline is long past."""
    start = time.monotonic()
    with server(tmp_path / "s", *answers), pytest.raises(error):
        ask(tmp_path / "s", timeout_s=0.3)
    assert time.monotonic() - start < 3


def test_an_endless_answer_is_cut(tmp_path: Path) -> None:
    """A line beyond 1 MiB is refused instead of filling the memory."""
    endless = b"x" * (3 << 20)
    with server(tmp_path / "s", endless), pytest.raises(ProgramFailed, match="longer"):
        ask(tmp_path / "s")


def test_drops_of_an_answer_do_not_move_the_deadline(tmp_path: Path) -> None:
    """A server that sends a byte now and then is left at the deadline all the same."""

    def drip() -> None:
        client, _ = listener.accept()
        with client:
            while not done.wait(0.05):
                try:
                    client.sendall(b" ")
                except OSError:
                    return

    done = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        thread = threading.Thread(target=drip)
        thread.start()
        start = time.monotonic()
        with pytest.raises(TimedOut):
            ask(tmp_path / "s", timeout_s=0.4)
        assert time.monotonic() - start < 2
        done.set()
        thread.join(5)


def test_a_hang_up_means_that_nothing_runs(tmp_path: Path) -> None:
    """QEMU that ends, or was never there, is told apart from one that is silent."""
    with pytest.raises(WrongState):
        ask(tmp_path / "s")
    with server(tmp_path / "s", GREETING, hang_up=True), pytest.raises(WrongState):
        ask(tmp_path / "s")


def test_a_second_client_waits_its_turn_in_vain(tmp_path: Path) -> None:
    """While another client has the server, connecting ends at the deadline."""
    with (
        server(tmp_path / "s", GREETING, NEGOTIATED),
        qmp.connect(tmp_path / "s", 5),
        pytest.raises(TimedOut),
    ):
        ask(tmp_path / "s", timeout_s=0.2)
