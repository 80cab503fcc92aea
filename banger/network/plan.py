"""A bridge's addresses: the host has the first, each VM the one that its number gives.

Everything follows from a network and one integer, so an address is decided, and recorded, before
anything is made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from itertools import chain

from banger.errors import HostLacks
from banger.network import user

FIRST = 2
"""What a network's address and the host's own come before."""

mac = user.mac


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a guest is told: its address, how long its network's prefix is, and who leads out of it."""

    address: IPv4Address
    prefix_length: int
    gateway: IPv4Address


def room(network: IPv4Network) -> int:
    """Tell how many VMs a network has addresses for."""
    return max(0, network.num_addresses - FIRST - 1)


def place(network: IPv4Network, index: int) -> Place:
    """Give the place with this number, 0 to `room(network)` - 1; else raise ValueError."""
    if not 0 <= index < room(network):
        raise ValueError(f"{network} has no place {index}")
    return Place(address=network[FIRST + index], prefix_length=network.prefixlen, gateway=network[1])


def index_of(network: IPv4Network, address: IPv4Address) -> int:
    """Give the number of the place that has this address: the other way round from `place`."""
    return int(address) - int(network[FIRST])


def pick_index(network: IPv4Network, vm: str, taken: Collection[int]) -> int:
    """Pick a number for the VM with this id that is not in `taken`; raises HostLacks when there is none.

    It is the next free one after a number that follows from the id: a VM gets the same address at
    each start, and one that was just given back, which others' neighbour tables may still have, is
    seldom another VM's next.
    """
    size = room(network)
    start = int.from_bytes(hashlib.sha256(vm.encode()).digest()[:8]) % size if size else 0
    used = set(taken)
    for index in chain(range(start, size), range(start)):
        if index not in used:
            return index
    raise HostLacks(
        f"Every address of {network} is taken.", hint="Give the bridge a larger network, or delete some VMs."
    )
