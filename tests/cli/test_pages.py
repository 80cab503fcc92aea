from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cli import scenes
from tests.cli.conftest import Banger
from tests.cli.fake_daemon import FakeDaemon

Json = dict[str, Any]
OP = {
    "id": "op-1",
    "kind": "vm.create",
    "vm": "vm-1",
    "name": "web",
    "state": "ended",
    "fate": "undone",
    "step": "boot",
    "requested_us": 1_000_000,
    "ended_us": 9_900_000,
    "seconds": 2.5,
    "parent": None,
    "reason": None,
    "error": scenes.FIRE,
}
STEP: Json = {
    "name": "disks",
    "title": "disks",
    "state": "undone",
    "attempts": 1,
    "started_us": 1,
    "seconds": 0.02,
    "undone": True,
    "undo_seconds": 0.01,
    "error": None,
    "facts": {"size": 4, "digest": "0123456789abcdef" * 4},
}
PENDING = {**STEP, "state": "pending", "attempts": 0, "seconds": None, "undone": False, "undo_seconds": None}
HERE = {
    "name": "debian-12",
    "digest": "0123456789abcdef" * 4,
    "size_bytes": 300 << 20,
    "created_us": 1,
    "present": True,
    "details": {"suite": "bookworm", "packages": ["make 4.3", "git\x1b 2.39"]},
}
ABSENT = {**HERE, "name": "alpine", "digest": None, "size_bytes": None, "created_us": None, "present": False}
STATUS = {
    "pid": 5,
    "version": "0.1.0",
    "since_us": 1,
    "workers": [{"pid": 6, "op": None}, {"pid": 7, "op": "op-1"}],
    "vms_running": 1,
    "ops_active": 1,
    "state_dir": "/state",
    "read_only": False,
    "damage": None,
}


def test_ops_list(banger: Banger, daemon: FakeDaemon) -> None:
    """`ops list` shows what each operation was, its fate and how long it took."""
    daemon.answers["ops.list"] = {
        "ops": [OP, {**OP, "id": "op-2", "fate": None, "state": "running", "ended_us": None, "seconds": None}]
    }
    lines = banger("ops", "list", "--vm", "web").stdout.splitlines()
    assert lines[1].split()[:6] == ["op-1", "vm.create", "web", "undone", "boot", "2.50s"]
    assert lines[2].split()[:6] == ["op-2", "vm.create", "web", "running", "boot", "-"]
    assert daemon.asked("ops.list") == [{"vm": "web", "limit": 20}]


def test_ops_show(banger: Banger, daemon: FakeDaemon) -> None:
    """`ops show` names the step that failed, its error, and what was undone."""
    failed = {
        **STEP,
        "title": "boot",
        "state": "failed",
        "attempts": 2,
        "error": scenes.FIRE,
        "undone": False,
    }
    found = {**OP, "epoch": 2, "args": {}, "steps": [STEP, failed, PENDING], "resources": [
        {"kind": "file", "id": "/x", "state": "released", "step": "disks"}
    ]}  # fmt: skip
    daemon.answers["ops.show"] = {"op": found}
    shown = banger("ops", "show", "op-1").stdout
    assert "error:   mkfs is on fire" in shown
    assert "claims:  2" in shown
    assert "↩ disks  0.02s  1      0.01s  size=4 digest=0123456789ab\n" in shown
    assert "✗ boot   0.02s  2      0.01s  mkfs is on fire" in shown
    assert "file      /x  released  disks" in shown
    assert json.loads(banger("ops", "show", "op-1", "--json").stdout) == {"op": found}


@pytest.mark.parametrize("kind", ["image", "kernel"])
def test_artifacts(banger: Banger, daemon: FakeDaemon, kind: str) -> None:
    """`image` and `kernel` list what is here and what could be, and show what one is made of."""
    daemon.answers |= {f"{kind}.list": {f"{kind}s": [HERE, ABSENT]}, f"{kind}.show": {kind: HERE}}
    lines = banger(kind, "list").stdout.splitlines()
    assert lines[1].split()[:3] == ["debian-12", "yes", "300MiB"]
    assert lines[1].split()[-1] == "0123456789ab"
    assert json.loads(banger(kind, "list", "--json").stdout) == {f"{kind}s": [HERE, ABSENT]}
    assert lines[2].split() == ["alpine", "when", "needed", "-", "-", "-"]
    shown = banger(kind, "show", "debian-12").stdout
    assert "suite: bookworm" in shown
    assert "  git\\x1b 2.39" in shown


@pytest.mark.parametrize("words", ["image build", "image delete", "kernel pull", "kernel delete"])
def test_artifact_operations(banger: Banger, daemon: FakeDaemon, words: str) -> None:
    """Making and deleting what VMs boot from is an operation, waited for or not."""
    daemon.answers |= {words.replace(" ", "."): {"op": "op-1"}, "ops.follow": scenes.CREATED}
    assert banger(*words.split(), "debian-12").stdout.endswith(" in 4.70s\n")
    assert banger(*words.split(), "debian-12", "--no-wait").stdout == "op: op-1\n"
    assert daemon.calls[0] == (words.replace(" ", "."), {words.split()[0]: "debian-12"})


def test_daemon_status(banger: Banger, daemon: FakeDaemon) -> None:
    """`daemon status` shows what the daemon and each worker are at."""
    daemon.answers["daemon.status"] = STATUS
    shown = banger("daemon", "status").stdout
    assert "ops active:   1" in shown
    assert "7       op-1" in shown
    assert json.loads(banger("daemon", "status", "--json").stdout) == STATUS


def test_doctor_needs_no_daemon(banger: Banger) -> None:
    """`doctor` examines the host without a daemon; its exit code says whether a check failed."""
    pytest.importorskip("banger.doctor")
    ran = banger("doctor", "--json")
    found = json.loads(ran.stdout)
    failed = [check for check in found["checks"] if check["status"] == "fail"]
    assert found["checks"]
    assert (found["ok"], ran.returncode) == (not failed, 8 if failed else 0)
    assert banger("doctor").returncode == ran.returncode


def test_help_shows_this_hosts_defaults(banger: Banger, daemon: FakeDaemon) -> None:
    """`vm create --help` shows what a VM gets here when nothing is asked for."""
    shown = banger("vm", "create", "--help").stdout
    assert "--image debian-12" in shown
    assert "Examples:\n  banger vm create web --wait\n" in shown
