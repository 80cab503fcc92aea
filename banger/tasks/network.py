"""A VM's place in the network: a port of the host's, or an address, a tap and NAT on a bridge.

Taps, bridges and rules are root's to make: these steps ask for them. What they are called is computed
by root the same way.
"""

from __future__ import annotations

import os
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from banger.events import queries
from banger.helper import names
from banger.helper.requests import NamesRoute, NatDisable, NatEnable, TapEnsure, TapRemove
from banger.model import Resource, Value, VmSpec
from banger.network import plan, resolv, user
from banger.tasks.context import Ctx
from banger.tasks.pipeline import Step

ROOT_ATTEMPTS = 6
"""A helper that is being restarted is back within the 3 s that these attempts are spread over."""


class Place(Value):
    """Where a guest finds itself: its address with its prefix length, its gateway, its resolver."""

    address: str
    gateway: str
    nameserver: str


def place(ctx: Ctx) -> Place:
    """Derive a guest's place in the network that its steps have prepared."""
    address = ctx.facts.get("address")
    if address is None:
        mine = f"{user.GUEST_ADDRESS}/{user.PREFIX_LENGTH}"
        return Place(address=mine, gateway=user.GATEWAY, nameserver=user.DNS_SERVER)
    network = IPv4Network(ctx.config.bridge_network)
    planned = plan.place(network, plan.index_of(network, IPv4Address(address)))
    return Place(
        address=f"{planned.address}/{planned.prefix_length}",
        gateway=str(planned.gateway),
        nameserver=resolv.nameserver() or str(planned.gateway),
    )


# -- user mode: a port ----------------------------------------------------------------------


def _choose_port(ctx: Ctx) -> list[Resource]:
    """Allocate inside the append's transaction: no two operations get the same port."""
    if (have := ctx.acquired("port")) is not None:
        return [have]
    taken = {int(port) for port in queries.resource_ids(ctx.log, "port")}
    return [Resource(kind="port", id=str(user.pick_port(taken)))]


def _use_port(ctx: Ctx) -> dict[str, Any]:
    port = ctx.acquired("port")
    assert port is not None
    return {"ssh_port": int(port.id)}


def _only_a_line(_: Ctx) -> None:
    """Do nothing: it is a line in the ledger; the VMM that used it has its own undo."""


# -- bridge: an address, a tap, NAT ---------------------------------------------------------


def _choose_address(ctx: Ctx) -> list[Resource]:
    """Allocate inside the append's transaction; a VM gets the one it had before, if that is free."""
    if (have := ctx.acquired("address")) is not None:
        return [have]
    network = IPv4Network(ctx.config.bridge_network)
    known = [IPv4Address(address) for address in queries.resource_ids(ctx.log, "address")]
    taken = {plan.index_of(network, address) for address in known if address in network}
    free = plan.place(network, plan.pick_index(network, ctx.vm_id, taken))
    return [Resource(kind="address", id=str(free.address))]


def _use_address(ctx: Ctx) -> dict[str, Any]:
    address = ctx.acquired("address")
    assert address is not None
    return {"address": address.id, "ssh_port": 22}


def _tap(ctx: Ctx) -> list[Resource]:
    return [Resource(kind="tap", id=names.tap(os.getuid(), ctx.vm_id))]


def _make_tap(ctx: Ctx) -> dict[str, Any]:
    asked = TapEnsure(vm=ctx.vm_id, bridge=ctx.config.bridge, network=ctx.config.bridge_network)
    return {"tap": ctx.ask_root(asked)["tap"]}


def _remove_tap(ctx: Ctx) -> None:
    ctx.ask_root(TapRemove(vm=ctx.vm_id))


def _route_names(ctx: Ctx) -> dict[str, Any]:
    return ctx.ask_root(NamesRoute(bridge=ctx.config.bridge, port=ctx.config.dns_port))


def _nat_if_asked(ctx: Ctx) -> list[Resource]:
    return _nat(ctx) if ctx.vm.spec.nat else []


def _nat(ctx: Ctx) -> list[Resource]:
    return [Resource(kind="nat", id=names.tap(os.getuid(), ctx.vm_id))]


def _start_nat(ctx: Ctx) -> None:
    if ctx.vm.spec.nat:
        _enable_nat(ctx, ctx.facts["address"])


def _enable_nat(ctx: Ctx, address: str) -> None:
    ctx.ask_root(NatEnable(vm=ctx.vm_id, address=address, egress=ctx.config.egress))


def _disable_nat(ctx: Ctx) -> None:
    ctx.ask_root(NatDisable(vm=ctx.vm_id))


def _release(ctx: Ctx) -> None:
    if ctx.held("tap", "nat"):
        _disable_nat(ctx)
        _remove_tap(ctx)


def _network(ctx: Ctx) -> list[Resource]:
    return ctx.held("tap", "nat")


# -- NAT of a VM that exists ----------------------------------------------------------------


def _nat_changes(ctx: Ctx) -> list[Resource]:
    return _nat(ctx) if ctx.args["nat"] and _address_of_running(ctx) else []


def _nat_is_given_back(ctx: Ctx) -> list[Resource]:
    return [] if ctx.args["nat"] else ctx.held("nat")


def _set_nat(ctx: Ctx) -> None:
    _nat_as(ctx, on=ctx.args["nat"])


def _nat_as_it_was(ctx: Ctx) -> None:
    _nat_as(ctx, on=ctx.vm.spec.nat)


def _nat_as(ctx: Ctx, *, on: bool) -> None:
    """Switch it for a VM that runs on a bridge; another's next start reads what it is asked to be."""
    address = _address_of_running(ctx)
    if on and address is not None:
        _enable_nat(ctx, address)
    if not on and ctx.vm.address is not None:
        _disable_nat(ctx)


def _address_of_running(ctx: Ctx) -> str | None:
    """Give the address of a VM whose VMM lives; what root made may have gone with the host's last boot."""
    vm = ctx.vm
    return vm.address if vm.process is not None and ctx.vmm.alive(vm.process) else None


PORT = Step(name="port", title="SSH port", run=_use_port, undo=_only_a_line, acquires=_choose_port)
ADDRESS = Step(name="address", title="address", run=_use_address, undo=_only_a_line, acquires=_choose_address)
TAP = Step(
    name="tap",
    title="tap on the bridge",
    run=_make_tap,
    undo=_remove_tap,
    acquires=_tap,
    attempts=ROOT_ATTEMPTS,
    pool="root",
)
NAMES = Step(
    name="names",
    title="names below .vm",
    run=_route_names,
    why_no_undo="the routing goes with the bridge",
    attempts=ROOT_ATTEMPTS,
    pool="root",
)
NAT = Step(
    name="nat",
    title="NAT",
    run=_start_nat,
    undo=_disable_nat,
    acquires=_nat_if_asked,
    attempts=ROOT_ATTEMPTS,
    pool="root",
)
RELEASE = Step(
    name="network",
    title="release its network",
    run=_release,
    why_no_undo="its VMM is gone already",
    forward_only=True,
    releases=_network,
    attempts=ROOT_ATTEMPTS,
    pool="root",
)
# What it gives back is its own from the start, so that turning back gives back the rest.
RELEASE_ON_THE_WAY = replace(RELEASE, forward_only=False, acquires=_network, undo=_release, why_no_undo="")
SET_NAT = Step(
    name="nat",
    title="NAT on or off",
    run=_set_nat,
    undo=_nat_as_it_was,
    acquires=_nat_changes,
    releases=_nat_is_given_back,
    attempts=ROOT_ATTEMPTS,
    pool="root",
)
ON_USER = frozenset({PORT.name})
ON_BRIDGE = frozenset(step.name for step in (ADDRESS, TAP, NAMES, NAT, RELEASE))


def not_for(spec: VmSpec, *, names_wanted: bool = False) -> frozenset[str]:
    """Give the names of the steps that a VM with this network has no use for."""
    if spec.network == "user":
        return ON_BRIDGE
    return ON_USER if names_wanted else ON_USER | {NAMES.name}
