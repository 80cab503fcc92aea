"""What may be asked of root: one closed type for each verb, and nothing else.

A request is one JSON document of at most `MAX_REQUEST` bytes. Every field has its own type, pattern
or range, and an unknown field is refused, so that no free argument reaches a handler. Names of taps,
devices and jails are computed by root from the VM's id and the caller's uid; they are never dictated.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal, dataclass_transform

import msgspec
from msgspec import Meta

MAX_REQUEST = 64 * 1024
"""Bytes; a longer packet is refused."""

# \Z, not $: the latter lets a newline through at the end. No \d: it has other scripts' digits, too.
Vm = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9-]{0,62}\Z")]
Op = Annotated[str, Meta(pattern=r"\Aop-[0-9a-z]{1,32}\Z")]
Word = Annotated[str, Meta(pattern=r"\A[a-z][a-z0-9.-]{0,39}\Z")]
Key = Annotated[str, Meta(pattern=r"\A[0-9a-z][0-9a-z./-]{0,127}\Z")]
Bridge = Annotated[str, Meta(pattern=r"\A(?:br-fc|br-fc-[a-z0-9]{1,9})\Z")]
# IFNAMSIZ is 16 with its NUL (if(7)); the kernel allows more than this in a name, nobody uses it.
Interface = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,14}\Z")]
Network = Annotated[str, Meta(pattern=r"\A[0-9]{1,3}(?:\.[0-9]{1,3}){3}/[1-9][0-9]?\Z")]
Address = Annotated[str, Meta(pattern=r"\A[0-9]{1,3}(?:\.[0-9]{1,3}){3}\Z")]
Port = Annotated[int, Meta(ge=1024, le=65535)]

# Other people's networks are not ours to route (RFC 1918, RFC 6598).
PRIVATE = tuple(
    ipaddress.IPv4Network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")
)
WIDEST, NARROWEST = 16, 29
"""Prefix lengths of a bridge's network: up to 65,533 VMs, at least 5."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Ask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="verb"):
    """What is asked; a subclass for each verb."""


class Hello(Ask, tag="hello"):
    """Ask what this helper is and what its host offers."""


class Listing(Ask, tag="list"):
    """Ask what root has made for the caller, by its ledger and by looking at the host."""


class AuditOf(Ask, tag="audit"):
    """Ask for the audit lines of one of the caller's operations."""

    of: Op


class TapEnsure(Ask, tag="tap.ensure"):
    """Make it so that the VM has a tap of the caller's on a bridge whose first address is the host's."""

    vm: Vm
    bridge: Bridge
    network: Network

    def __post_init__(self) -> None:
        check_network(self.network)


class TapRemove(Ask, tag="tap.remove"):
    """Make it so that the VM has no tap; a bridge goes with its last one."""

    vm: Vm


class NatEnable(Ask, tag="nat.enable"):
    """Make it so that the VM reaches the world with the host's address: one masquerade, two forward rules.

    `egress` is the interface that leads there; without it, that of the default route.
    """

    vm: Vm
    address: Address
    egress: Interface | None = None

    def __post_init__(self) -> None:
        check_address(self.address)


class NatDisable(Ask, tag="nat.disable"):
    """Make it so that the VM has no rules."""

    vm: Vm


class NamesRoute(Ask, tag="names.route"):
    """Make it so that systemd-resolved asks 127.0.0.1:`port` for names below `vm`, by the bridge's link.

    The routing goes with the bridge.
    """

    bridge: Bridge
    port: Port


class SnapshotEnsure(Ask, tag="snapshot.ensure"):
    """Make it so that a dm-snapshot exists over two files that come with it as descriptors: base, cow."""

    vm: Vm


class SnapshotRemove(Ask, tag="snapshot.remove"):
    """Make it so that the VM has no dm-snapshot and no loop device."""

    vm: Vm


class JailLaunch(Ask, tag="jail.launch"):
    """Make it so that Firecracker runs in the VM's jail.

    Descriptors that come with it: kernel, initrd, then `disks` of the VM's disk files. `snapshot`
    puts the VM's dm-snapshot into the jail, too. `address`, the VM's, is only remembered.
    """

    vm: Vm
    disks: Annotated[int, Meta(ge=0, le=8)]
    snapshot: bool = False
    address: Address | None = None

    def __post_init__(self) -> None:
        if self.address is not None:
            check_address(self.address)


class JailConnect(Ask, tag="jail.connect"):
    """Give a descriptor that is connected to one of the sockets in the VM's jail, or reads its console."""

    vm: Vm
    socket: Literal["api", "vsock", "console"]


class JailSignal(Ask, tag="jail.signal"):
    """Send a signal to the process in the VM's jail, and to no other."""

    vm: Vm
    signal: Literal["TERM", "KILL"]


class JailRemove(Ask, tag="jail.remove"):
    """Make it so that nothing runs in the VM's jail and the jail is gone."""

    vm: Vm


AnyAsk = (
    Hello
    | Listing
    | AuditOf
    | TapEnsure
    | TapRemove
    | NatEnable
    | NatDisable
    | NamesRoute
    | SnapshotEnsure
    | SnapshotRemove
    | JailLaunch
    | JailConnect
    | JailSignal
    | JailRemove
)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One packet: what is asked, and on behalf of which step of which operation.

    `key` makes a repetition safe: the same key with the same `ask` is answered once, with another
    `ask` refused. A lower `epoch` than root has seen of this operation is refused.
    """

    op: Op
    step: Word
    epoch: Annotated[int, Meta(ge=1, le=2**53)]
    key: Key
    ask: AnyAsk


def check_network(text: str) -> ipaddress.IPv4Network:
    """Give a private IPv4 network with no host bits set and a sensible size; else raise ValueError."""
    network = ipaddress.IPv4Network(text, strict=True)
    if not WIDEST <= network.prefixlen <= NARROWEST:
        raise ValueError(f"prefix length {network.prefixlen} is not {WIDEST} to {NARROWEST}")
    if not any(network.subnet_of(private) for private in PRIVATE):
        raise ValueError("network is not private")
    return network


def check_address(text: str) -> ipaddress.IPv4Address:
    """Give a private IPv4 address; else raise ValueError."""
    address = ipaddress.IPv4Address(text)
    if not any(address in private for private in PRIVATE):
        raise ValueError("address is not private")
    return address
