"""Root disks that the host joins, on a recorded host: what is lost or does not fit is never started."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from banger.events import queries
from banger.helper import names, storage
from banger.helper.ledger import Ledger
from banger.helper.requests import Request, SnapshotEnsure
from banger.helper.verbs import Call, Caller
from banger.images import whole
from banger.rpc import protocol as p
from banger.tasks import snapshot
from banger.tasks.registry import pipelines
from banger.testing import oracle
from banger.testing.lane import Lane
from banger.testing.recording_root import RecordingRoot
from banger.testing.root_pool import recording_host
from banger.testing.scenes import ON_SNAPSHOT, ask

LOST = b"SnAp" + bytes(4) + b"\1\0\0\0" + b"\x08\0\0\0"
"""The header of a snapshot that the kernel has given up (dm-snap-persistent.c, disk_header)."""

STRAY = "vm-stray000"


@pytest.fixture(scope="module")
def lane() -> Iterator[Lane]:
    with Lane(pipelines()) as lane:
        yield lane


class Outcome(NamedTuple):
    """How the last operation ended, why the VM is as it is, and what is on one side only."""

    fate: str | None
    error: str
    reason: str | None
    strays: list[str]


def outcome(lane: Lane) -> Outcome:
    lane.work().result()
    with lane.opened() as (log, world):
        last, (vm,) = queries.ops(log, limit=1)[0], queries.vms(log)
        error = (last.error or {}).get("message", "")
        return Outcome(last.fate, str(error), vm.reason, list(oracle.strays(log, world)))


def lose(lane: Lane) -> None:
    """Do to a VM's changes what the kernel does when there is nowhere for another one."""
    with lane.opened() as (log, world):
        cow = world.dirs.vm(queries.find_vm(log, "web").id).cow
    with cow.open("r+b") as file:
        file.write(LOST)


def test_room_is_for_every_chunk() -> None:
    """As measured on a real kernel: each chunk, one for the list of each 256, and three."""
    assert snapshot.cow_bytes(64 << 20) == (16384 + 64 + 3) * 4096
    assert snapshot.cow_bytes((64 << 20) + 512) == (16385 + 64 + 3) * 4096


def test_h36_a_disk_that_is_lost_is_told_and_not_started(lane: Lane) -> None:
    """When its VM ends its owner is told, and a start is refused with that and leaves nothing."""
    lane.request(f"vm.stop{ON_SNAPSHOT}")
    lose(lane)
    stopped = outcome(lane)
    assert stopped.fate == "done"
    assert stopped.reason is not None
    assert stopped.reason.endswith("its root disk was full, and what was changed on it is lost")
    lane.deed(ask(p.VmStart(vm="web"))).result()
    started = outcome(lane)
    assert started.fate == "undone"
    assert started.error.startswith("web cannot be started: its root disk was full")
    assert started.strays == []


def test_changes_of_another_base_are_not_started(lane: Lane) -> None:
    """Changes are by block: on an image that was made anew they would be nonsense."""
    lane.request(f"vm.start{ON_SNAPSHOT}")
    with lane.opened() as (log, world):
        digest = str(queries.find_vm(log, "web").image_digest)
    twin = world.dirs.cache / "images" / digest / whole.FILE
    with twin.open("r+b") as file:
        file.seek(1024 + 0x68)
        file.write(os.urandom(16))
    started = outcome(lane)
    assert started.fate == "undone"
    assert started.error == "The image of web was made anew, and what web has changed does not fit it."
    assert started.strays == []


Plant = Callable[[Path, tuple[int, int]], str]


def _stray_snapshot(place: Path, fds: tuple[int, int]) -> str:
    asked = SnapshotEnsure(vm=STRAY)
    RecordingRoot(place).ask(Request(op="op-stray", step="s", epoch=1, key="stray", ask=asked), fds)
    return f"snapshot {names.device(os.getuid(), STRAY)}"


def _stray_loop(place: Path, fds: tuple[int, int]) -> str:
    caller = Caller(uid=os.getuid(), gid=os.getgid())
    call = Call(caller=caller, op="op-stray", step="s", epoch=1, fds=fds)
    with contextlib.closing(sqlite3.connect(place.with_name("root.db"), isolation_level=None)) as db:
        storage.attach(
            recording_host(place / "root"), Ledger(db), call, STRAY, storage.COW, fds[1], read_only=False
        )
    return f"loop {names.loop(os.getuid(), STRAY, storage.COW)}"


@pytest.mark.parametrize("plant", [_stray_snapshot, _stray_loop])
def test_one_that_is_nobodys_is_found_and_removed(lane: Lane, plant: Plant) -> None:
    """A snapshot, or a loop device that is left of one, is a leak; the sweep removes it and no other's."""
    lane.request(f"vm.kill{ON_SNAPSHOT}")
    lane.work().result()
    lane.deed(ask(p.VmStart(vm="web"))).result()
    lane.work().result()
    assert outcome(lane).strays == []
    files = lane.home / "base", lane.home / "cow"
    for file in files:
        file.touch()
        os.truncate(file, storage.MIN_BYTES)
    with files[0].open("rb") as base, files[1].open("r+b") as cow:
        line = plant(lane.place, (base.fileno(), cow.fileno()))
    with lane.opened() as (log, world):
        assert list(oracle.strays(log, world)) == [f"leaked: {line}"]
    lane.deed(ask(p.OpsSweep())).result()
    swept = outcome(lane)
    assert (swept.fate, swept.strays) == ("done", [])
    with lane.opened() as (log, _):
        assert queries.find_vm(log, "web").state == "running"


def test_a_vm_in_a_jail_has_its_disk_there(lane: Lane) -> None:
    """Firecracker is given the device by root, and it is gone with the jail when the VM stops."""
    lane.request("vm.create, nothing cached")
    lane.work().result()
    asked = p.VmCreate(name="caged", network="bridge", root_disk="snapshot")
    for request in (asked, p.VmStop(vm="caged")):
        lane.deed(ask(request), vmm="firecracker").result()
        lane.work().result()
        with lane.opened() as (log, world):
            kinds = {held.kind for held in queries.resources(log, vm_id=queries.find_vm(log, "caged").id)}
            assert queries.ops(log, limit=1)[0].fate == "done"
            assert list(oracle.strays(log, world)) == []
        assert ({"jail", "snapshot"} <= kinds) == (request is asked)
    assert {"jail", "snapshot"}.isdisjoint(kinds)
