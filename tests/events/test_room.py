"""Operations wait for room on the host, in the order in which they were asked for."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from banger import proc
from banger.config import Capacity
from banger.events import queries, work
from banger.events import vocabulary as ev
from banger.events.log import EventLog
from banger.model import Needs, VmSpec

SPEC = VmSpec(name="web", image="i", kernel="k", vcpu=1, memory_mib=256, disk_mib=1024)


HOST = Capacity(memory_mib=1024, vcpu=8, at_once=9, disk=Path("/tmp"), disk_reserve_mib=0)


def create(log: EventLog, vm: str, *, memory_mib: int = 256, vcpu: int = 1, disk_mib: int = 0) -> str:
    spec = msgspec.structs.replace(SPEC, name=vm, memory_mib=memory_mib, vcpu=vcpu)
    needs = Needs(memory_mib=memory_mib, vcpu=vcpu, disk_mib=disk_mib)
    asked = ev.OpRequested(
        kind="vm.create", args={}, steps=("a",), titles=("a",), lane=vm, vm=vm, needs=needs
    )
    return log.request(asked, (vm, ev.VmReserved(spec=spec, host="h")))


def claimed(log: EventLog, **limits: int) -> list[str]:
    """Take whatever may be taken now."""
    found = []
    while (held := work.claim(log, proc.me(), msgspec.structs.replace(HOST, **limits))) is not None:
        found.append(held.op)
    return found


def end(log: EventLog, op: str, vm: str, *, runs: bool) -> None:
    with log.transaction() as tx:
        if runs:
            tx.append(vm, ev.VmStarted(process=proc.me(), ssh_port=1, accelerator="tcg"), op=op)
        else:
            tx.append(vm, ev.VmDeleted(), op=op)
        tx.append(op, ev.OpEnded(fate="done"), op=op)


def test_memory_bounds_how_many_run_at_once(log: EventLog) -> None:
    """Four of 256 MiB fit into 1024; the next begins when one is gone, not when one is ready."""
    ops = [create(log, f"vm-{n}") for n in range(6)]
    assert claimed(log) == ops[:4]
    end(log, ops[0], "vm-0", runs=True)
    assert claimed(log) == []
    end(log, ops[1], "vm-1", runs=False)
    assert claimed(log) == [ops[4]]
    with log.transaction() as tx:
        tx.append("vm-0", ev.VmStopped(reason="test"))
    assert claimed(log) == [ops[5]]


def test_each_is_told_why_it_waits_and_only_once(log: EventLog) -> None:
    """The reason is an event and is shown, however often workers look; it goes with the claim."""
    ops = [create(log, f"vm-{n}", memory_mib=600) for n in range(3)]
    for _ in range(3):
        claimed(log)
    told = log.read(kind="op.waiting")
    assert [row.stream for row in told] == ops[1:]
    reason = "waits for memory: 600 MiB needed, 424 of 1024 MiB free"
    assert [op.reason for op in reversed(queries.ops(log, limit=3))] == [None, reason, reason]
    assert queries.whole_op(log, ops[1]).waits_for == reason
    end(log, ops[0], "vm-0", runs=False)
    assert claimed(log) == [ops[1]]
    assert queries.whole_op(log, ops[1]).waits_for is None
    assert log.rebuild() == []


def test_virtual_cpus_bound_too(log: EventLog) -> None:
    """Eight of them are there: three VMs with three each do not fit."""
    ops = [create(log, f"vm-{n}", vcpu=3) for n in range(3)]
    assert claimed(log) == ops[:2]
    reason = queries.ops(log, limit=1)[0].reason
    assert reason == "waits for virtual CPUs: 3 needed, 2 of 8 free"


def test_a_large_one_is_not_overtaken_by_small_ones(log: EventLog) -> None:
    """First come, first served: what fits now still waits behind what came before it."""
    first, large, small = (
        create(log, vm, memory_mib=mib) for vm, mib in (("a", 512), ("b", 1024), ("c", 128))
    )
    assert claimed(log) == [first]
    end(log, first, "a", runs=False)
    assert claimed(log) == [large]
    end(log, large, "b", runs=False)
    assert claimed(log) == [small]


def test_what_needs_no_room_is_never_held_up(log: EventLog) -> None:
    """Stopping and deleting make room; they go ahead while others wait for it."""
    full, waiting = create(log, "a", memory_mib=1024), create(log, "b")
    assert claimed(log) == [full]
    asked = ev.OpRequested(kind="vm.stop", args={}, steps=("a",), titles=("a",), lane="c", vm="c")
    stop = log.request(asked)
    assert claimed(log) == [stop]
    log.cancel(waiting)
    assert claimed(log) == [waiting], "one that was cancelled needs no room to end"


def test_one_that_goes_on_keeps_its_room(log: EventLog) -> None:
    """An interrupted operation is not made to wait again, and nobody takes its memory meanwhile."""
    first, second = create(log, "a", memory_mib=600), create(log, "b", memory_mib=600)
    assert claimed(log) == [first]
    with log.transaction() as tx:
        tx.append(first, ev.OpInterrupted(epoch=1, reason="test"), op=first)
    assert claimed(log) == [first]
    assert queries.whole_op(log, second).waits_for is not None


def test_a_restart_counts_its_own_vm_once(log: EventLog) -> None:
    """On a full host a VM that runs can be restarted: what it has is its own."""
    op = create(log, "a", memory_mib=1024)
    assert claimed(log) == [op]
    end(log, op, "a", runs=True)
    needs = Needs(memory_mib=1024, vcpu=1)
    asked = ev.OpRequested(
        kind="vm.restart", args={}, steps=("a",), titles=("a",), lane="a", vm="a", needs=needs
    )
    restart = log.request(asked)
    assert claimed(log) == [restart]


@pytest.mark.parametrize(("reserve_mib", "at_once"), [(0, 2), (1 << 40, 1)])
def test_disk_space_bounds_how_many_are_made_at_once(
    log: EventLog, tmp_path: Path, reserve_mib: int, at_once: int
) -> None:
    """With too little free, they are made one after another; a lone one is tried, and may fail by itself."""
    ops = [create(log, f"vm-{n}", disk_mib=1) for n in range(2)]
    assert claimed(log, disk_reserve_mib=reserve_mib) == ops[:at_once]
    if at_once == 1:
        assert "waits for disk space" in (queries.ops(log, limit=1)[0].reason or "")
        end(log, ops[0], "vm-0", runs=True)
        assert claimed(log, disk_reserve_mib=reserve_mib) == ops[1:]


def test_some_workers_are_left_for_what_makes_room(log: EventLog) -> None:
    """However much is free, only so many are made at once; what needs no room goes before them."""
    first, second = create(log, "a"), create(log, "b")
    asked = ev.OpRequested(kind="vm.stop", args={}, steps=("a",), titles=("a",), lane="c", vm="c")
    stop = log.request(asked)
    assert claimed(log, at_once=1) == [stop, first]
    work.tell_why(log, msgspec.structs.replace(HOST, at_once=1))
    assert (
        queries.whole_op(log, second).waits_for
        == "waits for its turn: 1 of 1 at once are being made or started"
    )
    end(log, first, "a", runs=True)
    assert claimed(log, at_once=1) == [second]


def test_a_reason_that_is_no_longer_true_is_told_anew(log: EventLog) -> None:
    """First it is not their turn, then there is no memory: each is told both, and no more than that."""
    made = [create(log, f"vm-{n}", memory_mib=512) for n in range(4)]
    assert claimed(log, at_once=1) == made[:1]
    end(log, made[0], "vm-0", runs=True)
    assert claimed(log, at_once=1) == made[1:2]
    for _ in range(3):
        claimed(log, at_once=1)
    told = {op: [row.event.reason for row in log.read(op=op, kind="op.waiting")] for op in made[2:]}  # type: ignore[union-attr]
    for reasons in told.values():
        assert [reason.split(":")[0] for reason in reasons] == ["waits for its turn", "waits for memory"]
