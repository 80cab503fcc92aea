"""Where each field of a request begins and ends: the last value that is taken, and the first that is not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from banger.helper.requests import Request

OP, STEP, KEY, VM = "op-1", "step", "key", "web"
BRIDGE, NETWORK, ADDRESS = "br-fc", "172.30.0.0/24", "172.30.0.2"

TAKEN: dict[str, list[Any]] = {
    "op": ["op-" + "z" * 32, "op-0"],
    "step": ["a" * 40, "a.-9"],
    "epoch": [1, 2**53],
    "key": ["0" * 128, "a./-"],
    "vm": ["a" * 63, "0-"],
    "bridge": ["br-fc", "br-fc-a", "br-fc-" + "9" * 9],
    "egress": ["e", "A" * 15, "e_.-", None],
    "network": [
        *("10.0.0.0/16", "10.255.255.248/29", "172.16.0.0/16", "172.31.0.0/16"),
        *("192.168.0.0/16", "100.64.0.0/16", "100.127.0.0/16"),
    ],
    "address": ["10.0.0.0", "172.31.255.255", "192.168.0.1", "100.64.0.1"],
    "port": [1024, 65535],
    "disks": [0, 8],
    "signal": ["TERM", "KILL"],
    "socket": ["api", "vsock", "console"],
}

LINES = ["\n", " ", "\0", "\u0660"]
REFUSED: dict[str, list[Any]] = {
    "op": ["op-" + "z" * 33, "op-", "xop-1", "op-A", "op-a/b", *(f"op-1{end}" for end in LINES)],
    "step": [
        "a" * 41,
        "",
        "9a",
        ".a",
        "-a",
        "Aa",
        "a/b",
        "a_b",
        *(f"a{end}" for end in LINES),
        "9" + "a" * 39,
    ],
    "epoch": [0, -1, 2**53 + 1, True, "1", 1.5, None],
    "key": ["0" * 129, "", "/a", ".a", "-a", "A", "a b", "Aa", *(f"a{end}" for end in LINES)],
    "vm": ["a" * 64, "", "-a", "A", "Aa", "a_b", "a/b", "a.b", "xé", *(f"a{end}" for end in LINES)],
    "bridge": ["br-fc-", "br-fc-" + "9" * 10, "br-fca", "xbr-fc", "br-fc-a/b", "br-fc-A", "br-fc-a.b"]
    + [f"br-fc{end}" for end in LINES]
    + [f"br-fc-a{end}" for end in LINES],
    "egress": ["", "A" * 16, "-e", ".e", "_e", "a/b", "/e", "é", *(f"e{end}" for end in LINES)],
    "network": ["10.0.0.0/15", "10.255.255.252/30", "172.15.0.0/16", "172.32.0.0/16", "192.167.0.0/16"]
    + ["192.169.0.0/16", "100.63.0.0/16", "100.128.0.0/16", "9.255.0.0/16", "11.0.0.0/16", "10.0.0.1/24"]
    + ["10.0.0.0/024", "10.0.0.0/0", "10.0.0.0/255.255.0.0", "10.0.0.0", "8.0.0.0/16"]
    + [f"10.0.0.0/24{end}" for end in LINES],
    "address": ["9.255.255.255", "11.0.0.0", "172.15.0.1", "172.32.0.1", "192.167.0.1", "192.169.0.1"]
    + ["100.63.0.1", "100.128.0.1", "010.0.0.1", "10.0.0.1/32", "8.8.8.8"]
    + [f"10.0.0.1{end}" for end in LINES],
    "port": [1023, 65536, True, "1024", None],
    "disks": [-1, 9, True, "1", None],
    "signal": ["STOP", "kill", "TERM\n", 9, None],
    "socket": ["run", "API", "api\n", "../api", None],
}

ENVELOPE = ("op", "step", "epoch", "key")
ASKS: dict[str, dict[str, Any]] = {
    "tap.ensure": {"vm": VM, "bridge": BRIDGE, "network": NETWORK},
    "tap.remove": {"vm": VM},
    "nat.enable": {"vm": VM, "address": ADDRESS, "egress": None},
    "nat.disable": {"vm": VM},
    "names.route": {"bridge": BRIDGE, "port": 5300},
    "snapshot.ensure": {"vm": VM},
    "snapshot.remove": {"vm": VM},
    "jail.launch": {"vm": VM, "disks": 0},
    "jail.connect": {"vm": VM, "socket": "api"},
    "jail.signal": {"vm": VM, "signal": "TERM"},
    "jail.remove": {"vm": VM},
}
PLACES = [("tap.remove", field) for field in ENVELOPE]
PLACES += [(verb, field) for verb, fields in ASKS.items() for field in fields]


def read(verb: str, field: str, value: Any) -> Any:
    """Read a request in which all is well but perhaps this one field; give what was read of it."""
    request: dict[str, Any] = {"op": OP, "step": STEP, "epoch": 1, "key": KEY}
    request["ask"] = {"verb": verb, **ASKS[verb]}
    (request if field in ENVELOPE else request["ask"])[field] = value
    found = msgspec.json.decode(msgspec.json.encode(request), type=Request)
    return getattr(found if field in ENVELOPE else found.ask, field)


@pytest.mark.parametrize(("verb", "field"), PLACES)
def test_what_is_just_within_is_taken(verb: str, field: str) -> None:
    """Each field of each verb takes the longest, shortest, largest and smallest that it may have."""
    for value in TAKEN[field]:
        assert read(verb, field, value) == value


@pytest.mark.parametrize(("verb", "field"), PLACES)
def test_what_is_just_without_is_refused(verb: str, field: str) -> None:
    """Each field of each verb refuses what is one longer, shorter, larger or smaller, or of another kind."""
    for value in REFUSED[field]:
        with pytest.raises(msgspec.ValidationError):
            read(verb, field, value)


@pytest.mark.parametrize("verb", ASKS)
@pytest.mark.parametrize("where", ["ask", "envelope"])
def test_h10_what_nobody_asked_for_is_refused(verb: str, where: str) -> None:
    """No verb, and no envelope, takes a field that is not its own."""
    ask = {"verb": verb, **ASKS[verb]}
    request: dict[str, Any] = {"op": OP, "step": STEP, "epoch": 1, "key": KEY, "ask": ask}
    assert msgspec.json.decode(msgspec.json.encode(request), type=Request)
    (ask if where == "ask" else request)["uid"] = 0
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(msgspec.json.encode(request), type=Request)
