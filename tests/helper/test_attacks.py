"""What an attacker found a way to do once: each test is named by what it prevents."""

from __future__ import annotations

import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from banger.errors import HelperDown, Refused
from banger.helper import bridges, client, devicemapper, inmates, names, names_routing, netlink, storage
from banger.helper.jail import MAX_PAYLOAD, PAYLOADS
from banger.helper.net import Located, Route
from banger.helper.pool import Pool
from banger.helper.requests import (
    JailLaunch,
    NamesRoute,
    NatDisable,
    NatEnable,
    SnapshotRemove,
    TapEnsure,
    TapRemove,
)
from banger.helper.verbs import Call, Caller, Facts, Verb
from banger.helper.wire import Packet
from banger.testing.root_pool import RootPool, recording_host
from tests.helper import network_scenes as scenes
from tests.helper.conftest import NEEDS_ROOT, as_user
from tests.helper.fuse import Fuse
from tests.helper.network_scenes import OTHER_UID, UID, Scene
from tests.helper.test_jail import OWNER, VM, World, world
from tests.helper.test_jailer import JAIL, MARK, furnish, jailer, place

__all__ = ["jailer", "place", "world"]


def give_a_tap(world: World) -> str:
    """Let the VM have a tap, by the record of it."""
    tap = names.tap(OWNER, VM)
    world.ledger.intend("tap", tap, world.call(), VM, bridge="br-fc")
    world.host.net.make_tap(tap, OWNER, str(names.Mark(OWNER, VM, "op-1")), 1)
    return tap


@pytest.fixture
def taps(world: World) -> Iterator[dict[str, int]]:
    """Whose each tap is, as far as jails have to do with it."""
    owners: dict[str, int] = {}
    world.host.jails.give_tap = lambda tap, uid: owners.update({tap: uid})  # type: ignore[method-assign]
    yield owners
    for tap in world.ledger.of_owner(OWNER):
        world.ledger.release("tap", tap.name)


def test_the_next_jail_with_this_uid_has_not_the_tap_of_the_last(world: World, taps: dict[str, int]) -> None:
    """A tap is its owner's again when the jail is gone, whose uid another owner's jail may get."""
    tap = give_a_tap(world)
    inmate = world.launch()["uid"]
    assert taps == {tap: inmate}
    world.remove()
    assert taps == {tap: OWNER}


def test_a_launch_that_fails_leaves_the_tap_to_its_owner(world: World, taps: dict[str, int]) -> None:
    """What is begun and not completed gives nothing away for good."""
    tap = give_a_tap(world)

    def fails(jail: str, uid: int, mark: str) -> None:
        raise OSError(12, "no memory")

    world.host.jails.start = fails  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no memory"):
        world.launch()
    assert taps == {tap: OWNER}


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_file_that_grows_after_it_was_checked_is_not_copied(world: World, name: str) -> None:
    """Root's disk holds what was checked to fit, however long its owner makes the file then."""
    sent = [*world.payloads()]
    make = world.host.jails.make

    def grow_then_make(jail: str, mark: str) -> None:
        os.truncate(world.path / "owner" / name, MAX_PAYLOAD + 512)
        make(jail, mark)

    world.host.jails.make = grow_then_make  # type: ignore[method-assign]
    before = world.listing()
    with pytest.raises(Refused, match="are allowed"):
        world.launch(*sent)
    assert world.listing() == before


@NEEDS_ROOT
def test_a_node_that_is_held_on_to_opens_nothing_any_more(rooted: Path) -> None:
    """Who has a descriptor of a node, and opens that when its number is another device's, is refused."""
    node = rooted / "node"
    os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    os.chown(node, 1000, 1000)
    held = os.open(node, os.O_PATH)

    def reopened() -> bytes:
        try:
            os.close(os.open(f"/proc/self/fd/{held}", os.O_RDWR))
        except PermissionError:
            return b"refused"
        return b"opened"

    assert as_user(1000, reopened) == b"opened"
    assert devicemapper.give_node(node, 0) == 1000
    node.unlink()
    assert as_user(1000, reopened) == b"refused"
    os.close(held)


def test_a_disk_that_a_jail_has_a_node_of_is_not_removed(world: World) -> None:
    """The number of a node in a jail is never that of another owner's disk."""
    world.launch()
    with pytest.raises(Refused, match="has a jail"):
        storage.remove(world.host, world.ledger, world.call(), SnapshotRemove(vm=VM))
    world.remove()
    storage.remove(world.host, world.ledger, world.call(), SnapshotRemove(vm=VM))


# -- the network ---------------------------------------------------------------------------------


def bridge(number: int) -> TapEnsure:
    return TapEnsure(vm=f"vm-{number}", bridge=f"br-fc-{number}", network=f"10.{number}.0.0/16")


def test_an_owner_does_not_take_all_private_networks() -> None:
    """One owner's bridges are so few that other owners, and the host, find a network that is free."""
    with scenes.recorded() as scene:
        for number in range(bridges.MAX_BRIDGES):
            scene.ask(bridge(number))
        with pytest.raises(Refused, match="bridges already"):
            scene.ask(bridge(100))
        scene.ask(TapEnsure(vm="more", bridge="br-fc-0", network="10.0.0.0/16"))
        scene.ask(bridge(100), uid=OTHER_UID)
        scene.ask(TapRemove(vm="vm-1"))
        scene.ask(bridge(101))


def test_the_hosts_resolver_is_not_in_an_owners_network() -> None:
    """A guest cannot be who this host asks for names, when that is reached by the default route."""
    with scenes.recorded() as scene:
        cast("Any", scene.net).host.resolvers = [IPv4Address("10.7.0.53")]
        with pytest.raises(Refused, match=r"overlaps with 10\.7\.0\.53/32"):
            scene.ask(bridge(7))
        scene.ask(bridge(8))


def test_a_network_is_looked_at_again_when_its_bridge_is_gone() -> None:
    """What the host has got since then is its own, although the bridge is still on record."""
    with scenes.recorded() as scene:
        scene.ask(bridge(7))
        link, host = scene.net.link("br-fc-7"), cast("Any", scene.net).host
        assert link is not None
        scene.net.remove_link(link.index)
        host.addresses.append(Located(link=2, address=IPv4Interface("10.7.1.1/24")))
        with pytest.raises(Refused, match="overlaps"):
            scene.ask(bridge(7))


def test_a_network_of_the_widest_route_is_the_hosts() -> None:
    """A company's whole 10.0.0.0/8 by a route of its own is not to be had."""
    with scenes.recorded() as scene:
        cast("Any", scene.net).host.routes.append(Route(link=2, network=IPv4Network("10.0.0.0/8")))
        with pytest.raises(Refused, match="overlaps"):
            scene.ask(bridge(7))


def test_resolvers_are_read_from_the_hosts_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each IPv4 nameserver of resolv.conf(5) counts, and nothing else that is in it."""
    (tmp_path / "one").write_text(
        "# nameserver 10.0.0.9\nsearch x\nnameserver 10.7.0.53 \nnameserver ::1\nnameserver"
    )
    (tmp_path / "two").write_text("nameserver\t192.0.2.1\nnameserver 10.7.0.54 # x\n")
    files = tuple(str(tmp_path / name) for name in ("one", "none", "two"))
    monkeypatch.setattr(netlink, "RESOLV_CONF", files)
    assert [*map(str, netlink.KernelNet().resolvers())] == ["10.7.0.53", "192.0.2.1", "10.7.0.54"]


@pytest.mark.parametrize("whose", [(UID, "vm-2"), (OTHER_UID, "vm-1")])
def test_names_that_collide_are_refused(monkeypatch: pytest.MonkeyPatch, whose: tuple[int, str]) -> None:
    """Who searches for a VM whose tap has the name of another's gets nothing of it, nor takes it away."""
    monkeypatch.setattr(names, "tap", lambda *_: "fc-0123456789")
    uid, vm = whose
    with scenes.recorded() as scene:
        scene.ask(scenes.ENSURE)
        scene.ask(scenes.ENABLE)
        before = scenes.snapshot(scene.net), scene.recorded()
        for ask in (
            TapEnsure(vm=vm, bridge=scenes.BRIDGE, network=scenes.NETWORK),
            NatEnable(vm=vm, address="10.77.0.3"),
            NatDisable(vm=vm),
            TapRemove(vm=vm),
        ):
            with pytest.raises(Refused, match=r"not yours|has no tap"):
                scene.ask(ask, uid=uid)
        assert (scenes.snapshot(scene.net), scene.recorded()) == before


def test_no_way_out_without_a_whole_tap() -> None:
    """What is begun only, or has become another's, gets no rules."""
    with scenes.recorded() as scene:
        scene.ask(scenes.ENSURE)
        tap = names.tap(UID, scenes.VM)
        scene.ledger._db.execute("UPDATE held SET state = 'intended' WHERE kind = 'tap'")
        with pytest.raises(Refused, match="has no tap"):
            scene.ask(scenes.ENABLE)
        scene.ledger.hold("tap", tap)
        link = scene.net.link(tap)
        assert link is not None
        scene.net.set_alias(link.index, str(names.Mark(OTHER_UID, scenes.VM, "op-1")))
        with pytest.raises(Refused, match="has no tap"):
            scene.ask(scenes.ENABLE)


@pytest.mark.parametrize("name", ["br-fc-x", "fc-0"])
def test_no_way_out_by_what_has_a_name_of_ours(name: str) -> None:
    """An interface with our prefix is no egress, also when its mark is lost."""
    with scenes.recorded() as scene:
        scene.ask(scenes.ENSURE)
        scene.foreign_bridge(name)
        with pytest.raises(Refused, match="does not lead out"):
            scene.ask(NatEnable(vm=scenes.VM, address=scenes.ADDRESS, egress=name))


def route(scene: Scene, name: str, uid: int) -> Facts:
    call = Call(caller=Caller(uid=uid, gid=uid), op="op-1", step="names", epoch=1)
    return names_routing.route(recording_host(), scene.ledger, call, NamesRoute(bridge=name, port=5300))


def test_no_owner_answers_for_the_names_of_anothers_vms() -> None:
    """Names are asked of one owner's daemon, as long as his bridge is there."""
    with scenes.recorded() as scene:
        scene.ask(bridge(1))
        scene.ask(bridge(2), uid=OTHER_UID)
        assert route(scene, "br-fc-1", UID) == {"routed": True}
        assert route(scene, "br-fc-1", UID) == {"routed": True}
        assert route(scene, "br-fc-2", OTHER_UID)["routed"] is False
        scene.ask(TapRemove(vm="vm-1"))
        assert route(scene, "br-fc-2", OTHER_UID) == {"routed": True}


# -- who waits for whom --------------------------------------------------------------------------


def test_nobody_waits_behind_all_that_another_owner_has_asked(rooted: Path) -> None:
    """Of many requests of one owner and one of another, which comes last, that is carried out second."""
    (rooted / "state").mkdir(mode=0o700)
    begun, go_on, order = threading.Event(), threading.Event(), []

    def run(_: Any, __: Any, call: Call, ___: Any) -> Facts:
        order.append(call.caller.uid)
        begun.set()
        assert go_on.wait(20)
        return {}

    pool = Pool(str(rooted / "state"), lambda _: {TapRemove: Verb(ask=TapRemove, run=run)}, recording_host())
    worker = threading.Thread(target=pool.work)
    worker.start()

    def asked(uid: int, key: str) -> threading.Thread:
        request = {
            "op": "op-1",
            "step": "s",
            "epoch": 1,
            "key": key,
            "ask": {"verb": "tap.remove", "vm": "x"},
        }
        packet = Packet(msgspec.json.encode(request), (), True)
        thread = threading.Thread(target=pool.answer, args=(Caller(uid=uid, gid=uid), packet))
        thread.start()
        return thread

    try:
        threads = [asked(7, f"a{number}") for number in range(10)]
        assert begun.wait(20)
        while len(pool._jobs) < 9:
            threading.Event().wait(0.01)
        threads.append(asked(8, "b"))
        while len(pool._jobs) < 10:
            threading.Event().wait(0.01)
        go_on.set()
        for thread in threads:
            thread.join()
        assert order == [7, 8, *[7] * 9]
    finally:
        go_on.set()
        pool.stop()
        worker.join()
        pool.close()


@NEEDS_ROOT
@pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="needs FUSE")
def test_a_file_system_that_does_not_answer_holds_up_nobody_else(rooted: Path) -> None:
    """Root's one worker never waits for what a process of an owner's has to answer."""
    (rooted / "there").mkdir()
    with RootPool([0, 1000]) as pool, Fuse(rooted / "there", 1000) as there:
        file = os.open(rooted / "there/file", os.O_RDONLY)
        try:
            launch = JailLaunch(vm="web", disks=0)
            with pytest.raises(Refused, match="does not rely on"):
                pool.ask(launch, fds=[file, file])
            there.silent = True
            with pytest.raises(HelperDown, match="timed out"):
                pool.ask(launch, fds=[file, file], timeout_s=1)
            assert isinstance(pool.ask(TapRemove(vm="web"), timeout_s=10), client.Answer)
        finally:
            there.silent = False
            os.close(file)


# -- whose process it is -------------------------------------------------------------------------


@NEEDS_ROOT
@pytest.mark.parametrize("flaw", ["another's", "only to be read"])
def test_an_owner_cannot_have_a_program_of_roots_ended(
    jailer: Any, rooted: Path, flaw: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of root's is no inmate for an output that its owner could have given it."""
    furnish(jailer)
    console = os.memfd_create(MARK)
    if flaw == "another's":
        os.fchown(console, 1000, 1000)
    else:
        writable, console = console, os.open(f"/proc/self/fd/{console}", os.O_RDONLY)
        os.close(writable)
    program = subprocess.Popen(["sleep", "60"], stdout=console)
    try:
        assert jailer.inmates(JAIL) == []
        monkeypatch.setattr(inmates, "is_console", lambda *_: True)
        assert not any(inmate.pid == program.pid for inmate in jailer.inmates(JAIL))
    finally:
        os.close(console)
        program.kill()
        program.wait()


def test_a_user_of_any_source_is_known(jailer: Any) -> None:
    """The host's own look-up knows root, and does not know a uid that nobody has."""
    assert jailer.is_known(0)
    assert not jailer.is_known(4_000_000_000)
