"""Talk to the agent in the guest: lines over a virtio-serial port, a unix socket on this side.

QEMU keeps what is written until the guest opens the port, so `hello` may be sent before there is a
guest; the agent answers `ready` when the SSH server listens.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

from banger.errors import Cancelled, GuestSilent, ProgramFailed

LOOK_S = 0.25
"""How often a wait looks whether it was cancelled or the VMM is gone; the answer itself wakes it."""

MAX_ANSWER = 4096


def wait_ready(
    path: Path,
    timeout_s: float,
    *,
    cancelled: Callable[[], bool],
    alive: Callable[[], bool],
    report: Callable[[], str],
) -> None:
    """Wait until the guest says that it is ready.

    Raises GuestSilent after `timeout_s` seconds, ProgramFailed with `report()` when `alive()` turns
    false, Cancelled when `cancelled()` turns true.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        try:
            channel.settimeout(LOOK_S)
            channel.connect(str(path))
        except OSError:
            raise ended(report()) from None
        hear_ready(channel, timeout_s, cancelled=cancelled, alive=alive, report=report)


def hear_ready(
    channel: socket.socket,
    timeout_s: float,
    *,
    cancelled: Callable[[], bool],
    alive: Callable[[], bool],
    report: Callable[[], str],
) -> None:
    """Ask the agent at the other end of a channel until it says that it is ready; see `wait_ready`."""
    deadline = time.monotonic() + timeout_s
    channel.settimeout(LOOK_S)
    try:
        channel.sendall(b"hello\n")
    except OSError:
        raise ended(report()) from None
    heard = b""
    while b"ready\n" not in heard:
        try:
            piece = channel.recv(MAX_ANSWER)
        except TimeoutError:
            piece = None
        except OSError:
            piece = b""
        if piece == b"" or not alive():
            raise ended(report())
        heard = (heard + (piece or b""))[-MAX_ANSWER:]
        if cancelled():
            raise Cancelled
        if time.monotonic() >= deadline:
            raise silent(timeout_s, report())


def silent(timeout_s: float, report: str) -> GuestSilent:
    """Make the error for a guest that did not become ready in time."""
    return GuestSilent(
        f"The guest did not say that it is ready within {timeout_s:g} s. {_brief(report)}",
        hint="`banger vm logs` shows its console; ready_timeout_s in config.toml is the wait.",
    )


def ended(report: str) -> ProgramFailed:
    """Make the error for a VMM that ended before its guest was ready."""
    return ProgramFailed(f"The VMM ended before the guest was ready. {_brief(report)}".rstrip())


def _brief(report: str) -> str:
    lines = [line for line in report.splitlines() if line.strip()]
    return f"It said: {lines[-1][:200]}" if lines else ""
