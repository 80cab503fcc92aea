"""An owner's bridges: made when first needed, guarded, and gone when nothing is on them.

A bridge is one owner's: its VMs may see and imitate each other, and no one else's. What would be forwarded
from it or to it is dropped, unless a VM's own rules say otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from ipaddress import IPv4Interface, IPv4Network

from banger.errors import HostLacks, Refused
from banger.helper.ledger import Held, Ledger
from banger.helper.names import Mark, read_mark
from banger.helper.net import GuardFrom, GuardHost, GuardTo, Link, Net, Rule
from banger.helper.verbs import Call

PREFIX = "br-fc"
GUARD = "guard:"
"""Stands before the bridge's name where a VM's id is in the mark of its rules; no VM's id has a colon."""

GUARDS = (GuardFrom, GuardTo, GuardHost)
MAX_BRIDGES = 8
"""Of one owner: at most half a million of the 18 million private addresses, which are everybody's."""

WIDEST = 8
"""Prefix length of the widest private network (RFC 1918)."""


def refuse(net: Net, ledger: Ledger, call: Call, name: str, network: IPv4Network) -> None:
    """Refuse a bridge that is another's, or that has or would get a network which it must not."""
    row, link = ledger.get("bridge", name), net.link(name)
    if row is not None and row.uid != call.caller.uid:
        raise Refused(f"The bridge {name} is not yours.")
    if row is None and len(ledger.of_kind("bridge", call.caller.uid)) >= MAX_BRIDGES:
        raise Refused(f"You have {MAX_BRIDGES} bridges already, and no more are allowed.")
    if row is not None and row.facts["network"] != str(network):
        raise Refused(f"The bridge {name} has the network {row.facts['network']}.")
    if link is not None and not is_bridge_of(link, call.caller.uid, row):
        raise Refused(f"There is an interface {name} that banger did not make for you.")
    if link is not None and not _may_have(net, link, network):
        raise Refused(f"The bridge {name} has another network than {network}.")
    if row is None or row.state != "held" or link is None:
        _refuse_overlap(net, ledger, name, link, network)


def _refuse_overlap(net: Net, ledger: Ledger, name: str, own: Link | None, network: IPv4Network) -> None:
    others = [IPv4Network(row.facts["network"]) for row in ledger.of_kind("bridge") if row.name != name]
    for other in (*others, *_networks(net, own)):
        if other.overlaps(network):
            raise Refused(f"The network {network} overlaps with {other}, which this host has already.")


def _networks(net: Net, own: Link | None) -> Iterable[IPv4Network]:
    """List the networks that the host knows by other interfaces than its own bridge.

    A route wider than any private network is a default one: VPNs halve 0.0.0.0/0. A server that is reached
    by it and answers for names would be the owner's to imitate.
    """
    index = own.index if own else 0
    for located in net.addresses():
        if located.link != index:
            yield located.address.network
    for route in net.routes():
        if route.link != index and route.network.prefixlen >= WIDEST:
            yield route.network
    yield from map(IPv4Network, net.resolvers())


def ensure(net: Net, ledger: Ledger, call: Call, name: str, network: IPv4Network) -> Link:
    """Make what is missing of a bridge; it is guarded before anything can be sent through it."""
    row = ledger.intend("bridge", name, call, "", network=str(network))
    guard(net, row)
    bridge = net.link(name) or _made(net, row)
    if read_mark(bridge.alias) is None:
        net.set_alias(bridge.index, str(Mark(row.uid, "", row.op)))
    _ensure_address(net, bridge, network)
    if not bridge.up:
        net.set_up(bridge.index)
    ledger.hold("bridge", name)
    return bridge


def _made(net: Net, row: Held) -> Link:
    net.make_bridge(row.name, _mac(row.uid, row.name))
    return found(net, row.name)


def _ensure_address(net: Net, bridge: Link, network: IPv4Network) -> None:
    if _gateway(network) not in _addresses(net, bridge):
        net.add_address(bridge.index, _gateway(network))


def _may_have(net: Net, bridge: Link, network: IPv4Network) -> bool:
    addresses = _addresses(net, bridge)
    return not addresses or _gateway(network) in addresses


def _addresses(net: Net, link: Link) -> list[IPv4Interface]:
    return [located.address for located in net.addresses() if located.link == link.index]


def _gateway(network: IPv4Network) -> IPv4Interface:
    return IPv4Interface((network[1], network.prefixlen))


def remove_idle(net: Net, ledger: Ledger, uid: int) -> None:
    """Remove an owner's bridges on which no VM is on record."""
    used = {row.facts["bridge"] for row in ledger.of_kind("tap", uid)}
    for row in ledger.of_kind("bridge", uid):
        if row.name not in used:
            _remove(net, row)
            ledger.release("bridge", row.name)


def _remove(net: Net, row: Held) -> None:
    bridge = net.link(row.name)
    if bridge and is_bridge_of(bridge, row.uid, row):
        net.remove_link(bridge.index)
    remove_rules(net, row.uid, GUARD + row.name)


def record(net: Net, ledger: Ledger, call: Call, tap: Link) -> None:
    """Put the bridge of a tap on record that is on none itself, unless it has more: it goes with them."""
    links = net.links()
    bridge = next((link for link in links if link.index == tap.master), None)
    others = [link for link in links if link.master == tap.master and link.name != tap.name]
    if bridge is None or not is_bridge_of(bridge, call.caller.uid, None) or any(map(is_marked, others)):
        return
    for address in _addresses(net, bridge)[:1]:
        ledger.intend("bridge", bridge.name, call, "", network=str(address.network))


def is_marked(link: Link) -> bool:
    """Tell whether an interface has a mark of ours, whoever's."""
    return read_mark(link.alias) is not None


def is_bridge_of(link: Link, uid: int, row: Held | None) -> bool:
    """Tell whether an interface is this owner's bridge, by its mark.

    The kernel makes a bridge without an alias. One that is on record and has none yet is known by
    its MAC address.
    """
    if link.kind != "bridge":
        return False
    if row is not None and not link.alias:
        return link.mac == _mac(uid, link.name)
    return is_of(link, uid, "")


def _mac(uid: int, name: str) -> str:
    """Give a bridge's MAC address. The kernel's own choice would change with the taps."""
    digest = hashlib.sha256(f"{uid} {name}".encode()).digest()
    return ":".join(f"{byte:02x}" for byte in (0x02, *digest[:5]))


# -- guards, and all other rules ------------------------------------------------------------------


def guard(net: Net, row: Held) -> None:
    """Guard a bridge: they come and go all at once, but for those that somebody else removes."""
    there = rules_of(net.rules(), row.uid, GUARD + row.name)
    if len(there) != len(GUARDS):
        comment = str(Mark(row.uid, GUARD + row.name, row.op))
        net.change_rules(add=[kind(comment=comment, bridge=row.name) for kind in GUARDS], remove=there)


def remove_rules(net: Net, uid: int, vm: str) -> None:
    """Remove the rules with this mark; the table goes when they are all that is in it."""
    rules = net.rules()
    ours = rules_of(rules, uid, vm)
    if ours and len(ours) == len(rules):
        net.remove_table()
    elif ours:
        net.change_rules(remove=ours)


def rules_of(rules: Iterable[Rule], uid: int, vm: str) -> list[Rule]:
    """Pick the rules with this mark."""
    marked = [(rule, read_mark(rule.comment)) for rule in rules]
    return [rule for rule, mark in marked if mark and (mark.uid, mark.vm) == (uid, vm)]


# -- what is whose --------------------------------------------------------------------------------


def is_of(link: Link, uid: int, vm: str) -> bool:
    """Tell whether an interface has this mark."""
    mark = read_mark(link.alias)
    return mark is not None and (mark.uid, mark.vm) == (uid, vm)


def found(net: Net, name: str) -> Link:
    """Give the interface that was just made; raises HostLacks when it is not there."""
    link = net.link(name)
    if link is None:
        raise HostLacks(f"The interface {name} was removed by another program.", hint="Run it again.")
    return link
