from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from banger.helper import names, nftables
from banger.helper.ledger import Ledger
from banger.helper.net import GuardTo, Net
from banger.helper.netlink import IFF_NO_PI, IFF_TAP, IFREQ, TUNSETIFF, KernelNet
from banger.helper.requests import Ask, NatEnable, TapEnsure, TapRemove
from banger.testing.child import Child
from banger.testing.root_net import RecordingNet, new_host
from tests.helper import netns
from tests.helper import network_scenes as scenes
from tests.helper.network_scenes import (
    ADDRESS,
    BRIDGE,
    DISABLE,
    ENABLE,
    ENSURE,
    NETWORK,
    REMOVE,
    UID,
    VM,
    Scene,
)

needs_root = pytest.mark.skipif(not scenes.is_root(), reason="needs root and tun")

WORLD = ("192.0.2.1", 7777)
SOON_S, NEVER_S = 5.0, 0.4
TAP = names.tap(UID, VM)


@pytest.fixture
def scene() -> Iterator[Scene]:
    """A namespace of a kernel."""
    with scenes.real() as found:
        yield found


@pytest.fixture
def world(scene: Scene) -> Iterator[netns.Place]:
    """What is beyond the host's `eth0`: a server that first tells where a connection came from."""
    with netns.Place() as place:
        netns.run(f"ip link set world0 netns {place.path}")
        for words in ("link set lo up", "addr add 192.0.2.1/24 dev world0", "link set world0 up"):
            place.run(f"ip {words}")
        server = place.do(lambda: socket.create_server(WORLD))
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        yield place
        place.run("ip link del world0")
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def serve(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, (address, _) = server.accept()
            threading.Thread(target=echo, args=(connection, address), daemon=True).start()


def echo(connection: socket.socket, address: str) -> None:
    with connection, contextlib.suppress(OSError):
        connection.sendall(address.encode())
        while data := connection.recv(100):
            connection.sendall(data)


def reach(where: tuple[str, int], timeout_s: float = SOON_S) -> socket.socket:
    return socket.create_connection(where, timeout=timeout_s)


def said(connection: socket.socket) -> str:
    return connection.recv(100).decode()


def is_cut(place: netns.Place, where: tuple[str, int]) -> bool:
    """Tell whether nothing answers there, not even that there is nothing."""
    try:
        place.do(lambda: reach(where, NEVER_S)).close()
    except TimeoutError:
        return True
    return False


@contextlib.contextmanager
def guest(address: str = ADDRESS, vm: str = VM) -> Iterator[netns.Place]:
    with netns.guest(names.tap(UID, vm), f"{address}/24", "10.77.0.1") as place:
        yield place


# -- what rules do -----------------------------------------------------------------------------------


@needs_root
def test_a_vm_reaches_the_world_while_it_may(scene: Scene, world: netns.Place) -> None:
    """With a way out it has the host's address; without one it reaches nothing, by old connections either."""
    scene.ask(ENSURE)
    with guest() as vm:
        assert is_cut(vm, WORLD)
        scene.ask(ENABLE)
        with vm.do(lambda: reach(WORLD)) as connection:
            assert said(connection) == "192.0.2.2"
            scene.ask(DISABLE)
            connection.settimeout(NEVER_S)
            connection.sendall(b"still there?")
            with pytest.raises(TimeoutError):
                connection.recv(100)
            assert is_cut(vm, WORLD)
        # What becomes of the old connection is between its two ends: a new one is let out again.
        scene.ask(ENABLE)
        with vm.do(lambda: reach(WORLD)) as connection:
            assert said(connection) == "192.0.2.2"


@needs_root
def test_the_world_does_not_reach_a_vm(scene: Scene, world: netns.Place) -> None:
    """What begins outside does not come in, with a way out or without."""
    scene.ask(ENSURE)
    world.run("ip route add 10.77.0.0/24 via 192.0.2.2")
    with guest() as vm, vm.do(lambda: socket.create_server((ADDRESS, 80))):
        assert is_cut(world, (ADDRESS, 80))
        scene.ask(ENABLE)
        assert is_cut(world, (ADDRESS, 80))


@needs_root
def test_a_way_out_is_one_vms(scene: Scene, world: netns.Place) -> None:
    """Its neighbour reaches the VM, and the host, but not the world."""
    scene.ask(ENSURE)
    scene.ask(ENABLE)
    scene.ask(TapEnsure(vm="vm-2", bridge=BRIDGE, network=NETWORK))
    with (
        guest() as vm,
        guest("10.77.0.3", "vm-2") as neighbour,
        vm.do(lambda: socket.create_server((ADDRESS, 80))),
    ):
        neighbour.do(lambda: reach((ADDRESS, 80))).close()
        with socket.create_server(("10.77.0.1", 80)):
            neighbour.do(lambda: reach(("10.77.0.1", 80))).close()
        assert is_cut(neighbour, WORLD)


@needs_root
def test_two_bridges_are_apart(scene: Scene) -> None:
    """A VM does not reach one of another owner by the host, not even when both may reach the world."""
    scene.ask(ENSURE)
    scene.ask(ENABLE)
    other = scenes.OTHER_UID
    scene.ask(TapEnsure(vm=VM, bridge="br-fc-2", network="10.78.0.0/24"), uid=other)
    scene.ask(NatEnable(vm=VM, address="10.78.0.2"), uid=other)
    with (
        guest() as vm,
        netns.guest(names.tap(other, VM), "10.78.0.2/24", "10.78.0.1") as theirs,
        theirs.do(lambda: socket.create_server(("10.78.0.2", 80))),
    ):
        assert is_cut(vm, ("10.78.0.2", 80))


@needs_root
def test_a_vm_does_not_reach_the_hosts_loopback(scene: Scene) -> None:
    """The kernel drops what a VM sends to the host's 127.0.0.1, unless the host is told to route it."""
    scene.ask(ENSURE)
    with guest() as vm, socket.create_server(("127.0.0.1", 80)) as server:
        vm.do(lambda: route_loopback("eth0"))
        vm.run("ip addr del 127.0.0.1/8 dev lo")
        vm.run("ip route add 127.0.0.1/32 via 10.77.0.1")
        assert is_cut(vm, server.getsockname())
        route_loopback(BRIDGE)
        vm.do(lambda: reach(server.getsockname())).close()


def route_loopback(interface: str) -> None:
    Path(f"/proc/sys/net/ipv4/conf/{interface}/route_localnet").write_text("1")


@needs_root
def test_a_vm_does_not_become_the_hosts_router(scene: Scene) -> None:
    """An IPv6 router advertisement of a VM has no effect on the host; without the guard it has."""
    scene.ask(ENSURE)
    with guest() as vm:
        eventually(lambda: "tentative" not in vm.run("ip -6 addr show dev eth0 scope link"))
        vm.do(advertise_itself)
        time.sleep(NEVER_S)
        assert "default" not in netns.run("ip -6 route")
        netns.run("nft flush chain inet banger input")
        vm.do(advertise_itself)
        eventually(lambda: f"dev {BRIDGE}" in netns.run("ip -6 route show default"))


def advertise_itself() -> None:
    """Send a router advertisement (RFC 4861, section 4.2) to all nodes."""
    advertisement = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as sender:
        sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        sender.sendto(advertisement, ("ff02::1", 0, 0, socket.if_nametoindex("eth0")))


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- what other programs see -------------------------------------------------------------------------


@needs_root
def test_nft_and_ip_show_whose_things_are(scene: Scene) -> None:
    """An administrator reads each rule as it was meant, with its mark, and each interface's mark."""
    scene.ask(ENSURE)
    scene.ask(ENABLE)
    mark, guard = f'comment "banger {UID} {VM} op-1"', f'comment "banger {UID} guard:{BRIDGE} op-1"'
    out, back = f'iifname "{BRIDGE}" oifname "eth0"', f'iifname "eth0" oifname "{BRIDGE}"'
    assert chains(netns.run("nft list table inet banger")) == [
        f'iifname "{BRIDGE}" meta nfproto ipv6 drop {guard}',
        f"{back} ip daddr {ADDRESS} ct state established,related accept {mark}",
        f"{out} ip saddr {ADDRESS} ct state established,related,new accept {mark}",
        f'iifname "{BRIDGE}" oifname != "{BRIDGE}" drop {guard}',
        f'oifname "{BRIDGE}" iifname != "{BRIDGE}" drop {guard}',
        f'ip saddr {ADDRESS} oifname "eth0" masquerade {mark}',
    ]
    links = {link["ifname"]: link for link in json.loads(netns.run("ip -j -d link"))}
    assert links[TAP]["ifalias"] == f"banger {UID} {VM} op-1"
    assert (links[TAP]["master"], links[TAP]["linkinfo"]["info_data"]["persist"]) == (BRIDGE, True)
    assert links[BRIDGE]["ifalias"] == f"banger {UID}  op-1"


def chains(ruleset: str) -> list[str]:
    """Give the rules of a table as nft writes them, in their order."""
    lines = [line.strip() for line in ruleset.splitlines()]
    return [line for line in lines if not line.startswith(("table ", "chain ", "type ", "}")) and line]


@needs_root
def test_h23_other_products_tables_stay(scene: Scene) -> None:
    """Tables, chains and rules of others are as before, in their tables and in ours."""
    for words in (
        "add table inet other",
        "add chain inet other forward { type filter hook forward priority 0 ; }",
        "add rule inet other forward iifname lo accept comment their-own",
        "add table ip banger",
        "add chain ip banger forward",
        "add rule ip banger forward counter drop",
    ):
        netns.run(f"nft {words}")
    before = netns.run("nft list ruleset")
    for ask in (ENSURE, ENABLE):
        scene.ask(ask)
    netns.run("nft add rule inet banger forward iifname lo drop")
    netns.run(f'nft add rule inet banger forward iifname lo accept comment "banger {UID}"')
    scene.ask(REMOVE)
    theirs = chains(netns.run("nft list table inet banger"))
    assert theirs == ['iifname "lo" drop', f'iifname "lo" accept comment "banger {UID}"']
    netns.run("nft delete table inet banger")
    assert netns.run("nft list ruleset") == before


@needs_root
@pytest.mark.parametrize("data", [b"\1\4\0\0\0\0", b"\0\3\xff\xfe\0", b"\0\x20banger", b"\1", b"\0\0", b"\0"])
def test_h23_user_data_that_is_no_comment_is_no_mark(
    scene: Scene, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever another program has put into a rule, the rule is listed, and stays."""
    scene.ask(ENSURE)
    with monkeypatch.context() as patched:
        patched.setattr(nftables, "_user_data", lambda _: data)
        scene.net.change_rules(add=[GuardTo(comment="", bridge="br-other")])
    theirs = [rule for rule in scene.net.rules() if names.read_mark(rule.comment) is None]
    assert len(theirs) == 1
    scene.ask(REMOVE)
    assert scene.net.rules() == theirs


@needs_root
def test_a_tap_is_for_its_owner(scene: Scene) -> None:
    """Its owner may open it without any right; another user may not."""
    scene.ask(ENSURE)
    assert Child(lambda: opened(UID)).ended().result() == b"opened"
    assert Child(lambda: opened(scenes.OTHER_UID)).ended().result() == b"refused"


def opened(uid: int) -> bytes:
    with open("/dev/net/tun", "r+b", buffering=0) as tap:  # noqa: PTH123  a device
        os.setresuid(uid, uid, uid)
        try:
            fcntl.ioctl(tap, TUNSETIFF, IFREQ.pack(TAP.encode(), IFF_TAP | IFF_NO_PI))
        except PermissionError:
            return b"refused"
        return b"opened"


# -- any death, and many lives -----------------------------------------------------------------------


class Dying:
    """Something whose n-th use is the process's end."""

    def __init__(self, alive: object, clock: Clock):
        self._alive, self._clock = alive, clock

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._alive, name)

        def use(*words: Any, **fields: Any) -> Any:
            self._clock.tick()
            return found(*words, **fields)

        return use


class Clock:
    """Counts uses of what is mortal, and each ioctl; at the last one the process is killed."""

    def __init__(self, left: int):
        self._left = left
        sys.addaudithook(lambda event, _: self.tick() if event == "fcntl.ioctl" else None)

    def tick(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


Open = Callable[[], Net]

BEFORE: dict[str, tuple[tuple[Ask, ...], Ask]] = {
    "ensure": ((), ENSURE),
    "second": ((TapEnsure(vm="vm-0", bridge=BRIDGE, network=NETWORK),), ENSURE),
    "enable": ((ENSURE,), ENABLE),
    "again": ((ENSURE, ENABLE), NatEnable(vm=VM, address="10.77.0.9")),
    "disable": ((ENSURE, ENABLE), DISABLE),
    "remove": ((ENSURE, ENABLE), REMOVE),
}
FAREWELL = (DISABLE, REMOVE, TapRemove(vm="vm-0"))
FEWEST, MOST_USES = 4, 100
BOTH = (True, False)
SHORT = ("ensure", "enable", "remove")
"""What is tried on a kernel in each run, with one of the ends after each death: removals take it long."""


def dies(opened: Open, file: Path, ask: Ask, left: int) -> bool:
    """Carry a request out in a process that dies at its n-th use of host and ledger; tell whether it did."""

    def job() -> bytes:
        clock = Clock(left)
        net, ledger = Dying(opened(), clock), Dying(scenes.ledger(file), clock)
        Scene(cast("Net", net), cast("Ledger", ledger), scenes.forward).ask(ask)
        return b""

    ending = Child(job).ended()
    return ending.killed or bool(ending.result())


def survive(opened: Open, file: Path, case: str, ends: Sequence[Sequence[bool]]) -> int:
    """Die at each use of host and ledger, then ask again, or turn back; gives the number of deaths.

    `ends` tells, for one death after another, which of the two is tried.
    """
    earlier, ask = BEFORE[case]
    clean = scenes.snapshot(opened())
    expected = played(opened, file, (*earlier, ask))
    for deaths in range(1, MOST_USES):
        for again in ends[deaths % len(ends)]:
            played(opened, file, FAREWELL)
            assert (scenes.snapshot(opened()), records(file)) == (clean, [])
            played(opened, file, earlier)
            died = dies(opened, file, ask, deaths)
            if again:
                assert played(opened, file, (ask,)) == expected, deaths
        if not died:
            played(opened, file, FAREWELL)
            assert (scenes.snapshot(opened()), records(file)) == (clean, [])
            return deaths - 1
    raise AssertionError


def played(opened: Open, file: Path, asks: tuple[Ask, ...]) -> tuple[Any, ...]:
    """Carry requests out, and give what there is then: on the host, on record, and by the listing."""
    scene = Scene(opened(), scenes.ledger(file), scenes.forward)
    for ask in asks:
        scene.ask(ask)
    return scenes.snapshot(scene.net), records(file), scene.listing()


def records(file: Path) -> list[Any]:
    found = Scene(RecordingNet(), scenes.ledger(file), scenes.forward).recorded()
    return [
        (row.kind, row.name, row.uid, row.vm, row.op, row.state, {**row.facts, "ifindex": 0}) for row in found
    ]


@pytest.mark.parametrize("case", BEFORE)
def test_any_death_on_record(case: str, tmp_path: Path) -> None:
    """Killed at any use of a host that is a record, a request asked again or taken back ends as ever."""

    def opened() -> Net:
        return RecordingNet(tmp_path / "host.json", new_host())

    assert survive(opened, tmp_path / "root.db", case, [BOTH]) >= FEWEST


@needs_root
@pytest.mark.parametrize("case", BEFORE)
def test_any_death(case: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Killed at any use of the kernel, inside of making a tap as well, it ends as ever."""
    thorough = request.config.getoption("--matrix")
    if not thorough and case not in SHORT:
        pytest.skip("a part of the long matrix")
    with contextlib.ExitStack() as stack:
        stack.enter_context(scenes.real())
        nets = [net := KernelNet()]
        stack.callback(net.close)
        own = os.getpid()
        survived = survive(
            lambda: nets[0] if os.getpid() == own else KernelNet(),
            tmp_path / "root.db",
            case,
            [BOTH] if thorough else [[True], [False]],
        )
        assert survived >= FEWEST


@needs_root
@pytest.mark.timeout(1200)  # the kernel takes 50 ms and more to remove a tap and a bridge
def test_many_lives_leave_nothing(scene: Scene, request: pytest.FixtureRequest) -> None:
    """VMs come and go, and not a descriptor, interface, rule or record is left."""
    scene.ask(ENSURE)
    scene.ask(REMOVE)
    gc.collect()  # what other tests have left open
    before = scenes.snapshot(scene.net), descriptors()
    for _ in range(1000 if request.config.getoption("--matrix") else 30):
        for ask in (ENSURE, ENABLE, REMOVE):
            scene.ask(ask)
    assert (scenes.snapshot(scene.net), descriptors()) == before
    assert scene.recorded() == []
    assert netns.run("nft list ruleset") == ""


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
