"""A host's network without a kernel: a record of what was asked for, which survives kill -9 in a file.

It keeps the promises of the real one that a handler can see: names are unique, an index is not used
again, what hangs on a removed interface goes with it, a transaction of rules is whole or nothing.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any

import msgspec

from banger.helper.net import (
    ForwardIn,
    ForwardOut,
    GuardFrom,
    GuardHost,
    GuardTo,
    Link,
    Located,
    Masquerade,
    Route,
    Rule,
    Wanted,
)

CHAINS: dict[type[Wanted], str] = {
    Masquerade: "postrouting",
    ForwardOut: "forward",
    ForwardIn: "forward",
    GuardFrom: "forward",
    GuardTo: "forward",
    GuardHost: "input",
}


class Recorded(msgspec.Struct, kw_only=True):
    """What there is; a new host has a loopback and a way to the world."""

    links: list[Link]
    addresses: list[Located]
    routes: list[Route]
    rules: list[Rule] = []
    table: bool = False
    forwards: bool = True
    default_egress: str | None = "eth0"
    resolvers: list[IPv4Address] = []
    last_index: int = 2
    last_handle: int = 3
    tap_uids: dict[str, int] = {}


def new_host() -> Recorded:
    """Give a host with `lo`, and `eth0` to the world."""
    return Recorded(
        links=[_link(1, "lo", None, None), _link(2, "eth0", None, "02:00:00:00:00:01")],
        addresses=[_located(1, "127.0.0.1/8"), _located(2, "192.0.2.2/24")],
        routes=[_route(1, "127.0.0.0/8"), _route(2, "192.0.2.0/24"), _route(2, "0.0.0.0/0")],
    )


class RecordingNet:
    """The `Net` that is a record, in memory or in a file; `calls` holds each effect that was asked for."""

    def __init__(self, file: Path | None = None, host: Recorded | None = None):
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._file = file
        self.host = host or new_host()
        if file is not None and file.exists():
            self.host = msgspec.json.decode(file.read_bytes(), type=Recorded, dec_hook=_from_text)

    def link(self, name: str) -> Link | None:
        """Give the interface with this name, if there is one."""
        return next((link for link in self.host.links if link.name == name), None)

    def links(self) -> list[Link]:
        """List all interfaces."""
        return list(self.host.links)

    def addresses(self) -> list[Located]:
        """List all IPv4 addresses."""
        return list(self.host.addresses)

    def routes(self) -> list[Route]:
        """List all IPv4 routes."""
        return list(self.host.routes)

    def resolvers(self) -> list[IPv4Address]:
        """List the servers that this host asks for names."""
        return list(self.host.resolvers)

    def default_egress(self) -> str | None:
        """Name the interface of the best default route, if there is one."""
        return self.host.default_egress

    def forwards(self) -> bool:
        """Tell whether this host forwards IPv4."""
        return self.host.forwards

    def make_bridge(self, name: str, mac: str) -> None:
        """Make a bridge; see `Net.make_bridge`."""
        self._asked("make_bridge", name, mac)
        self._add_link(name, "bridge", mac=mac)
        self._keep()

    def set_alias(self, index: int, alias: str) -> None:
        """Give an interface its alias."""
        self._asked("set_alias", index, alias)
        self._change(index, alias=alias)

    def add_address(self, index: int, address: IPv4Interface) -> None:
        """Give an interface one more address, and the route that comes with it."""
        self._asked("add_address", index, address)
        located = Located(link=index, address=address)
        if located in self.host.addresses:
            raise _error(errno.EEXIST)
        self.host.addresses.append(located)
        self.host.routes.append(Route(link=index, network=address.network))
        self._change(index)

    def set_up(self, index: int) -> None:
        """Let an interface carry packets."""
        self._asked("set_up", index)
        self._change(index, up=True)

    def make_tap(self, name: str, uid: int, alias: str, bridge: int) -> None:
        """Make a persistent tap; see `Net.make_tap`."""
        self._asked("make_tap", name, uid, alias, bridge)
        if self.link(name) is not None:
            raise _error(errno.EBUSY)
        self._index(bridge)
        self._add_link(name, "tun", alias=alias, master=bridge, up=True)
        self.host.tap_uids[name] = uid
        self._keep()

    def attach(self, index: int, bridge: int) -> None:
        """Put an interface of ours on a bridge, and up."""
        self._asked("attach", index, bridge)
        self._index(bridge)
        self._change(index, master=bridge, up=True)

    def remove_link(self, index: int) -> None:
        """Remove an interface with its addresses and routes; its ports are let go."""
        self._asked("remove_link", index)
        host = self.host
        host.links = [_let_go(link, index) for link in host.links if link.index != index]
        host.addresses = [located for located in host.addresses if located.link != index]
        host.routes = [route for route in host.routes if route.link != index]
        host.tap_uids = {name: uid for name, uid in host.tap_uids.items() if self.link(name)}
        self._keep()

    def rules(self) -> list[Rule]:
        """List the rules of our table; none when there is no table."""
        return list(self.host.rules)

    def change_rules(self, *, add: Sequence[Wanted] = (), remove: Sequence[Rule] = ()) -> None:
        """Remove rules and add others; see `Net.change_rules`."""
        self._asked("change_rules", tuple(add), tuple(remove))
        handles = {rule.handle for rule in remove}
        if not handles <= {rule.handle for rule in self.host.rules}:
            raise _error(errno.ENOENT)
        self.host.rules = [rule for rule in self.host.rules if rule.handle not in handles]
        self.host.rules += [self._rule(wanted) for wanted in add]
        self.host.table = True
        self._keep()

    def remove_table(self) -> None:
        """Remove our table with all that is in it; one that is gone is no error."""
        self._asked("remove_table")
        self.host.rules, self.host.table = [], False
        self._keep()

    def _rule(self, wanted: Wanted) -> Rule:
        self.host.last_handle += 1
        return Rule(handle=self.host.last_handle, chain=CHAINS[type(wanted)], comment=wanted.comment)

    def _asked(self, effect: str, *words: Any) -> None:
        self.calls.append((effect, words))

    def _add_link(self, name: str, kind: str, mac: str | None = None, **known: Any) -> None:
        if self.link(name) is not None:
            raise _error(errno.EEXIST)
        self.host.last_index += 1
        self.host.links.append(_link(self.host.last_index, name, kind, mac, **known))

    def _change(self, index: int, **new: Any) -> None:
        self._index(index)
        self.host.links = [replace(link, **new) if link.index == index else link for link in self.host.links]
        self._keep()

    def _index(self, index: int) -> None:
        if not any(link.index == index for link in self.host.links):
            raise _error(errno.ENODEV)

    def _keep(self) -> None:
        """Write the record to its file, whole or not at all."""
        if self._file is None:
            return
        new = self._file.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(self.host, enc_hook=str))
        new.replace(self._file)


def _link(index: int, name: str, kind: str | None, mac: str | None, **known: Any) -> Link:
    fields = {"alias": None, "master": None, "up": kind is None, **known}
    return Link(index=index, name=name, kind=kind, mac=mac, **fields)


def _located(link: int, address: str) -> Located:
    return Located(link=link, address=IPv4Interface(address))


def _route(link: int, network: str) -> Route:
    return Route(link=link, network=IPv4Network(network))


def _let_go(link: Link, master: int) -> Link:
    return replace(link, master=None) if link.master == master else link


def _from_text(kind: type, text: Any) -> Any:
    return kind(text)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
