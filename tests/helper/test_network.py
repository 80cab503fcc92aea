from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import msgspec
import pytest

from banger.errors import HostLacks, Refused
from banger.helper import names, network
from banger.helper.net import Masquerade, Route
from banger.helper.requests import AnyAsk, Ask, NatDisable, NatEnable, TapEnsure, TapRemove
from banger.helper.verbs import Call, Caller
from banger.testing.root_net import RecordingNet
from tests.helper import network_scenes as scenes
from tests.helper.network_scenes import (
    ADDRESS,
    BRIDGE,
    DISABLE,
    ENABLE,
    ENSURE,
    NETWORK,
    OTHER_UID,
    REMOVE,
    UID,
    VM,
    Scene,
    host_of,
)

real = pytest.param("real", marks=pytest.mark.skipif(not scenes.is_root(), reason="needs root and tun"))


@pytest.fixture(params=["recorded", real])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A host; each test is of the record and of the kernel."""
    with getattr(scenes, request.param)() as found:
        yield found


Noted = Callable[..., None]
"""`refused(case, outcome)` of conftest.py."""


def declined(scene: Scene, ask: Ask, uid: int = UID, says: str = "") -> Refused:
    """Check that a request is refused and leaves everything as it was; gives the refusal."""
    before = scenes.snapshot(scene.net), scene.recorded()
    with pytest.raises(Refused, match=says) as raised:
        scene.ask(ask, uid)
    assert (scenes.snapshot(scene.net), scene.recorded()) == before
    return raised.value


def unread(verb: str, **fields: object) -> str:
    """Check that a request is no request: no handler ever sees it; gives the reason."""
    with pytest.raises(msgspec.ValidationError) as raised:
        msgspec.json.decode(msgspec.json.encode({"verb": verb, **fields}), type=AnyAsk)
    return f"invalid: {raised.value}"


TAP = {"vm": VM, "bridge": BRIDGE, "network": NETWORK}
NAT = {"vm": VM, "address": ADDRESS}


# -- taps and bridges --------------------------------------------------------------------------------


def test_a_tap_is_on_its_bridge(scene: Scene) -> None:
    """A tap has root's name for it, its owner's mark, and a bridge that is up and has the first address."""
    facts = scene.ask(ENSURE)
    tap, bridge = scene.net.link(names.tap(UID, VM)), scene.net.link(BRIDGE)
    assert tap is not None
    assert bridge is not None
    assert facts == {"tap": tap.name, "ifindex": tap.index}
    assert (tap.kind, tap.alias, tap.master) == ("tun", f"banger {UID} {VM} op-1", bridge.index)
    assert (bridge.kind, bridge.alias, bridge.up, tap.up) == ("bridge", f"banger {UID}  op-1", True, True)
    assert [str(one.address) for one in scene.net.addresses() if one.link == bridge.index] == ["10.77.0.1/24"]
    assert scene.listing() == [
        {"kind": "bridge", "id": BRIDGE, "vm": "", "op": "op-1"},
        {"kind": "tap", "id": tap.name, "vm": VM, "op": "op-1"},
    ]


def test_what_is_removed_is_gone(scene: Scene) -> None:
    """After the last VM's removal the host is as it was, and the ledger empty."""
    before = scenes.snapshot(scene.net)
    for vm, address in ((VM, ADDRESS), ("vm-2", "10.77.0.3")):
        scene.ask(TapEnsure(vm=vm, bridge=BRIDGE, network=NETWORK))
        scene.ask(NatEnable(vm=vm, address=address))
    for vm in ("vm-2", VM):
        assert scene.net.link(BRIDGE) is not None
        scene.ask(TapRemove(vm=vm))
    assert scenes.snapshot(scene.net) == before
    assert (scene.recorded(), scene.listing()) == ([], [])


def test_each_verb_may_be_repeated(scene: Scene) -> None:
    """A second request of the same changes nothing, also on behalf of another operation."""
    for ask in (ENSURE, ENABLE, DISABLE, REMOVE):
        first = scene.ask(ask)
        after = scenes.snapshot(scene.net), scene.recorded()
        assert scene.ask(ask, op="op-2") == first
        assert (scenes.snapshot(scene.net), scene.recorded()) == after


def test_removing_what_never_was_is_success(scene: Scene) -> None:
    """A VM that has nothing loses nothing, and nobody else does."""
    scene.ask(ENSURE)
    before = scenes.snapshot(scene.net), scene.recorded()
    scene.ask(NatDisable(vm="vm-9"))
    scene.ask(TapRemove(vm="vm-9"))
    assert (scenes.snapshot(scene.net), scene.recorded()) == before


def test_a_reboot_takes_nothing_from_anybody(scene: Scene) -> None:
    """When all that the ledger holds is gone, it is made again as it was, or removed with success."""
    scene.ask(ENSURE)
    scene.ask(ENABLE)
    whole = scenes.snapshot(scene.net)
    wipe(scene)
    scene.ask(ENSURE, op="op-2")
    scene.ask(ENABLE, op="op-2")
    assert scenes.snapshot(scene.net) == whole
    wipe(scene)
    scene.ask(REMOVE)
    assert (scene.recorded(), scene.listing()) == ([], [])


def wipe(scene: Scene) -> None:
    """Take from the host what a reboot takes."""
    scene.net.remove_table()
    for link in reversed(scene.net.links()):
        if names.read_mark(link.alias):
            scene.net.remove_link(link.index)


def test_a_bridge_that_was_made_anew_gets_its_taps_back(scene: Scene) -> None:
    """Somebody removes the bridge, which lets its tap go: both are put right, and guarded."""
    scene.ask(ENSURE)
    whole = scenes.snapshot(scene.net)
    bridge = scene.net.link(BRIDGE)
    assert bridge is not None
    scene.net.remove_link(bridge.index)
    scene.net.remove_table()
    scene.ask(ENSURE)
    assert scenes.snapshot(scene.net) == whole


def test_what_is_on_no_record_is_found_by_its_mark(scene: Scene) -> None:
    """When root's ledger is lost, the owner can still remove everything that root made."""
    before = scenes.snapshot(scene.net)
    for vm, address in ((VM, ADDRESS), ("vm-2", "10.77.0.3")):
        scene.ask(TapEnsure(vm=vm, bridge=BRIDGE, network=NETWORK))
        scene.ask(NatEnable(vm=vm, address=address))
    later = Scene(scene.net, scenes.ledger(), scene.forward)
    assert {found["vm"] for found in later.listing()} == {"", VM, "vm-2"}
    later.ask(REMOVE)
    later.ask(TapRemove(vm="vm-2"))
    assert scenes.snapshot(scene.net) == before
    assert later.recorded() == []


def test_each_owner_has_its_own(scene: Scene) -> None:
    """Two owners' VMs of the same id have two taps, and neither lists or removes the other's."""
    scene.ask(ENSURE)
    scene.ask(TapEnsure(vm=VM, bridge="br-fc-2", network="10.78.0.0/24"), uid=OTHER_UID)
    assert {found["id"] for found in scene.listing()} == {BRIDGE, names.tap(UID, VM)}
    scene.ask(REMOVE, uid=OTHER_UID)
    assert scene.listing(OTHER_UID) == []
    assert {found["id"] for found in scene.listing()} == {BRIDGE, names.tap(UID, VM)}


def test_a_bridge_is_its_owners(scene: Scene) -> None:
    """Another owner gets no tap on it, with root's ledger or without."""
    scene.ask(ENSURE)
    declined(scene, TapEnsure(vm="vm-2", bridge=BRIDGE, network=NETWORK), OTHER_UID, "not yours")
    without = Scene(scene.net, scenes.ledger(), scene.forward)
    declined(without, TapEnsure(vm="vm-2", bridge=BRIDGE, network=NETWORK), OTHER_UID, "did not make for you")


def test_a_bridge_keeps_its_network(scene: Scene) -> None:
    """A bridge that is asked for with another network than it has is refused, on record or not."""
    scene.ask(ENSURE)
    other = TapEnsure(vm="vm-2", bridge=BRIDGE, network="10.79.0.0/24")
    declined(scene, other, says="has the network 10.77.0.0/24")
    declined(Scene(scene.net, scenes.ledger(), scene.forward), other, says="another network")


def test_a_tap_keeps_its_bridge(scene: Scene) -> None:
    """A VM with a tap on one bridge gets none on another."""
    scene.ask(ENSURE)
    declined(scene, TapEnsure(vm=VM, bridge="br-fc-2", network="10.78.0.0/24"), says=f"bridge {BRIDGE}")


@pytest.mark.parametrize("alias", [None, "uplink", f"banger {OTHER_UID}  op-1", f"banger {UID} {VM} op-1"])
def test_a_foreign_bridge_is_left_alone(scene: Scene, alias: str | None) -> None:
    """A bridge without the owner's mark is neither used nor removed."""
    scene.foreign_bridge(BRIDGE, alias)
    declined(scene, ENSURE, says="did not make for you")
    before = scenes.snapshot(scene.net)
    scene.ask(REMOVE)
    assert scenes.snapshot(scene.net) == before


@pytest.mark.parametrize(
    "address", ["10.77.0.9/24", "10.77.0.128/25", "10.77.200.1/16", "10.1.1.1/8", "10.77.0.255/32"]
)
def test_a_network_of_the_hosts_is_not_taken(scene: Scene, address: str) -> None:
    """A network that overlaps with one that another interface has is refused."""
    scene.foreign_bridge("uplink0", address=address)
    declined(scene, ENSURE, says="overlaps")


def test_a_network_behind_a_route_is_not_taken() -> None:
    """A network that the host reaches by a route is refused; halves of a default route are no network."""
    with scenes.recorded() as scene:
        assert isinstance(scene.net, RecordingNet)
        scene.net.host.routes += [route("0.0.0.0/1"), route("128.0.0.0/1")]
        scene.ask(ENSURE)
        scene.ask(REMOVE)
        scene.net.host.routes.append(route("10.64.0.0/10"))
        declined(scene, ENSURE, says="overlaps with 10.64.0.0/10")


def route(text: str) -> Route:
    return Route(link=2, network=IPv4Network(text))


def test_two_bridges_do_not_overlap(scene: Scene) -> None:
    """Not even when one of them is only on record, because the host was rebooted."""
    scene.ask(ENSURE)
    wipe(scene)
    declined(scene, TapEnsure(vm="vm-2", bridge="br-fc-2", network="10.77.0.0/25"), says="overlaps")


# -- ways out ----------------------------------------------------------------------------------------


def test_a_way_out_is_three_rules(scene: Scene) -> None:
    """A VM with a way out has one masquerade and two forwards with its mark, ahead of its bridge's guards."""
    scene.ask(ENSURE)
    assert scene.ask(ENABLE) == {"address": ADDRESS, "egress": "eth0"}
    mark, guard = f"banger {UID} {VM} op-1", f"banger {UID} guard:{BRIDGE} op-1"
    rules = [(rule.chain, rule.comment) for rule in scene.net.rules()]
    assert sorted(rules) == sorted(
        [("forward", mark)] * 2 + [("postrouting", mark)] + [("forward", guard)] * 2 + [("input", guard)]
    )
    assert {"kind": "nat", "id": names.tap(UID, VM), "vm": VM, "op": "op-1"} in scene.listing()


def test_a_way_out_may_be_another_one(scene: Scene) -> None:
    """Enabling it again with another address replaces the rules."""
    scene.ask(ENSURE)
    scene.ask(ENABLE)
    rules = scene.net.rules()
    assert scene.ask(NatEnable(vm=VM, address="10.77.0.9"))["address"] == "10.77.0.9"
    assert len(scene.net.rules()) == len(rules)
    held = scene.ledger.get("nat", names.tap(UID, VM))
    assert held is not None
    assert held.facts["address"] == "10.77.0.9"


def test_a_way_out_needs_a_tap(scene: Scene) -> None:
    """A VM without a tap, or whose tap is gone, gets none; nor does one whose tap is another owner's."""
    declined(scene, ENABLE, says="no tap")
    scene.ask(ENSURE)
    declined(scene, ENABLE, OTHER_UID, "no tap")
    wipe(scene)
    declined(scene, ENABLE, says="no tap")


@pytest.mark.parametrize("address", ["10.77.0.0", "10.77.0.1", "10.77.0.255", "10.77.1.2", "192.168.1.1"])
def test_an_address_is_a_vms(scene: Scene, address: str) -> None:
    """Not the network's own, the host's, the broadcast one, or one of another network."""
    scene.ask(ENSURE)
    declined(scene, NatEnable(vm=VM, address=address), says="not an address")


def test_an_address_is_one_vms(scene: Scene) -> None:
    """Two VMs do not get out with the same address, unless the first no longer does."""
    scene.ask(ENSURE)
    scene.ask(ENABLE)
    scene.ask(TapEnsure(vm="vm-2", bridge=BRIDGE, network=NETWORK))
    second = NatEnable(vm="vm-2", address=ADDRESS)
    declined(scene, second, says="Another VM")
    scene.ask(DISABLE)
    assert scene.ask(second)["address"] == ADDRESS


def test_a_host_without_a_way_out_has_none_to_give() -> None:
    """Without a default route and without a named interface there is a sentence that says so."""
    with scenes.recorded() as scene:
        assert isinstance(scene.net, RecordingNet)
        scene.ask(ENSURE)
        scene.net.host.default_egress = None
        with pytest.raises(HostLacks, match="default route"):
            scene.ask(ENABLE)
        assert scene.ask(NatEnable(vm=VM, address=ADDRESS, egress="eth0"))["egress"] == "eth0"


# -- what must be refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bridge",
    [
        "br-fc/../eth0",
        "br-fc-" + "a" * 20,
        "br-fc\n",
        "br-fc ",
        "BR-FC",
        "br-fcx",
        "br-fc-",
        "eth0",
        "br-fc-ä",
    ],
)
def test_h15_a_bridge_has_one_of_our_names(bridge: str, refused: Noted) -> None:
    """No other name is even read."""
    refused("H15", unread("tap.ensure", **{**TAP, "bridge": bridge}))


def test_h17_nothing_but_our_taps_is_on_a_bridge(scene: Scene, refused: Noted) -> None:
    """No request names what to attach, and what has a tap's name without our mark is not attached."""
    refused("H17", unread("tap.ensure", **TAP, interface="eth0"))
    scene.foreign_bridge(names.tap(UID, VM))
    refused("H17", declined(scene, ENSURE, says="did not make"))
    scene.ask(REMOVE)
    foreign = scene.net.link(names.tap(UID, VM))
    assert foreign is not None
    assert foreign.master is None


@pytest.mark.parametrize(
    "text",
    "0.0.0.0/0 10.0.0.0/7 10.0.0.0/33 10.0.0.0/08 ::/0 ::ffff:10.0.0.0/104 10.0.0.1/24 10.0.0.0/8 10.0.0.0/30"
    " 10.0.0.0 127.0.0.0/24 169.254.0.0/24 224.0.0.0/24 8.8.8.0/24 010.0.0.0/24 10.0.0.0/24\n".split(" "),
)
def test_h18_a_network_is_a_private_one(text: str, refused: Noted) -> None:
    """No public, IPv6, sloppy or misspelled network is even read."""
    refused("H18", unread("tap.ensure", **{**TAP, "network": text}))


@pytest.mark.parametrize(
    "egress", ["eth0 -j ACCEPT", "", "eth0\n", "../eth0", "-eth0", "e" * 16, "eth0;drop"]
)
def test_h20_an_egress_is_one_word(egress: str, refused: Noted) -> None:
    """Nothing else is even read."""
    refused("H20", unread("nat.enable", **NAT, egress=egress))


@pytest.mark.parametrize("egress", ["lo", "eth9", BRIDGE, names.tap(UID, VM), "br-fc-none", "uplink0"])
def test_h20_an_egress_leads_out(scene: Scene, egress: str, refused: Noted) -> None:
    """The loopback, what is not there, and whatever is ours or another owner's, is refused."""
    scene.ask(ENSURE)
    scene.foreign_bridge("uplink0", f"banger {OTHER_UID}  op-1")
    refused("H20", declined(scene, NatEnable(vm=VM, address=ADDRESS, egress=egress), says="interface"))


@pytest.mark.parametrize(
    "text", ['10.77.0.2"; flush ruleset; #', "10.77.0.2 }", "10.77.0.2\n", "10.77.0.0/24", "8.8.8.8", "::1"]
)
def test_h21_an_address_is_no_text_for_a_rule(text: str, refused: Noted) -> None:
    """An address with more behind it is not even read, nor is a VM's id."""
    refused("H21", unread("nat.enable", **{**NAT, "address": text}))
    refused("H21", unread("nat.enable", **{**NAT, "vm": text}))


def test_h22_an_owner_has_so_many_taps(refused: Noted) -> None:
    """The tap after the last one allowed is refused, but not a repeated request, or another owner's."""
    with scenes.recorded() as scene:
        for number in range(network.MAX_TAPS):
            last = TapEnsure(vm=f"vm-{number}", bridge=BRIDGE, network="10.77.0.0/16")
            call = Call(caller=Caller(uid=UID, gid=UID), op="op-1", step="tap", epoch=1)
            scene.ledger.intend("tap", names.tap(UID, last.vm), call, last.vm, bridge=BRIDGE)
        refused(
            "H22",
            declined(scene, TapEnsure(vm="one-more", bridge=BRIDGE, network="10.77.0.0/16"), says="1024"),
        )
        assert scene.ask(last)["tap"] == names.tap(UID, last.vm)
        assert scene.ask(TapEnsure(vm=VM, bridge="br-fc-2", network="10.78.0.0/24"), uid=OTHER_UID)


def test_h22_a_vm_has_so_many_rules(scene: Scene) -> None:
    """However often and with whatever a way out is asked for, a VM has no more than four rules."""
    scene.ask(ENSURE)
    for number in range(2, 12):
        scene.ask(NatEnable(vm=VM, address=f"10.77.0.{number}", egress="eth0"))
        mine = [rule for rule in scene.net.rules() if rule.comment == f"banger {UID} {VM} op-1"]
        assert len(mine) <= 4


def test_h23_rules_without_our_mark_stay(scene: Scene) -> None:
    """Of what others put into our table nothing is removed, nor is the table."""
    scene.net.change_rules(
        add=[
            Masquerade(comment=comment, address=IPv4Address("10.77.0.2"), egress="eth0")
            for comment in ("an admin's", f"banger {OTHER_UID} {VM} op-1", f"banger {UID} {VM}")
        ]
    )
    before = scene.net.rules()
    for ask in (ENSURE, ENABLE, DISABLE, REMOVE):
        scene.ask(ask)
        assert [rule for rule in scene.net.rules() if rule in before] == before
    assert scene.net.rules() == before


def test_h24_no_request_sets_a_sysctl(scene: Scene, refused: Noted) -> None:
    """A host that does not forward is told how to, and goes on as it is."""
    refused("H24", unread("sysctl.set", key="net.ipv4.ip_forward", value="1"))
    scene.ask(ENSURE)
    scene.forward(False)
    before = scenes.snapshot(scene.net), scene.recorded()
    with pytest.raises(HostLacks) as raised:
        scene.ask(ENABLE)
    assert "sysctl -w net.ipv4.ip_forward=1" in str(raised.value.hint)
    assert (scenes.snapshot(scene.net), scene.recorded(), scene.net.forwards()) == (*before, False)


@pytest.mark.parametrize("field", [{"mac": "ff:ff:ff:ff:ff:ff"}, {"mtu": 0}, {"mtu": 10**6}, {"uid": 0}])
def test_h25_no_request_has_a_mac_or_mtu(field: dict[str, object], refused: Noted) -> None:
    """They are not even read."""
    refused("H25", unread("tap.ensure", **TAP, **field))


def test_h25_a_bridge_has_a_local_mac_of_its_own(scene: Scene) -> None:
    """It is unicast, locally administered, and does not change with the bridge's taps."""
    scene.ask(ENSURE)
    first = scene.net.link(BRIDGE)
    scene.ask(TapEnsure(vm="vm-2", bridge=BRIDGE, network=NETWORK))
    scene.ask(REMOVE)
    second = scene.net.link(BRIDGE)
    assert first is not None
    assert first == second
    assert first.mac is not None
    assert int(first.mac[:2], 16) & 0b11 == 0b10


@pytest.mark.parametrize("field", ["netns", "path", "pid"])
def test_h26_no_request_names_a_namespace(field: str, refused: Noted) -> None:
    """It is not even read."""
    refused("H26", unread("tap.ensure", **TAP, **{field: "/proc/1/ns/net"}))


def test_a_name_that_another_owner_has_is_not_removed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are short digests: one who finds an id with another owner's tap name can do nothing with it."""
    monkeypatch.setattr(names, "tap", lambda _uid, _vm: "fc-0123456789")
    scene.ask(ENSURE)
    scene.ask(ENABLE)
    theirs = TapEnsure(vm="vm-2", bridge="br-fc-2", network="10.78.0.0/24")
    for ask in (
        theirs,
        NatEnable(vm="vm-2", address="10.78.0.2"),
        NatDisable(vm="vm-2"),
        TapRemove(vm="vm-2"),
    ):
        declined(scene, ask, OTHER_UID, "not yours")


def test_a_vm_cannot_be_called_as_a_bridges_guards_are() -> None:
    """The word in a guard's mark is no VM's id, so no request touches a guard."""
    for verb in ("tap.remove", "nat.disable"):
        unread(verb, vm=f"guard:{BRIDGE}")


def test_h18_a_network_that_root_does_not_give_is_refused(scene: Scene) -> None:
    """An owner cannot have what the host reaches by its default route: root says what bridges may have."""
    host = replace(host_of(scene.net), networks=(IPv4Network("172.31.0.0/16"),))
    call = Call(caller=Caller(uid=UID, gid=UID), op="op-1", step="tap", epoch=1)
    before = scene.net.links()
    with pytest.raises(Refused, match="which root gives to bridges"):
        network.ensure_tap(host, scene.ledger, call, ENSURE)
    assert (scene.net.links(), scene.recorded()) == (before, [])
    inside = TapEnsure(vm=VM, bridge=BRIDGE, network="172.31.5.0/24")
    assert network.ensure_tap(host, scene.ledger, call, inside)["tap"]
