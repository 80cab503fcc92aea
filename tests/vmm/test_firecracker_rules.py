"""The stand-in is not blind: what Firecracker's description and documented states forbid, it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from banger.testing import firecracker_rules
from banger.testing.firecracker_rules import Fault, Rules, Shapes

KERNEL = ("PUT", "/boot-source", {"kernel_image_path": "KERNEL"})
START = ("PUT", "/actions", {"action_type": "InstanceStart"})
PAUSE = ("PATCH", "/vm", {"state": "Paused"})
DRIVE = {"drive_id": "base", "path_on_host": "DISK", "is_root_device": False, "is_read_only": True}
CARD = {"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "02:00:00:00:00:01"}
CREATE = ("PUT", "/snapshot/create", {"snapshot_path": "STATE", "mem_file_path": "MEMORY"})
BACKEND = {"backend_type": "File", "backend_path": "DISK"}
LOAD = ("PUT", "/snapshot/load", {"snapshot_path": "DISK", "mem_backend": BACKEND})

Ask = tuple[str, str, Any]


@pytest.fixture(scope="session")
def shapes() -> Shapes:
    path = firecracker_rules.description()
    if path is None:
        pytest.skip(f"Firecracker's API description is not here: {firecracker_rules.ENVIRON} names it")
    return Shapes(path)


@pytest.fixture
def rules(shapes: Shapes) -> Rules:
    return Rules(shapes)


def ask(rules: Rules, place: Path, asked: Ask) -> None:
    """Ask as the stand-in is asked, without a guest; words in capitals are files."""
    for name in ("DISK", "KERNEL"):
        (place / name).write_bytes(b"\x7fELF")
    method, path, body = asked
    text = b"" if body is None else json.dumps(body).encode()
    for name in ("DISK", "KERNEL", "STATE", "MEMORY"):
        text = text.replace(b'"%s"' % name.encode(), json.dumps(str(place / name)).encode())
    template, found = rules.judge(method, path, text)
    rules.keep(method, template, found)


def put(path: str, **body: Any) -> Ask:
    return "PUT", path, body


def drive(**changes: Any) -> Ask:
    body = {**DRIVE, **changes}
    return "PUT", f"/drives/{body['drive_id']}", body


def card(name: str = "eth0", **changes: Any) -> Ask:
    return "PUT", f"/network-interfaces/{name}", {**CARD, "iface_id": name, **changes}


INVALID: dict[str, tuple[tuple[Ask, ...], Ask]] = {
    "a path that is not there": ((), put("/machine", vcpu_count=1)),
    "a method that is not there": ((), ("DELETE", "/vm", None)),
    "a body where none belongs": ((), ("GET", "/version", {})),
    "no body": ((), ("PUT", "/boot-source", None)),
    "a body that is no object": ((), ("PUT", "/vm", [1])),
    "no CPUs": ((), put("/machine-config", vcpu_count=0, mem_size_mib=64)),
    "too many CPUs": ((), put("/machine-config", vcpu_count=33, mem_size_mib=64)),
    "odd CPUs with SMT": ((), put("/machine-config", vcpu_count=3, mem_size_mib=64, smt=True)),
    "no memory": ((), put("/machine-config", vcpu_count=1)),
    "memory as text": ((), put("/machine-config", vcpu_count=1, mem_size_mib="64")),
    "no room at all": ((), put("/machine-config", vcpu_count=1, mem_size_mib=0)),
    "an unknown field": ((), put("/machine-config", vcpu_count=1, mem_size_mib=64, ht_enabled=False)),
    "an unknown template": ((), put("/machine-config", vcpu_count=1, mem_size_mib=64, cpu_template="T9")),
    "a kernel that is not there": ((), put("/boot-source", kernel_image_path="/no/such/kernel")),
    "an initrd that is not there": (
        (),
        put("/boot-source", kernel_image_path="KERNEL", initrd_path="/no/such/initrd"),
    ),
    "too long a command line": ((), put("/boot-source", kernel_image_path="KERNEL", boot_args="x" * 2048)),
    "a disk that is not there": ((), drive(path_on_host="/no/such/disk")),
    "a disk without a path": ((), put("/drives/a", drive_id="a", is_root_device=False, is_read_only=True)),
    "a disk of another name": ((), ("PUT", "/drives/other", DRIVE)),
    "a disk with a strange name": ((), drive(drive_id="a-b")),
    "a disk with a serial": ((), drive(serial="base")),
    "a cache that is not known": ((), drive(cache_type="None")),
    "two root devices": ((drive(is_root_device=True),), drive(drive_id="up", is_root_device=True)),
    "a tap without a name": ((), card(host_dev_name="")),
    "no tap": ((), put("/network-interfaces/eth0", iface_id="eth0")),
    "a tap with a long name": ((), card(host_dev_name="x" * 16)),
    "one tap twice": ((card(),), card("eth1", guest_mac="02:00:00:00:00:02")),
    "one MAC twice": ((card(),), card("eth1", host_dev_name="tap1")),
    "no MAC": ((), card(guest_mac="02:00")),
    "a host's CID": ((), put("/vsock", guest_cid=2, uds_path="STATE")),
    "a vsock without a socket": ((), put("/vsock", guest_cid=3)),
    "a vsock where something is": ((), put("/vsock", guest_cid=3, uds_path="DISK")),
    "metrics twice": ((put("/metrics", metrics_path="DISK"),), put("/metrics", metrics_path="DISK")),
    "a log level that is not known": ((), put("/logger", log_path="DISK", level="Loud")),
    "an action that is not known": ((), put("/actions", action_type="InstanceStop")),
    "a start without a kernel": ((), START),
    "a second start": ((KERNEL, START), START),
    "a disk after the start": ((KERNEL, START), drive()),
    "a kernel after the start": ((KERNEL, START), KERNEL),
    "CPUs after the start": ((KERNEL, START), put("/machine-config", vcpu_count=1, mem_size_mib=64)),
    "a network after the start": ((KERNEL, START), card()),
    "a vsock after the start": ((KERNEL, START), put("/vsock", guest_cid=3, uds_path="STATE")),
    "randomness after the start": ((KERNEL, START), put("/entropy")),
    "a pause before the start": ((KERNEL,), PAUSE),
    "a pause of what is paused": ((KERNEL, START, PAUSE), PAUSE),
    "going on with what runs": ((KERNEL, START), ("PATCH", "/vm", {"state": "Resumed"})),
    "a state that is not known": ((KERNEL, START), ("PATCH", "/vm", {"state": "Stopped"})),
    "keys before the start": ((KERNEL,), put("/actions", action_type="SendCtrlAltDel")),
    "keys for what is paused": ((KERNEL, START, PAUSE), put("/actions", action_type="SendCtrlAltDel")),
    "metrics before the start": ((), put("/actions", action_type="FlushMetrics")),
    "a snapshot of what runs": ((KERNEL, START), CREATE),
    "a snapshot before the start": ((KERNEL,), CREATE),
    "a difference to nothing": (
        (KERNEL, START, PAUSE),
        ("PUT", "/snapshot/create", {**CREATE[2], "snapshot_type": "Diff"}),
    ),
    "loading after the start": ((KERNEL, START), LOAD),
    "loading into a machine": ((KERNEL,), LOAD),
    "loading from nowhere": ((), put("/snapshot/load", snapshot_path="DISK")),
    "loading from two places": ((), ("PUT", "/snapshot/load", {**LOAD[2], "mem_file_path": "DISK"})),
    "loading what is not there": ((), put("/snapshot/load", snapshot_path="STATE", mem_backend=BACKEND)),
}


@pytest.mark.parametrize("case", INVALID)
def test_what_is_invalid_is_refused(rules: Rules, tmp_path: Path, case: str) -> None:
    """What leads to an invalid request is accepted, the request is not, and nothing has changed by it."""
    before, invalid = INVALID[case]
    for asked in before:
        ask(rules, tmp_path, asked)
    found = (rules.state, rules.configuration())
    with pytest.raises(Fault):
        ask(rules, tmp_path, invalid)
    assert (rules.state, rules.configuration()) == found


def test_what_is_valid_is_accepted(rules: Rules, tmp_path: Path) -> None:
    """A machine with everything that a driver may send goes its whole way."""
    way = (
        put("/logger", log_path="DISK", level="Off"),
        put("/metrics", metrics_path="DISK"),
        put("/machine-config", vcpu_count=2, mem_size_mib=64, smt=True, track_dirty_pages=True),
        KERNEL,
        drive(is_root_device=True),
        drive(drive_id="up", is_read_only=False, io_engine="Async"),
        card(),
        put("/vsock", guest_cid=3, uds_path="STATE"),
        put("/entropy"),
        START,
        PAUSE,
        ("PUT", "/snapshot/create", {**CREATE[2], "snapshot_type": "Diff"}),
        ("PATCH", "/vm", {"state": "Resumed"}),
        put("/actions", action_type="SendCtrlAltDel"),
    )
    for asked in way:
        ask(rules, tmp_path, asked)
    assert rules.state == "Running"


def test_a_part_of_the_api_that_has_no_effect_is_not_feigned(rules: Rules) -> None:
    """What the stand-in cannot do it refuses, however valid."""
    with pytest.raises(Fault, match="stand-in"):
        rules.judge("PUT", "/balloon", b'{"amount_mib": 1, "deflate_on_oom": true}')
