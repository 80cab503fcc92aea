"""Requests by the hundred thousand, good and hostile: no effect on a recorded kernel but on what is ours.

The judge knows nothing of the handlers: it looks at each effect that is asked of the kernel, and at what
other people had on the host before.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from banger.errors import BangerError
from banger.helper import names, net, table
from banger.helper.disks import Backing, Device, Loop, Snapshot
from banger.helper.host import Host
from banger.helper.jails import UIDS, Inmate
from banger.helper.ledger import Ledger
from banger.helper.names import Mark, read_mark
from banger.helper.pool import Verbs
from banger.helper.requests import PRIVATE, AnyAsk, Ask, Request
from banger.helper.store import Store
from banger.helper.verbs import Call, Caller
from banger.helper.wire import close_all
from banger.testing.root_pool import recording_host
from tests.helper.conftest import NEEDS_ROOT, descriptors

pytestmark = NEEDS_ROOT

QUICK, WHOLE = 2_000, 100_000
"""Requests per verb: in every run, and in the long matrix."""

OWNERS = (1000, 1001)
ASKS: dict[str, type[Ask]] = {str(ask.__struct_config__.tag): ask for ask in get_args(AnyAsk)}
VMS = [f"vm-{number}" for number in range(6)]
BRIDGES = ["br-fc", "br-fc-a", "br-fc-theirs"]
NETWORKS = ["172.30.0.0/24", "172.31.0.0/16", "10.9.8.0/29", "192.168.7.0/24"]
GOOD: dict[str, list[Any]] = {
    "vm": VMS,
    "bridge": BRIDGES,
    "network": NETWORKS,
    "address": ["172.30.0.2", "172.30.0.3", "172.31.0.9", "10.9.8.2", "172.30.0.1", "172.30.0.255"],
    "egress": [None, "eth0", "lo", "br-fc", "eth9"],
    "port": [1024, 42069, 65535],
    "disks": [0, 1, 2],
    "snapshot": [True, False],
    "socket": ["api", "vsock"],
    "signal": ["TERM", "KILL"],
    "of": ["op-1"],
}
HOSTILE: list[Any] = [
    *("", " ", ".", "..", "../x", "/etc/shadow", "a/b", "-rf", "--no-seccomp", "VM", "vm\n", "vm\0", "vm "),
    *(
        "x" * 64,
        "x" * 63,
        "é",
        "\u202e",
        "\x1b[2J",
        "%s",
        "$(id)",
        "`id`",
        "vm;id",
        "0",
        "1e3",
        "٣",
        "vm-0/../..",
    ),
    *(
        "br-fc/../eth0",
        "br-fc-" + "x" * 20,
        "br-fc\n",
        "br-fc ",
        "BR-FC",
        "br-fcx",
        "br-fc-",
        "eth0",
        "lo",
        "br0",
    ),
    *("0.0.0.0/0", "10.0.0.0/7", "10.0.0.0/33", "10.0.0.0/08", "::/0", "::ffff:10.0.0.0/104", "10.0.0.1/24"),
    *(
        "8.8.8.0/24",
        "10.0.0.0/30",
        "10.0.0.0/15",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "10.0.0.0",
        "10.0.0.0/24\n",
    ),
    *(
        "8.8.8.8",
        "127.0.0.1",
        "010.0.0.1",
        "10.0.0.256",
        "10.1",
        "0x0a000001",
        "10.0.0.1%eth0",
        "eth0 -j ACCEPT",
    ),
    *(
        "/proc/1/ns/net",
        "fc-rootfs-../control",
        "fc-rootfs-\n0 1 linear",
        "KILL\n",
        "9",
        "STOP",
        "control",
        "tap",
    ),
    *(
        0,
        1,
        -1,
        22,
        1023,
        65536,
        2**31,
        2**63,
        2**64,
        -(2**63),
        1.5,
        1e308,
        True,
        False,
        None,
        [],
        {},
        [1],
        {"a": 1},
    ),
]
EXTRA = "uid gid pid path device name args exec_file netns uuid mac mtu env key verb ask".split()

EFFECTS = Counter[str]()


class Judge:
    """Stands before a seam: each effect must be on what is ours, for the caller of the moment."""

    def __init__(self, seam: Any, checks: Any):
        self.seam = seam
        self._checks = checks

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.seam, name)
        check = getattr(self._checks, name, None)
        if check is None:
            assert name in READS, f"{name} is an effect that nobody has judged"
            return found

        def call(*words: Any, **named: Any) -> Any:
            check(*words, **named)
            EFFECTS[name] += 1
            return found(*words, **named)

        return call


READS = set(
    "link links addresses routes default_egress forwards rules loops devices can_snapshot status version"
    " jails spoken_for is_known resolvers inmates ended console running uids".split()
)


class Checks:
    """What may be asked of each seam, written from the promises and not from the handlers."""

    def __init__(self, host: Host):
        self.host = host
        self.caller = OWNERS[0]

    def ours(self, text: str | None) -> Mark:
        mark = read_mark(text)
        assert mark is not None, text
        assert mark.uid == self.caller, text
        return mark

    def link_of(self, index: int) -> net.Link:
        found = next(link for link in self.host.net.links() if link.index == index)
        assert re.fullmatch(r"fc-[0-9a-f]{10}|br-fc|br-fc-[a-z0-9]{1,9}", found.name), found
        assert found.name != "br-fc-theirs"
        if found.alias is not None:
            self.ours(found.alias)
        return found

    # -- Net

    def make_bridge(self, name: str, mac: str) -> None:
        assert re.fullmatch(r"br-fc|br-fc-[a-z0-9]{1,9}", name)
        assert re.fullmatch(r"[0-9a-f][26ae](:[0-9a-f]{2}){5}", mac), mac

    def set_alias(self, index: int, alias: str) -> None:
        assert self.link_of(index).alias is None
        self.ours(alias)

    def add_address(self, index: int, address: IPv4Interface) -> None:
        assert self.link_of(index).name.startswith("br-fc")
        assert 16 <= address.network.prefixlen <= 29
        assert any(address.ip in network for network in PRIVATE)

    def set_up(self, index: int) -> None:
        self.link_of(index)

    def make_tap(self, name: str, uid: int, alias: str, bridge: int) -> None:
        assert uid == self.caller
        assert name == names.tap(uid, self.ours(alias).vm)
        assert self.link_of(bridge).name.startswith("br-fc")

    def attach(self, index: int, bridge: int) -> None:
        assert self.link_of(index).name.startswith("fc-")
        assert self.link_of(bridge).name.startswith("br-fc")

    def remove_link(self, index: int) -> None:
        self.link_of(index)

    def change_rules(self, *, add: Any = (), remove: Any = ()) -> None:
        for rule in remove:
            self.ours(rule.comment)
        for rule in add:
            assert isinstance(rule, get_args(net.Wanted))
            self.ours(rule.comment)
            assert getattr(rule, "egress", "eth0") == "eth0"
            assert re.fullmatch(r"br-fc|br-fc-a", getattr(rule, "bridge", "br-fc"))
            address = getattr(rule, "address", None)
            assert address is None or any(address in network for network in PRIVATE)

    def remove_table(self) -> None:
        for rule in self.host.net.rules():
            self.ours(rule.comment)

    # -- Resolver

    def route(self, interface: str, port: int) -> None:
        assert re.fullmatch(r"br-fc|br-fc-a", interface)
        assert type(port) is int
        assert 1024 <= port <= 65535

    # -- Disks

    def attach_loop(self, fd: int, mark: str, read_only: bool) -> None:
        found = os.fstat(fd)
        assert (found.st_mode & 0o170000) == 0o100000
        # What is open to be read only, its owner let the caller read; a descriptor is the proof.
        assert read_only or found.st_uid == self.caller
        self.ours(mark)

    def detach(self, loop: Loop) -> None:
        self.ours(loop.mark)

    def create(self, snapshot: Snapshot) -> None:
        assert snapshot.uid == self.caller
        vm = snapshot.name.removeprefix(f"fc-rootfs-{self.caller}-")
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", vm)
        assert snapshot.uuid == f"BANGER-{self.caller}-{vm}"
        for number in (snapshot.origin, snapshot.cow):
            (loop,) = [loop for loop in self.host.disks.loops() if loop.number == number]
            self.ours(loop.mark)
        assert 0 < snapshot.sectors <= 16 * 2**40 // 512

    def node(self, snapshot: Snapshot) -> None:
        self.create(snapshot)

    def remove(self, name: str, uuid: str) -> None:
        assert name.startswith(f"fc-rootfs-{self.caller}-")
        assert uuid.startswith(f"BANGER-{self.caller}-")


class JailChecks(Checks):
    """The same for jails, whose methods have some of the same names."""

    def jail(self, name: str) -> None:
        assert name in {names.jail(self.caller, vm) for vm in self.vms}, name

    vms: tuple[str, ...] = ()

    def make(self, jail: str, mark: str) -> None:
        self.jail(jail)
        self.ours(mark)

    def put_file(self, jail: str, name: str, fd: int, size: int, uid: int) -> None:
        self.jail(jail)
        assert name in ("kernel", "initrd")
        assert uid in UIDS
        found = os.fstat(fd)
        assert (found.st_mode & 0o170000) == 0o100000
        assert size == found.st_size

    def put_device(self, jail: str, name: str, device: str, uid: int, read_only: bool) -> None:  # noqa: ARG002  the seam's
        self.jail(jail)
        assert re.fullmatch(r"[a-z][a-z0-9]{0,15}", name)
        if match := re.fullmatch(r"/dev/loop([0-9]+)", device):
            (loop,) = [loop for loop in self.host.disks.loops() if loop.number == int(match[1])]
            self.ours(loop.mark)
        else:
            assert device.startswith(f"/dev/mapper/fc-rootfs-{self.caller}-")
        assert uid in UIDS

    def give_tap(self, tap: str, uid: int) -> None:
        assert re.fullmatch(r"fc-[0-9a-f]{10}", tap)
        found = self.host.net.link(tap)
        self.ours(found.alias if found else None)
        assert uid in UIDS or uid == self.caller

    def start(self, jail: str, uid: int, mark: str) -> None:
        self.jail(jail)
        self.ours(mark)
        assert uid in UIDS

    def signal(self, jail: str, inmate: Inmate, number: int) -> None:
        self.jail(jail)
        assert inmate.pid > 1
        assert number in (signal.SIGTERM, signal.SIGKILL)

    def connect(self, jail: str, door: str) -> None:
        self.jail(jail)
        assert door in ("api", "vsock")

    def remove(self, name: str, uuid: str = "") -> None:
        assert not uuid
        self.jail(name)


class DiskChecks(Checks):
    """The same for disks: `attach` is of a loop."""

    attach = Checks.attach_loop  # type: ignore[assignment]  # two seams have a method of this name


class World:
    """A recorded host with other people's things on it, a ledger, and descriptors to send."""

    def __init__(self, directory: Path, seed: int):
        self.random = random.Random(seed)
        self.bare = recording_host()
        _plant(self.bare)
        self.before = theirs(self.bare)
        self.checks = (Checks(self.bare), DiskChecks(self.bare), JailChecks(self.bare))
        self.host = Host(
            net=Judge(self.bare.net, self.checks[0]),
            disks=Judge(self.bare.disks, self.checks[1]),
            jails=Judge(self.bare.jails, self.checks[2]),
            resolver=Judge(self.bare.resolver, self.checks[0]),
        )
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        self.ledger = Ledger(self.db)
        (directory / "state").mkdir(exist_ok=True)
        self.store = Store(str(directory / "state"))
        self.verbs: Verbs = table.verbs(self.store)
        self.fds = list(_descriptors(directory))
        self.outcomes = Counter[str]()

    def request(self, verb: str) -> bytes:
        """Make a request of a verb: mostly good, or with something wrong in it."""
        ask = {name: self.random.choice(GOOD[name]) for name in ASKS[verb].__struct_fields__}
        document: dict[str, Any] = {
            "op": "op-1",
            "step": "step",
            "epoch": 1,
            "key": "k",
            "ask": {"verb": verb, **ask},
        }
        if self.random.random() < 0.6:
            self._spoil(document if self.random.random() < 0.1 else document["ask"])
        data = json.dumps(document).encode()
        if self.random.random() < 0.02:
            at = self.random.randrange(len(data))
            data = data[:at] + bytes([self.random.randrange(256)]) + data[at + self.random.randrange(2) :]
        return data

    def _spoil(self, part: dict[str, Any]) -> None:
        match self.random.randrange(6):
            case 0 if len(part) > 1:
                del part[self.random.choice(list(part))]
            case 1:
                part[self.random.choice(EXTRA)] = self.random.choice(HOSTILE)
            case _:
                part[self.random.choice(list(part))] = self.random.choice(HOSTILE)

    def send(self, data: bytes) -> None:
        """Carry a request out as the pool does: decode, count descriptors, run the handler."""
        try:
            request = msgspec.json.decode(data, type=Request)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.outcomes["not understood"] += 1
            return
        verb = self.verbs[type(request.ask)]
        uid = self.random.choice(OWNERS)
        for checks in self.checks:
            checks.caller = uid
        self.checks[2].vms = (*VMS, str(getattr(request.ask, "vm", "")))
        fds = tuple(self.random.choices(self.fds, k=verb.fds(request.ask)))
        caller = Caller(uid=uid, gid=uid)
        call = Call(caller=caller, op=request.op, step=request.step, epoch=request.epoch, fds=fds)
        try:
            facts = verb.run(self.host, self.ledger, call, request.ask)
            json.dumps(facts)
            self.outcomes["ok"] += 1
        except BangerError as error:
            self.outcomes[error.code] += 1
        finally:
            close_all(call.give)
            for seam in (self.bare.net, self.bare.disks, self.bare.jails):
                getattr(seam, "calls", []).clear()

    def close(self) -> None:
        """Close what is open."""
        close_all(self.fds)
        self.db.close()
        self.store.close()


def _plant(host: Host) -> None:
    """Put things of other people on a host, with names like ours."""
    record: Any = host.net
    record.make_bridge("br-fc-theirs", "02:00:00:00:00:99")
    bridge = record.link("br-fc-theirs").index
    record.make_tap(names.tap(OWNERS[0], VMS[5]), 4242, "not ours", bridge)
    record.make_bridge("virbr0", "02:00:00:00:00:98")
    disks: Any = host.disks
    for number, mark in enumerate(("", "/var/lib/snapd/x.snap", f"banger 4242 {VMS[0]} op-1")):
        disks.plant(Loop(number=number, backing=Backing(1, number), mark=mark, read_only=True, leaving=False))
    for name, uuid in ((names.device(OWNERS[0], VMS[4]), "LVM-abc"), ("vg-root", "LVM-def")):
        disks.plant(Device(name=name, uuid=uuid, live=True, loops=(0,)))
    jails: Any = host.jails
    jails.make("4242-theirs", "banger 4242 vm-0 op-1")


def theirs(host: Host) -> list[object]:
    """List what other people have on the host."""
    links = [
        link for link in host.net.links() if (mark := read_mark(link.alias)) is None or mark.uid not in OWNERS
    ]
    loops = [
        loop
        for loop in host.disks.loops()
        if (mark := read_mark(loop.mark)) is None or mark.uid not in OWNERS
    ]
    devices = [device for device in host.disks.devices() if not device.uuid.startswith("BANGER-")]
    jails = [
        jail
        for jail in host.jails.jails()
        if (mark := read_mark(jail.mark)) is None or mark.uid not in OWNERS
    ]
    bridges = {"br-fc", "br-fc-a"}
    return [[link for link in links if link.name not in bridges], loops, devices, jails]


def _descriptors(directory: Path) -> Iterator[int]:
    """Open good files of each owner, and what is no file, is another's, is empty, or cannot be read."""
    for number in range(8):
        file = directory / f"file-{number}"
        file.touch()
        os.truncate(file, (2 << 20) + 512 * (number % 2))
        os.chown(file, OWNERS[number % 2], 0)
        yield os.open(file, os.O_RDWR if number < 6 else os.O_RDONLY)
    for name, uid, size in (
        ("roots", 0, 1 << 20),
        ("strangers", 4242, 1 << 20),
        ("empty", 1000, 0),
        ("odd", 1000, 513),
    ):
        (directory / name).touch()
        os.truncate(directory / name, size)
        os.chown(directory / name, uid, 0)
        yield os.open(directory / name, os.O_RDWR)
    os.link(directory / "file-0", directory / "second-name")
    yield os.open(directory / "file-1", os.O_WRONLY)
    yield os.open(directory / "file-1", os.O_PATH)
    yield os.open(directory, os.O_RDONLY)
    yield os.open("/dev/null", os.O_RDWR)
    yield from os.pipe()


def bombard(directory: Path, verb: str, count: int) -> World:
    """Send that many requests of a verb, with others between them that change the state they meet."""
    world = World(directory, seed=sum(verb.encode()))
    others = sorted(ASKS)
    for number in range(count):
        world.send(world.request(verb))
        if number % 3 == 0:
            world.send(world.request(world.random.choice(others)))
    return world


def check(verb: str, count: int, directory: Path) -> None:
    """Bombard a verb, and assert that nobody else's thing was touched and that something was done at all."""
    before, began = descriptors(), time.monotonic()
    world = bombard(directory, verb, count)
    assert theirs(world.bare) == world.before
    assert world.outcomes["ok"] > 0
    assert world.outcomes["not understood"] > 0
    sent = sum(world.outcomes.values())
    sys.stdout.write(f"\n{verb}: {sent} requests, {dict(world.outcomes)}, {time.monotonic() - began:.1f} s\n")
    world.close()
    assert descriptors() == before


@pytest.mark.parametrize("verb", sorted(ASKS))
def test_a_few_thousand_requests_touch_nothing_but_ours(
    verb: str, tmp_path: Path, refused: Callable[..., None]
) -> None:
    """Of 2,000 requests of each verb, most of them spoilt, none has an effect outside the allow-list."""
    check(verb, QUICK, tmp_path)
    refused(f"fuzz {verb}", f"{QUICK} requests, each effect on what is ours")


@pytest.mark.slow
@pytest.mark.parametrize("verb", sorted(ASKS))
def test_a_hundred_thousand_requests_touch_nothing_but_ours(verb: str, tmp_path: Path) -> None:
    """Of 100,000 requests of each verb none has an effect outside the allow-list."""
    check(verb, WHOLE, tmp_path)


def test_the_judge_sees_what_is_not_ours(tmp_path: Path) -> None:
    """The judge is not blind: effects on another's link, loop, device, rule or jail fail."""
    world = World(tmp_path, 1)
    host, theirs_ = world.host, world.bare
    eth0 = theirs_.net.link("eth0")
    assert eth0 is not None
    snapshot = Snapshot(name="vg-root", uuid="LVM", origin=0, cow=1, sectors=1, uid=1000, gid=1000)
    mark = str(Mark(OWNERS[0], "vm-0", "op-1"))
    attempts: list[Callable[[], object]] = [
        lambda: host.net.remove_link(eth0.index),
        lambda: host.net.set_alias(eth0.index, mark),
        lambda: host.net.make_bridge("br0", "02:00:00:00:00:01"),
        lambda: host.net.make_tap("tap0", 1000, mark, 3),
        lambda: host.net.make_tap(names.tap(OWNERS[0], "vm-0"), 0, mark, 3),
        lambda: host.net.change_rules(add=[net.GuardTo(comment="x", bridge="br-fc")]),
        lambda: host.disks.detach(theirs_.disks.loops()[0]),
        lambda: host.disks.remove("vg-root", "LVM-def"),
        lambda: host.disks.create(snapshot),
        lambda: host.disks.attach(world.fds[-1], mark, True),
        lambda: host.jails.remove("4242-theirs"),
        lambda: host.jails.make("../x", mark),
        lambda: host.jails.start(names.jail(OWNERS[0], "vm-0"), 0, mark),
        lambda: host.resolver.route("eth0", 53),
    ]
    for attempt in attempts:
        with pytest.raises(AssertionError):
            attempt()
    world.close()
