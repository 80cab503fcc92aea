"""What the helper tells of itself, its host and its log; nothing of it changes anything."""

from __future__ import annotations

import functools
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import banger
from banger.errors import BangerError
from banger.helper.host import Host
from banger.helper.ledger import Ledger
from banger.helper.requests import AuditOf, Hello, Listing
from banger.helper.store import Store
from banger.helper.verbs import Call, Facts, Verb

Look = Callable[[Host, Ledger, int], list[dict[str, str]]]
"""How an area lists what is really on the host with an owner's mark."""

TUN = "/dev/net/tun"
LEFT_OUT = frozenset(("prev", "hash", "uid", "op"))


def verbs(store: Store, areas: Iterable[Look]) -> tuple[Verb, ...]:
    """Give the verbs that only read."""
    return (
        Verb(ask=Hello, run=hello, reads=True),
        Verb(ask=Listing, run=functools.partial(_list, tuple(areas)), reads=True),
        Verb(ask=AuditOf, run=functools.partial(_audit, store), reads=True),
    )


def hello(host: Host, _: Ledger, call: Call, __: Hello) -> Facts:
    """Tell the version, for whom it speaks, and what this host offers; null for what it lacks."""
    return {
        "version": banger.__version__,
        "uid": call.caller.uid,
        "tun": _is_node(TUN),
        "forwards": _try(host.net.forwards),
        "egress": _try(host.net.default_egress),
        "resolved": _try(host.resolver.running),
        "device_mapper": _try(host.disks.can_snapshot) or False,
        "firecracker": _try(lambda: str(host.jails.version())),
    }


def _list(areas: tuple[Look, ...], host: Host, ledger: Ledger, call: Call, _: Listing) -> Facts:
    """List what the ledger has of the caller's, and what a look at the host finds."""
    uid = call.caller.uid
    held = [
        {"kind": thing.kind, "id": thing.name, "vm": thing.vm, "op": thing.op, "state": thing.state}
        for thing in ledger.of_owner(uid)
    ]
    return {"held": held, "found": [thing for look in areas for thing in look(host, ledger, uid)]}


def _audit(store: Store, _: Host, __: Ledger, call: Call, ask: AuditOf) -> Facts:
    """Give the audit lines of one of the caller's operations, at most LINES_SHOWN."""
    lines = (line._asdict() for line in store.lines(call.caller.uid, ask.of))
    return {"lines": [{key: line[key] for key in line if key not in LEFT_OUT} for line in lines]}


def _try(look: Callable[[], Any]) -> Any:
    try:
        return look()
    except (BangerError, OSError):
        return None


def _is_node(path: str) -> bool:
    try:
        return stat.S_ISCHR(Path(path).lstat().st_mode)
    except OSError:
        return False
