"""QEMU's user-mode network: the plan of its addresses, the guest's MAC, the host's port.

The plan is libslirp's default (qemu(1), -netdev user). Each guest has a network of its own, so
all of them have the same address.
"""

from __future__ import annotations

import hashlib
import secrets
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

from banger.errors import HostLacks

GUEST_ADDRESS = "10.0.2.15"
PREFIX_LENGTH = 24
GATEWAY = "10.0.2.2"
DNS_SERVER = "10.0.2.3"
HOST_ADDRESS = "127.0.0.1"

# Below these are the ports of registered services.
LOWEST_PORT = 20_000
HIGHEST_PORT = 65_535
EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOCALLY_ADMINISTERED = 0x02


def mac(vm: str) -> str:
    """Derive a VM's MAC address: locally administered, unicast (IEEE 802, section 8.4)."""
    digest = hashlib.sha256(vm.encode()).digest()
    return ":".join(f"{byte:02x}" for byte in (LOCALLY_ADMINISTERED, *digest[:5]))


def pick_port(taken: Collection[int]) -> int:
    """Pick a TCP port of 127.0.0.1 that is neither in `taken` nor in use.

    It is outside of the range from which the kernel gives ports to outgoing connections, so that
    none of them takes it while the VM is stopped. Raises HostLacks when all are in use.
    """
    ports = [port for port in _range() if port not in taken]
    for port in _from_anywhere(ports):
        if _is_free(port):
            return port
    raise HostLacks("Every port that a VM could use is taken.", hint="`ss -tln` shows who listens.")


def _range() -> range:
    """Give the ports below the ephemeral ones, above them where there are none below."""
    low, high = (int(number) for number in EPHEMERAL_RANGE.read_text("ascii").split())
    if low > LOWEST_PORT:
        return range(LOWEST_PORT, low)
    if high < HIGHEST_PORT:
        return range(high + 1, HIGHEST_PORT + 1)
    return range(LOWEST_PORT, HIGHEST_PORT + 1)


def _from_anywhere(ports: list[int]) -> Iterator[int]:
    """Walk round from a random place: two owners on one host seldom want the same port at once."""
    start = secrets.randbelow(len(ports)) if ports else 0
    yield from ports[start:]
    yield from ports[:start]


def _is_free(port: int) -> bool:
    """Try to bind; without SO_REUSEADDR, which lets two sockets that do not listen yet share a port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((HOST_ADDRESS, port))
        except OSError:
            return False
        return True
