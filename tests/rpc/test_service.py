"""The daemon's answers and its watch, in this process, on a log of its own."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from banger import proc
from banger.config import Config, Dirs
from banger.errors import AlreadyExists, Busy, DiskFull, NotFound, TimedOut, WrongState
from banger.events import queries, work
from banger.events import vocabulary as ev
from banger.events.fold import fold_op
from banger.events.log import EventLog
from banger.model import Process, Resource, VmSpec
from banger.rpc import daemon as daemons
from banger.rpc import protocol as p
from banger.rpc.server import _tail_offset
from banger.rpc.service import Service
from banger.tasks.context import World
from banger.tasks.registry import pipelines
from banger.tasks.saga import Saga

SPEC = VmSpec(name="web", image="debian-12", kernel="debian-12", vcpu=1, memory_mib=256, disk_mib=1024)


@pytest.fixture
def service(dirs: Dirs, log: EventLog) -> Service:
    return Service(dirs, Config(), log, since_us=0, stop=lambda: None)


def running(log: EventLog, process: Process, vm: str = "vm-1") -> None:
    """Record a VM that runs, and what it holds."""
    with log.transaction() as tx:
        tx.append(vm, ev.VmReserved(spec=SPEC, host="h"))
        tx.append(vm, ev.VmCreated(image_digest="i", kernel_digest="k"))
        tx.append(vm, ev.VmStarted(process=process, ssh_port=20001, accelerator="tcg"))
        tx.append(vm, ev.VmReady(seconds=1.0))
        for resource in (Resource(kind="port", id="20001"), Resource(kind="process", id=vm)):
            tx.append(vm, ev.ResourceHeld(resource=resource, vm=vm, step="x"))


def advance(log: EventLog, dirs: Dirs) -> None:
    held = work.claim(log, proc.me())
    assert held is not None
    Saga(log, pipelines(), World(dirs, Config()), held).advance()


def test_ids_are_unique_in_a_burst_and_when_the_clock_is_set_back(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of one millisecond get ids of their own, also those of a millisecond that comes again."""
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now)
    replies = [service.answer(p.VmCreate(name=f"vm-{n}", start=False)) for n in range(20)]
    assert len({reply["vm"] for reply in replies}) == 20
    assert len({reply["op"] for reply in replies}) == 20
    assert {vm.spec.name for vm in queries.vms(service.log)} == {f"vm-{n}" for n in range(20)}


def test_a_name_is_taken_by_the_request_itself(service: Service) -> None:
    """Another request for it fails before any work is done, and leaves no operation."""
    service.answer(p.VmCreate(name="web"))
    with pytest.raises(AlreadyExists):
        service.answer(p.VmCreate(name="web", vcpu=2))
    assert queries.active_count(service.log) == 1


def test_a_request_that_is_cancelled_before_it_ran_frees_its_name(
    service: Service, dirs: Dirs, log: EventLog
) -> None:
    """The name was taken by the request, so the undo of an operation that never ran frees it."""
    op = service.answer(p.VmCreate(name="web"))["op"]
    assert log.cancel(op)
    advance(log, dirs)
    summary = queries.op(log, op)
    assert summary is not None
    assert summary.fate == "cancelled"
    assert queries.vms(log) == []
    assert queries.resources(log) == []


def test_a_vm_on_its_way_is_never_shown_as_stopped(service: Service, log: EventLog) -> None:
    """Between its disks and its start it is being created."""
    service.answer(p.VmCreate(name="web"))
    vm = queries.vms(log)[0]
    with log.transaction() as tx:
        tx.append(vm.id, ev.VmCreated(image_digest="i", kernel_digest="k"))
    assert [row["state"] for row in service.vm_views()] == ["creating"]


def test_a_burial_that_finds_its_vm_alive_releases_nothing(
    service: Service, dirs: Dirs, log: EventLog
) -> None:
    """The port of a VM that runs stays in the ledger."""
    running(log, proc.me())
    vm = queries.vm(log, "vm-1")
    assert vm is not None
    service.bury(vm)
    advance(log, dirs)
    after = queries.vm(log, "vm-1")
    assert after is not None
    assert after.state == "running"
    assert "20001" in queries.resource_ids(log, "port")


def test_what_spans_a_reboot_has_no_duration(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """The boot clock begins anew: no seconds are shown rather than negative ones."""
    op = log.request(ev.OpRequested(kind="t", args={}, steps=("a",), titles=("a",), lane="l"))
    monkeypatch.setattr("banger.events.log.boot_us", lambda: 1)
    with log.transaction() as tx:
        tx.append(op, ev.OpEnded(fate="done"), op=op)
    summary = queries.op(log, op)
    assert summary is not None
    assert summary.seconds is None


@pytest.mark.parametrize("failure", ["worker", "disk"])
def test_trouble_in_housekeeping_does_not_end_the_daemon(
    dirs: Dirs, log: EventLog, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    """A worker that outlives SIGKILL, or a log that cannot be written, is tried again."""
    op = log.request(ev.OpRequested(kind="t", args={}, steps=("a",), titles=("a",), lane="l"))
    work.claim(log, proc.me())
    with log.transaction() as tx:
        late = ev.StepStarted(step=0, name="a", title="a", attempt=1, deadline_s=-1.0)
        tx.append(op, late, op=op)
    tries = []

    def fail(*_: object) -> None:
        tries.append(1)
        raise TimedOut if failure == "worker" else DiskFull

    if failure == "worker":
        monkeypatch.setattr("banger.proc.kill", fail)
    else:
        monkeypatch.setattr("banger.proc.kill", lambda _: None)
        monkeypatch.setattr("banger.events.work.reap", fail)
    monkeypatch.setattr(daemons, "HOUSEKEEPING_S", 0.01)

    async def keep_house() -> None:
        task = asyncio.create_task(daemons.Daemon(dirs, Config(), read_only=False)._housekeeping())
        while len(tries) < 3:
            assert not task.done(), task.exception()
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(asyncio.wait_for(keep_house(), 10))


@pytest.mark.parametrize(
    ("content", "lines", "expected"),
    [
        (b"", 5, b""),
        (b"one\n", 0, b""),
        (b"one\n", 1, b"one\n"),
        (b"one\ntwo", 1, b"two"),
        (b"one\ntwo\n", 1, b"two\n"),
        (b"one\ntwo\n", 2, b"one\ntwo\n"),
        (b"one\ntwo\n", 9, b"one\ntwo\n"),
        (b"\n\n\n", 2, b"\n\n"),
        (b"x" * 200_000 + b"\nend\n", 1, b"end\n"),
        (b"a\n" + b"x" * 200_000 + b"\n", 1, b"x" * 200_000 + b"\n"),
    ],
)
def test_the_last_lines_of_a_console(tmp_path: Path, content: bytes, lines: int, expected: bytes) -> None:
    """Found by reading backwards, block by block."""
    console = tmp_path / "console.log"
    console.write_bytes(content)
    assert content[_tail_offset(console, lines) :] == expected


def stuck(service: Service, log: EventLog, *, one_way: bool) -> str:
    """Record an operation that stuck: deleting a VM, or undoing its creation."""
    if one_way:
        running(log, proc.me())
        op = str(service.answer(p.VmDelete(vm="web"))["op"])
        name = "halt"
    else:
        op = str(service.answer(p.VmCreate(name="web"))["op"])
        name = "name"
    work.claim(log, proc.me())
    with log.transaction() as tx:
        started = ev.StepStarted(step=0, name=name, title=name, attempt=1, deadline_s=9)
        tx.append(op, started, op=op)
        tx.append(op, ev.StepFailed(step=0, name=name, error={"message": "no"}), op=op)
        tx.append(op, ev.OpUndoing(error={"message": "no"}), op=op)
        tx.append(op, ev.OpEnded(fate="stuck", error={"message": "no"}), op=op)
    return op


@pytest.mark.parametrize("back", [True, False])
def test_a_stuck_operation_is_shown_and_goes_on(
    service: Service, dirs: Dirs, log: EventLog, back: bool
) -> None:
    """`retry` goes on from the step that failed, `retry-undo` with the undoing; until then all show it."""
    op = stuck(service, log, one_way=False)
    assert queries.stuck_in(dirs.database) == [(op, "vm.create", "web")]
    assert queries.active_count(log) == 0
    assert [row["state"] for row in service.vm_views()] == ["stuck"]
    assert f"{op} (vm.create web) is stuck" in service.vm_table(everything=True)
    assert service.answer(p.OpsRetryUndo(op=op) if back else p.OpsRetry(op=op)) == {"op": op}
    reopened = fold_op(log.read(stream=op))
    assert reopened is not None
    assert reopened.undoing is back
    assert queries.stuck(log) == []
    assert "stuck" not in service.vm_table(everything=True)
    assert log.rebuild() == []


def test_there_is_no_way_back_past_the_point_of_no_return(service: Service, log: EventLog) -> None:
    """Its undoing cannot be tried again, and it says so; going on can."""
    op = stuck(service, log, one_way=True)
    with pytest.raises(WrongState, match="no way back after 'end the VMM'"):
        service.answer(p.OpsRetryUndo(op=op))
    assert service.answer(p.OpsRetry(op=op)) == {"op": op}
    with pytest.raises(WrongState, match="is not stuck but waiting"):
        service.answer(p.OpsRetryUndo(op=op))


def test_a_stuck_operation_is_given_up(service: Service, dirs: Dirs, log: EventLog) -> None:
    """Nobody is told of it any more, and only what is stuck can be given up."""
    op = stuck(service, log, one_way=False)
    service.answer(p.OpsAbandon(op=op))
    assert queries.stuck_in(dirs.database) == []
    with pytest.raises(WrongState):
        service.answer(p.OpsAbandon(op=op))
    assert log.rebuild() == []


def test_an_image_in_use_is_not_deleted(service: Service, log: EventLog) -> None:
    """Refused with who uses it, before any operation is asked for; free again, it is asked for."""
    running(log, proc.me())
    with log.transaction() as tx:
        published = ev.ArtifactPublished(kind="image", name="debian-12", digest="i", size_bytes=1, details={})
        tx.append("image-debian-12", published)
    with pytest.raises(Busy, match="is used by web"):
        service.answer(p.ImageDelete(image="debian-12"))
    assert queries.active_count(log) == 0
    with log.transaction() as tx:
        tx.append("vm-1", ev.VmDeleted())
    assert service.answer(p.ImageDelete(image="debian-12"))["op"]
    with pytest.raises(NotFound):
        service.answer(p.ImageDelete(image="unheard-of"))
