"""What was: told from the log, also about what is gone."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from banger.testing.home import Home

pytestmark = pytest.mark.guest  # a VM is made, though none is booted


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    """A banger in which `web` was made and deleted, and `sick` failed for want of a port."""
    with Home() as home:
        assert home.banger("vm", "create", "web", "--no-start", "--wait", timeout_s=280).returncode == 0
        home.noon = str(time.time_ns() // 1000)  # type: ignore[attr-defined]
        assert home.banger("vm", "delete", "web").returncode == 0
        yield home


def test_history_is_kept_after_the_vm_is_gone(home: Home) -> None:
    """Every operation is there, the oldest first."""
    ops = home.json("vm", "history", "web")["ops"]
    assert [(op["kind"], op["fate"]) for op in ops] == [("vm.create", "done"), ("vm.delete", "done")]


def test_the_vms_of_an_earlier_moment(home: Home) -> None:
    """A deleted VM is in the list of the moment at which it was there, and in no other."""
    from datetime import datetime

    noon = datetime.fromtimestamp(int(home.noon) / 1e6).isoformat()  # type: ignore[attr-defined]
    then = home.json("vm", "list", "-a", "--at", noon)["vms"]
    assert [(vm["name"], vm["state"]) for vm in then] == [("web", "stopped")]
    assert home.json("vm", "list", "-a", "--at", "1d")["vms"] == []
    assert home.json("vm", "list", "-a", "--at", "0s")["vms"] == []
    bad = home.banger("vm", "list", "--at", "noonish")
    assert bad.returncode == 2
    assert "is no moment" in bad.stderr


def test_why_tells_the_last_failure(home: Home) -> None:
    """A failed start is told with its step, its error and what was undone; a well VM has none."""
    assert "No operation has failed" in home.banger("vm", "why", "web").stdout
    assert home.banger("vm", "create", "sick", "--no-start", "--wait").returncode == 0
    vm = home.json("vm", "show", "sick")["vm"]
    (home.dirs.vm(vm["id"]).overlay).unlink()
    failed = home.banger("vm", "start", "sick")
    assert failed.returncode not in (0, 1)
    assert home.banger("vm", "delete", "sick").returncode == 0
    story = home.banger("vm", "why", "sick").stdout
    assert "vm.start was asked for sick" in story
    assert "overlay.ext4" in story
    assert "It ended undone" in story
    assert home.banger("vm", "why", "nobody").returncode == 3


def test_events_are_listed_filtered_and_verified(home: Home) -> None:
    """The log of one VM begins with its reservation and ends with its deletion; it verifies."""
    events = home.json("events", "list", "--vm", "web")["events"]
    assert [event["type"] for event in events] == [
        "vm.reserved",
        "vm.desired",
        "vm.created",
        "vm.desired",
        "vm.deleted",
    ]
    started = home.json("events", "list", "--type", "step.started")["events"]
    assert {event["type"] for event in started} == {"step.started"}
    assert home.json("events", "verify")["ok"] is True
    assert home.json("state", "rebuild")["changed"] == []


def test_a_tampered_log_is_named(home: Home) -> None:
    """`events verify` exits with 1 and names the row; the export is still readable."""
    file = home.path / "log.jsonl"
    exported = home.banger("events", "export").stdout
    file.write_text(exported.replace('"web"', '"wed"', 1).replace("web", "wed", 1))
    bad = home.banger("events", "verify", "--file", str(file))
    assert bad.returncode == 1
    assert "is the first bad one" in bad.stderr
