"""Reach a port in a Firecracker guest through the unix socket of its vsock device.

Firecracker's docs/vsock.md, "Host-Initiated Connections": connect, say `CONNECT <port>`, read
`OK <the host's port>`. It hangs up when nobody listens in the guest, and its socket is there before
the guest is.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

from banger.errors import Cancelled, GuestSilent, WrongState
from banger.guest import agent

AGENT_PORT = 1024
"""Where the agent listens in the guest; ports below are for its root, as with TCP."""

GUEST_CID = 3
"""Firecracker's guests have a vsock of their own each, so all may have the lowest id that is free."""

LONGEST_GREETING = 32
LOOK_AGAIN_S = 0.1

Dial = Callable[[], socket.socket]
"""Connects to the device's socket: by its path, or through root's helper. Raises WrongState, TimedOut."""


def connect(dial: Dial, port: int, timeout_s: float) -> socket.socket:
    """Connect to a port in the guest; what is read next is the guest's.

    Raises WrongState when nobody listens there, GuestSilent after `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    connection = dial()
    try:
        connection.settimeout(timeout_s)
        connection.sendall(b"CONNECT %d\n" % port)
        heard = b""
        # Byte by byte: what follows the line is no longer Firecracker's, and must be left in the socket.
        while not heard.endswith(b"\n") and len(heard) < LONGEST_GREETING:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            if not (byte := connection.recv(1)):
                break
            heard += byte
        word, _, number = heard.rstrip(b"\n").partition(b" ")
        if word == b"OK" and number.isdigit():
            return connection
        raise WrongState(f"Nobody listens at port {port} in the guest.")
    except TimeoutError:
        connection.close()
        raise GuestSilent(f"The guest did not take the connection within {timeout_s:g} s.") from None
    except OSError:
        connection.close()
        raise WrongState(f"Nobody listens at port {port} in the guest.") from None
    except BaseException:
        connection.close()
        raise


def wait_connected(
    dial: Dial, port: int, timeout_s: float, *, cancelled: Callable[[], bool], alive: Callable[[], bool]
) -> socket.socket:
    """Connect as soon as somebody listens at the port, which a guest that boots does not yet.

    Raises GuestSilent after `timeout_s` seconds, WrongState when `alive()` turns false, Cancelled when
    `cancelled()` turns true.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise GuestSilent(f"Nobody listened at port {port} in the guest within {timeout_s:g} s.")
        try:
            return connect(dial, port, left)
        except WrongState:
            if not alive():
                raise
        if cancelled():
            raise Cancelled
        time.sleep(min(LOOK_AGAIN_S, left))


class Agent:
    """Hears the guest's agent through vsock, as `banger.guest.agent` does through virtio-serial.

    `connect` connects to a device's socket, given the VM's `VmPaths.agent`.
    """

    def __init__(self, connect: Callable[[Path], socket.socket]):
        self._connect = connect

    def wait_ready(
        self,
        path: Path,
        timeout_s: float,
        *,
        cancelled: Callable[[], bool],
        alive: Callable[[], bool],
        report: Callable[[], str],
    ) -> None:
        """Wait until the guest says that it is ready; see `banger.guest.agent.wait_ready`."""
        start = time.monotonic()
        try:
            channel = wait_connected(
                lambda: self._connect(path), AGENT_PORT, timeout_s, cancelled=cancelled, alive=alive
            )
        except WrongState:
            raise agent.ended(report()) from None
        except GuestSilent:
            raise agent.silent(timeout_s, report()) from None
        with channel:
            left = max(0.0, timeout_s - (time.monotonic() - start))
            agent.hear_ready(channel, left, cancelled=cancelled, alive=alive, report=report)
