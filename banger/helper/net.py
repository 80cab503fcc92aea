"""The host's network, as root's handlers see it: each method is one effect on the kernel, or one listing.

What the kernel refuses is raised as OSError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """An interface: `kind` as in `ip -d link` ("bridge", "tun"), `master` the index of its bridge."""

    index: int
    name: str
    kind: str | None
    mac: str | None
    alias: str | None
    master: int | None
    up: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """An address and the index of the interface that has it."""

    link: int
    address: IPv4Interface


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A network and the index of the interface that leads there; None for a route that leads nowhere."""

    link: int | None
    network: IPv4Network


@dataclass(frozen=True, slots=True, kw_only=True)
class Masquerade:
    """What a VM sends out by the egress gets the host's address."""

    comment: str
    address: IPv4Address
    egress: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardOut:
    """What a VM sends out by the egress is let through."""

    comment: str
    bridge: str
    address: IPv4Address
    egress: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardIn:
    """What answers a VM is let through, and nothing that begins outside."""

    comment: str
    bridge: str
    address: IPv4Address
    egress: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardFrom:
    """Whatever else would be forwarded from a bridge is dropped."""

    comment: str
    bridge: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardTo:
    """Whatever else would be forwarded to a bridge is dropped."""

    comment: str
    bridge: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardHost:
    """What a bridge sends to the host by IPv6 is dropped: a guest could advertise itself as its router."""

    comment: str
    bridge: str


Wanted = Masquerade | ForwardOut | ForwardIn | GuardFrom | GuardTo | GuardHost
"""Every rule there is; what goes into one is an interface's name, an address and a comment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule that is there; its handle is unique in the table and not used again."""

    handle: int
    chain: str
    comment: str | None


class Net(Protocol):
    """The interfaces, addresses, routes and rules of this host, and what may be done to them."""

    def link(self, name: str) -> Link | None:
        """Give the interface with this name, if there is one."""

    def links(self) -> list[Link]:
        """List all interfaces."""

    def addresses(self) -> list[Located]:
        """List all IPv4 addresses."""

    def routes(self) -> list[Route]:
        """List all IPv4 routes, of all tables; a default route is 0.0.0.0/0."""

    def resolvers(self) -> list[IPv4Address]:
        """List the servers that this host asks for names."""

    def default_egress(self) -> str | None:
        """Name the interface of the best default route of the main table, if there is one."""

    def forwards(self) -> bool:
        """Tell whether this host forwards IPv4 (net.ipv4.ip_forward)."""

    def make_bridge(self, name: str, mac: str) -> None:
        """Make a bridge with this MAC address, which it has from its first moment; it is down."""

    def set_alias(self, index: int, alias: str) -> None:
        """Give an interface its alias."""

    def add_address(self, index: int, address: IPv4Interface) -> None:
        """Give an interface one more address."""

    def set_up(self, index: int) -> None:
        """Let an interface carry packets."""

    def make_tap(self, name: str, uid: int, alias: str, bridge: int) -> None:
        """Make a persistent tap that this uid may open: marked, on the bridge and up, or not at all.

        Raises OSError (EBUSY) when there is an interface with this name.
        """

    def attach(self, index: int, bridge: int) -> None:
        """Put an interface of ours on a bridge, and up."""

    def remove_link(self, index: int) -> None:
        """Remove an interface; one that is gone is no error."""

    def rules(self) -> list[Rule]:
        """List the rules of our table; none when there is no table."""

    def change_rules(self, *, add: Sequence[Wanted] = (), remove: Sequence[Rule] = ()) -> None:
        """Remove rules and add others, all at once or not at all; make the table if need be."""

    def remove_table(self) -> None:
        """Remove our table with all that is in it; one that is gone is no error."""
