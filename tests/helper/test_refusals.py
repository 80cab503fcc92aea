"""What a hostile owner may send, by the cases of the threat model: refused, without effect, on record.

Each is sent through the real socket to a helper over recorded kernels. `-s` prints the table.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from banger.helper.requests import TapEnsure
from banger.testing.root_pool import RootPool
from tests.helper.conftest import NEEDS_ROOT, asked, raw, recorded

pytestmark = NEEDS_ROOT

NETWORK = "172.30.0.0/24"


def tap(**more: Any) -> dict[str, Any]:
    return {"verb": "tap.ensure", "vm": "web", "bridge": "br-fc", "network": NETWORK, **more}


def nat(**more: Any) -> dict[str, Any]:
    return {"verb": "nat.enable", "vm": "web", "address": "172.30.0.2", **more}


def launch(**more: Any) -> dict[str, Any]:
    return {"verb": "jail.launch", "vm": "web", "disks": 0, **more}


VM_NAMES = ["../x", "x" * 64, "", "-x", "a/b", "a\n", "a\0", "A", "a_b", "é", "a b", "x" * 10_000, "\u0661"]

CASES: list[tuple[str, dict[str, Any]]] = [
    *(
        ("H10 unknown verb", {"verb": verb, "vm": "web"})
        for verb in ("mount", "", "tap", "TAP.ENSURE", "exec")
    ),
    ("H10 no verb", {"vm": "web"}),
    *(
        ("H15 bridge name", tap(bridge=name))
        for name in (
            "br-fc/../eth0",
            "br-fc-" + "x" * 20,
            "br-fc\n",
            "br-fc ",
            "BR-FC",
            "br-fcx",
            "br-fc-",
            "lo",
        )
    ),
    *(
        ("H17 interface of the caller's choice", tap(**{field: "eth0"}))
        for field in ("device", "master", "port")
    ),
    *(
        ("H18 network", tap(network=text))
        for text in (
            *(
                "0.0.0.0/0",
                "10.0.0.0/7",
                "10.0.0.0/33",
                "10.0.0.0/08",
                "::/0",
                "::ffff:10.0.0.0/104",
                "10.0.0.1/24",
            ),
            *("8.8.8.0/24", "10.0.0.0/30", "10.0.0.0/15", "127.0.0.0/16", "169.254.0.0/16", "10.0.0.0/24\n"),
            *("10.0.0.0/255.255.255.0", "10.0.0/24", "010.0.0.0/24", "10.0.0.0/-8", 167772160, None),
        )
    ),
    *(
        ("H20 egress interface", nat(egress=name))
        for name in (
            "lo",
            "eth0 -j ACCEPT",
            "eth0\n",
            "",
            "x" * 16,
            "../eth0",
            "-o",
            "eth0;id",
            "eth9",
            "br-fc",
        )
    ),
    *(
        ("H21 text in an address", nat(address=text))
        for text in (
            "8.8.8.8",
            "127.0.0.1",
            "172.30.0.2; drop",
            "10.0.0.256",
            "10.1",
            "0x0a000001",
            "172.30.0.2/32",
            "::1",
        )
    ),
    *(
        ("H25 MAC or MTU of the caller's choice", tap(**{field: 1}))
        for field in ("mac", "mtu", "uid", "name")
    ),
    *(("H24 sysctl", {"verb": verb, "key": "net.ipv4.ip_forward"}) for verb in ("sysctl", "sysctl.set")),
    ("H26 namespace of the caller's choice", tap(netns="/proc/1/ns/net")),
    *(
        ("H27 dm name", {"verb": "snapshot.remove", "vm": name})
        for name in ("../control", "a b", "x" * 128, "\n0 1 linear", "fc-rootfs-../control")
    ),
    *(
        ("H28 device of the caller's choice", {"verb": "snapshot.ensure", "vm": "web", field: "/dev/sda"})
        for field in ("origin", "cow", "base", "table", "path")
    ),
    *(
        ("H34 mount", {"verb": verb, "vm": "web", "path": "/etc"})
        for verb in ("mount", "umount", "chown", "file.chown")
    ),
    *(
        ("H35 sectors of the caller's choice", {"verb": "snapshot.ensure", "vm": "web", "sectors": number})
        for number in (2**63, -1, 7)
    ),
    *(
        ("H46 path of the caller's choice", launch(**{field: "/etc/shadow"}))
        for field in ("log", "metrics", "console", "kernel", "initrd")
    ),
    *(
        ("H48 pid of the caller's choice", {"verb": "jail.signal", "vm": "web", "signal": "KILL", "pid": pid})
        for pid in (1, 0, -1, os.getpid())
    ),
    *(
        ("H48 signal", {"verb": "jail.signal", "vm": "web", "signal": name})
        for name in ("STOP", "kill", "9", 9, "KILL\n", "", None, -9)
    ),
    *(
        ("H51 program of the caller's choice", launch(**{field: "/home/me/firecracker"}))
        for field in ("exec_file", "jailer", "firecracker", "binary")
    ),
    *(("H53 VM id", tap(vm=name)) for name in VM_NAMES),
    *(("H53 VM id", {"verb": "jail.remove", "vm": name}) for name in VM_NAMES),
    *(
        ("H54 Firecracker's arguments", launch(args=[word]))
        for word in ("--no-seccomp", "--seccomp-filter=/tmp/x", "--config-file=/etc/shadow")
    ),
    *(("H55 uid of the caller's choice", launch(**{field: 0})) for field in ("uid", "gid", "user")),
    *(("H56 environment of the caller's choice", launch(env={name: "x"})) for name in ("LD_PRELOAD", "PATH")),
    *(("H57 number of disks", launch(disks=number)) for number in (-1, 9, 2**64, True, 1.5, "0", None)),
    *(
        ("H20 port", {"verb": "names.route", "bridge": "br-fc", "port": port})
        for port in (0, 53, 1023, 65536, -1, 2**31, "42069", True, 42069.5)
    ),
]


@pytest.fixture(scope="module", autouse=True)
def _vm(pool: RootPool) -> None:
    """The caller has a VM with a tap, so that a request is not refused for want of one."""
    pool.ask(TapEnsure(vm="web", bridge="br-fc", network=NETWORK), op="op-0")


@pytest.mark.parametrize(("case", "ask"), CASES, ids=[f"{case}-{n}" for n, (case, _) in enumerate(CASES)])
def test_it_is_refused_and_on_record(
    pool: RootPool, case: str, ask: dict[str, Any], refused: Callable[..., None]
) -> None:
    """A typed refusal, nothing done to any recorded kernel, and one line that is plain text."""
    data = json.dumps({"op": "op-1", "step": "step", "epoch": 1, "key": f"k-{id(ask)}", "ask": ask}).encode()
    send(pool, case, data, refused)


ENVELOPES: list[tuple[str, dict[str, Any]]] = [
    *(
        ("H9 operation", {"op": op})
        for op in ("", "op-", "op-X", "op-\n", "op-" + "x" * 33, "../op-1", None, 1)
    ),
    *(("H9 step", {"step": step}) for step in ("", "Step", "a b", "a\n", "x" * 41, "\x1b[2J")),
    *(("H9 epoch", {"epoch": epoch}) for epoch in (0, -1, 2**53 + 1, 2**64, True, "1", None, 1.5)),
    *(("H9 key", {"key": key}) for key in ("", "K", "a\n", "x" * 129, "a b", None, "é")),
    *(
        ("H2 identity of the caller's choice", {field: 0})
        for field in ("uid", "gid", "pid", "caller", "owner")
    ),
    ("H9 no request", {"ask": None}),
    ("H9 two requests", {"ask": [tap(), tap()]}),
]


@pytest.mark.parametrize(("case", "part"), ENVELOPES, ids=[f"{c}-{n}" for n, (c, _) in enumerate(ENVELOPES)])
def test_what_is_around_a_request_is_checked_too(
    pool: RootPool, case: str, part: dict[str, Any], refused: Callable[..., None]
) -> None:
    """Operation, step, epoch and key have their patterns, and nobody can say who he is."""
    document = {"op": "op-1", "step": "step", "epoch": 1, "key": "k-around", "ask": tap(), **part}
    send(pool, case, json.dumps(document).encode(), refused)


@pytest.mark.parametrize("field", ["op", "step", "epoch", "key", "ask"])
def test_nothing_can_be_left_out(pool: RootPool, field: str, refused: Callable[..., None]) -> None:
    """There are no defaults around a request."""
    document = {"op": "op-1", "step": "step", "epoch": 1, "key": "k-less", "ask": tap()}
    del document[field]
    send(pool, "H9 part left out", json.dumps(document).encode(), refused)


def send(pool: RootPool, case: str, data: bytes, refused: Callable[..., None]) -> None:
    """Send a packet; assert that it is refused, has no effect, and has one line."""
    before, lines = recorded(pool), len(asked(pool))
    answer = raw(pool, data)
    while "audit" not in answer:  # more than a hundred refusals in this second are only counted
        threading.Event().wait(0.1)
        answer = raw(pool, data)
    assert "error" in answer, answer
    assert answer["error"]["code"] in ("invalid", "refused"), answer
    assert answer["error"]["message"]
    effects = sum(before[name] != now for name, now in recorded(pool).items())
    (line,) = asked(pool)[lines:]
    assert (line.uid, line.outcome, line.seq) == (os.getuid(), "refused", answer["audit"])
    text = line.ask + line.message
    assert text.isascii()
    assert text.isprintable()
    assert len(line.ask) <= 4096
    refused(case, f"{answer['error']['code']}: {answer['error']['message']}", effects)
