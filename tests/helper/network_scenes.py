"""A host with `lo`, `eth0` and a way to the world, twice: a record, and a kernel's namespace."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any, cast

from banger.helper import network
from banger.helper.host import Host
from banger.helper.ledger import Held, Ledger
from banger.helper.net import Net
from banger.helper.netlink import KernelNet
from banger.helper.requests import Ask, NatDisable, NatEnable, TapEnsure, TapRemove
from banger.helper.verbs import Call, Caller, Facts
from banger.testing.root_net import RecordingNet, new_host
from tests.helper import netns

UID, OTHER_UID = 4001, 4002
BRIDGE, NETWORK = "br-fc-test", "10.77.0.0/24"
VM, ADDRESS = "vm-1", "10.77.0.2"

FORWARD = Path("/proc/sys/net/ipv4/ip_forward")

ENSURE = TapEnsure(vm=VM, bridge=BRIDGE, network=NETWORK)
ENABLE = NatEnable(vm=VM, address=ADDRESS)
DISABLE = NatDisable(vm=VM)
REMOVE = TapRemove(vm=VM)


@dataclass(frozen=True, slots=True)
class Scene:
    """A host, and the ledger of the helper on it."""

    net: Net
    ledger: Ledger
    forward: Callable[[bool], None]

    def ask(self, ask: Ask, uid: int = UID, op: str = "op-1") -> Facts:
        """Have a request carried out, as the helper does."""
        verb = next(verb for verb in network.VERBS if verb.ask is type(ask))
        call = Call(caller=Caller(uid=uid, gid=uid), op=op, step="tap", epoch=1)
        return verb.run(host_of(self.net), self.ledger, call, ask)

    def listing(self, uid: int = UID) -> list[dict[str, str]]:
        """List what an owner has on it."""
        return network.listing(host_of(self.net), self.ledger, uid)

    def recorded(self) -> list[Held]:
        """List what is in the ledger of both owners."""
        return [*self.ledger.of_owner(UID), *self.ledger.of_owner(OTHER_UID)]

    def foreign_bridge(self, name: str, alias: str | None = None, address: str | None = None) -> None:
        """Make a bridge as somebody else would."""
        self.net.make_bridge(name, "02:00:00:00:00:99")
        link = self.net.link(name)
        assert link is not None
        if alias is not None:
            self.net.set_alias(link.index, alias)
        if address is not None:
            self.net.set_up(link.index)
            self.net.add_address(link.index, IPv4Interface(address))


def host_of(net: Net) -> Host:
    """Give a host of which only the network is there."""
    absent = cast("Any", None)
    return Host(net=net, disks=absent, jails=absent, resolver=absent)


def ledger(file: Path | str = ":memory:") -> Ledger:
    """Open a ledger; a killed process needs no disk that keeps what it was given."""
    db = sqlite3.connect(file, isolation_level=None)
    db.execute("PRAGMA synchronous = OFF")
    return Ledger(db)


@contextlib.contextmanager
def recorded() -> Iterator[Scene]:
    """Be on a host that is a record."""
    net = RecordingNet(host=new_host())

    def forward(whether: bool) -> None:
        net.host.forwards = whether

    yield Scene(net, ledger(), forward)


@contextlib.contextmanager
def real() -> Iterator[Scene]:
    """Be in a namespace whose `eth0` leads to nobody."""
    with netns.entered():
        netns.run("ip link add eth0 type veth peer name world0")
        netns.run("ip link set world0 up")
        netns.run("ip link set eth0 up")
        netns.run("ip addr add 192.0.2.2/24 dev eth0")
        netns.run("ip route add default via 192.0.2.1")
        forward(True)
        net = KernelNet()
        try:
            yield Scene(net, ledger(), forward)
        finally:
            net.close()


def forward(whether: bool) -> None:
    """Let this thread's namespace forward packets, or not."""
    FORWARD.write_text(str(int(whether)))


def snapshot(net: Net) -> dict[str, Any]:
    """Give all that there is, without numbers that the kernel chooses."""
    names = {link.index: link.name for link in net.links()}
    return {
        "links": sorted(
            (link.name, link.kind or "", link.alias or "", names.get(link.master or 0, ""), link.up)
            for link in net.links()
        ),
        "addresses": sorted((names[found.link], str(found.address)) for found in net.addresses()),
        "rules": [(rule.chain, rule.comment) for rule in net.rules()],
    }


def is_root() -> bool:
    """Tell whether a namespace can be made here."""
    return os.geteuid() == 0 and Path("/dev/net/tun").exists()
