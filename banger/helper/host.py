"""The parts of the host that root's handlers act on, each behind what they ask of it.

On a host they are the kernel; in tests of what is asked for they are records of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network

from banger.helper.disks import Disks
from banger.helper.jails import Jails
from banger.helper.net import Net
from banger.helper.requests import PRIVATE
from banger.helper.resolver import Resolver


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Everything that a handler can reach; and what bridges may have: root's choice, not their owners'."""

    net: Net
    disks: Disks
    jails: Jails
    resolver: Resolver
    networks: tuple[IPv4Network, ...] = PRIVATE


SEAMS = ("net", "disks", "jails", "resolver")
