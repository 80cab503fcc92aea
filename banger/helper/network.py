"""What root does about the network: a tap for each VM on its owner's bridge, and a VM's way out.

A bridge is made by its first tap and goes with its last. Without rules of its own a VM's packets are not
forwarded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Literal

from banger.errors import HostLacks, Refused
from banger.helper import bridges, names
from banger.helper.host import Host
from banger.helper.ledger import Held, Ledger
from banger.helper.names import Mark, read_mark
from banger.helper.net import (
    ForwardIn,
    ForwardOut,
    Link,
    Masquerade,
    Net,
    Wanted,
)
from banger.helper.requests import NatDisable, NatEnable, TapEnsure, TapRemove
from banger.helper.verbs import Call, Facts, Verb

MAX_TAPS = 1024
"""Of one owner."""

LOOPBACK = "lo"
FORWARDING = "`sysctl -w net.ipv4.ip_forward=1` lets it, and a file in /etc/sysctl.d makes that last."


# -- taps ------------------------------------------------------------------------------------------


def ensure_tap(host: Host, ledger: Ledger, call: Call, ask: TapEnsure) -> Facts:
    """Make it so that the VM has a tap on the bridge; gives its name and index."""
    name, network = names.tap(call.caller.uid, ask.vm), IPv4Network(ask.network)
    _refuse_tap(host.net, ledger, call, ask, name)
    if not any(network.subnet_of(allowed) for allowed in host.networks):
        known = ", ".join(map(str, host.networks))
        raise Refused(f"The network {network} is not within {known}, which root gives to bridges.")
    bridges.refuse(host.net, ledger, call, ask.bridge, network)
    row = ledger.intend("tap", name, call, ask.vm, bridge=ask.bridge)
    bridge = bridges.ensure(host.net, ledger, call, ask.bridge, network)
    tap = _ensure_tap(host.net, row, bridge)
    ledger.hold("tap", name, ifindex=tap.index)
    return {"tap": name, "ifindex": tap.index}


def remove_tap(host: Host, ledger: Ledger, call: Call, ask: TapRemove) -> Facts:
    """Make it so that the VM has neither tap nor rules; a bridge goes with its last tap."""
    uid = call.caller.uid
    name = names.tap(uid, ask.vm)
    row = _row(ledger, "tap", uid, ask.vm)
    _forbid(host.net, ledger, uid, ask.vm)
    tap = host.net.link(name)
    if tap and bridges.is_of(tap, uid, ask.vm):
        if row is None:
            bridges.record(host.net, ledger, call, tap)
        host.net.remove_link(tap.index)
    ledger.release("tap", name)
    bridges.remove_idle(host.net, ledger, uid)
    return {}


def _refuse_tap(net: Net, ledger: Ledger, call: Call, ask: TapEnsure, name: str) -> None:
    row, link = _row(ledger, "tap", call.caller.uid, ask.vm), net.link(name)
    if row is not None and row.facts["bridge"] != ask.bridge:
        raise Refused(f"The VM has a tap already, on the bridge {row.facts['bridge']}.")
    if row is None and len(ledger.of_kind("tap", call.caller.uid)) >= MAX_TAPS:
        raise Refused(f"You have {MAX_TAPS} taps already, and no more are allowed.")
    if link is not None and not bridges.is_of(link, call.caller.uid, ask.vm):
        raise Refused(f"There is an interface {name} that banger did not make.")


def _ensure_tap(net: Net, row: Held, bridge: Link) -> Link:
    tap = net.link(row.name)
    if tap is None:
        net.make_tap(row.name, row.uid, str(Mark(row.uid, row.vm, row.op)), bridge.index)
        return bridges.found(net, row.name)
    # A tap that is there is whole; but its bridge may have been removed and made again meanwhile.
    if tap.master != bridge.index or not tap.up:
        net.attach(tap.index, bridge.index)
    return tap


def _row(ledger: Ledger, kind: Literal["tap", "nat"], uid: int, vm: str) -> Held | None:
    """Give what is on record of a VM. A name is a short digest: another owner can search for the same."""
    row = ledger.get(kind, names.tap(uid, vm))
    if row is not None and (row.uid, row.vm) != (uid, vm):
        raise Refused(f"The {kind} {row.name} is not yours.")
    return row


# -- rules -----------------------------------------------------------------------------------------


def enable_nat(host: Host, ledger: Ledger, call: Call, ask: NatEnable) -> Facts:
    """Make it so that the VM reaches the world by its egress; gives both and the address."""
    name, address = names.tap(call.caller.uid, ask.vm), IPv4Address(ask.address)
    tap = _tap_of(host.net, ledger, call.caller.uid, ask.vm)
    bridge = ledger.get("bridge", tap.facts["bridge"])
    assert bridge is not None  # a tap on record is recorded before it
    _refuse_address(ledger, name, address, IPv4Network(bridge.facts["network"]))
    egress = _egress(host.net, ask.egress)
    if not host.net.forwards():
        raise HostLacks("This host does not forward packets.", hint=FORWARDING)
    row = ledger.intend("nat", name, call, ask.vm, address=ask.address, egress=egress)
    bridges.guard(host.net, bridge)
    way = _way_out(row, bridge.name, address, egress)
    host.net.change_rules(add=way, remove=bridges.rules_of(host.net.rules(), row.uid, row.vm))
    ledger.hold("nat", name, address=ask.address, egress=egress)
    return {"address": ask.address, "egress": egress}


def disable_nat(host: Host, ledger: Ledger, call: Call, ask: NatDisable) -> Facts:
    """Make it so that the VM has no rules; the guards of its bridge also end what it had begun."""
    _forbid(host.net, ledger, call.caller.uid, ask.vm)
    return {}


def _forbid(net: Net, ledger: Ledger, uid: int, vm: str) -> None:
    row = _row(ledger, "nat", uid, vm)
    bridges.remove_rules(net, uid, vm)
    if row is not None:
        ledger.release("nat", row.name)


def _tap_of(net: Net, ledger: Ledger, uid: int, vm: str) -> Held:
    row, link = _row(ledger, "tap", uid, vm), net.link(names.tap(uid, vm))
    if row is None or row.state != "held" or link is None or not bridges.is_of(link, uid, vm):
        raise Refused("The VM has no tap.")
    return row


def _refuse_address(ledger: Ledger, name: str, address: IPv4Address, network: IPv4Network) -> None:
    if address not in network or address in (network[0], network[1], network[-1]):
        raise Refused(f"{address} is not an address for a VM in {network}.")
    if any(row.facts["address"] == str(address) and row.name != name for row in ledger.of_kind("nat")):
        raise Refused(f"Another VM has the address {address}.")


def _egress(net: Net, asked: str | None) -> str:
    """Give the interface that leads to the world, which is none of ours and not the loopback."""
    name = asked or net.default_egress()
    if name is None:
        raise HostLacks("This host has no default route.", hint="Set one, or name the interface to use.")
    link = net.link(name)
    if link is None:
        raise Refused(f"There is no interface {name}.")
    if name == LOOPBACK or name.startswith((bridges.PREFIX, names.TAP_PREFIX)) or bridges.is_marked(link):
        raise Refused(f"The interface {name} does not lead out of this host.")
    return name


def _way_out(row: Held, bridge: str, address: IPv4Address, egress: str) -> Sequence[Wanted]:
    comment = str(Mark(row.uid, row.vm, row.op))
    return (
        Masquerade(comment=comment, address=address, egress=egress),
        ForwardOut(comment=comment, bridge=bridge, address=address, egress=egress),
        ForwardIn(comment=comment, bridge=bridge, address=address, egress=egress),
    )


# -- listing ---------------------------------------------------------------------------------------


def listing(host: Host, ledger: Ledger, uid: int) -> list[dict[str, str]]:
    """List what is on this host with an owner's mark: {"kind", "id", "vm", "op"}."""
    found = [*_links_of(host.net, ledger, uid), *_ways_of(host.net, uid)]
    return [
        {"kind": kind, "id": name, "vm": mark.vm, "op": mark.op} for (kind, name), mark in dict(found).items()
    ]


Found = tuple[tuple[str, str], Mark]


def _links_of(net: Net, ledger: Ledger, uid: int) -> Iterable[Found]:
    for link in net.links():
        mark = read_mark(link.alias)
        if mark is not None and mark.uid == uid:
            yield ("bridge" if link.kind == "bridge" else "tap", link.name), mark
    for row in ledger.of_kind("bridge", uid):
        bridge = net.link(row.name)
        if bridge and not bridge.alias and bridges.is_bridge_of(bridge, uid, row):
            yield ("bridge", row.name), Mark(uid, "", row.op)


def _ways_of(net: Net, uid: int) -> Iterable[Found]:
    # A guard that is left without its bridge is listed as what it belongs to.
    for rule in net.rules():
        mark = read_mark(rule.comment)
        if mark is None or mark.uid != uid:
            continue
        if mark.vm.startswith(bridges.GUARD):
            yield ("bridge", mark.vm.removeprefix(bridges.GUARD)), mark._replace(vm="")
        else:
            yield ("nat", names.tap(uid, mark.vm)), mark


VERBS = (
    Verb(ask=TapEnsure, run=ensure_tap),
    Verb(ask=TapRemove, run=remove_tap),
    Verb(ask=NatEnable, run=enable_nat),
    Verb(ask=NatDisable, run=disable_nat),
)
