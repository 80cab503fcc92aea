from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys

import msgspec
import pytest

from banger import config, proc
from banger.errors import AlreadyExists, Fenced
from banger.events import queries, tables, work
from banger.events import vocabulary as ev
from banger.events.fold import fold_op
from banger.events.log import EventLog, mint, row_hash
from banger.model import Resource, VmSpec

REST = "stream, version, op, type, schema, data, actor, time_us, boot_us, prev, hash"
SPEC = VmSpec(name="web", image="debian-12", kernel="debian-12", vcpu=1, memory_mib=256, disk_mib=1024)


def request(lane: str = "lane", kind: str = "test.noop") -> ev.OpRequested:
    return ev.OpRequested(kind=kind, args={}, steps=("one", "two"), titles=("1", "2"), lane=lane)


def reserved(name: str) -> ev.VmReserved:
    return ev.VmReserved(spec=msgspec.structs.replace(SPEC, name=name), host="h")


def dump(log: EventLog) -> dict[str, list[tuple[object, ...]]]:
    """Every row of every projection."""
    names = [table._meta.table_name for table in tables.PROJECTIONS]
    return {name: log.db.execute(f"SELECT * FROM {name} ORDER BY 1, 2").fetchall() for name in names}


def test_an_append_is_read_back_in_order(log: EventLog) -> None:
    """What is appended is read back whole, numbered in the order of the appends."""
    op = log.request(request())
    with log.transaction() as tx:
        tx.append(op, ev.StepProgress(step=0, message="a\nb\u202e"), op=op)
        tx.append("vm-1", ev.VmDesired(state="stopped"), op=op)
    rows = log.read()
    assert [row.seq for row in rows] == [1, 2, 3]
    assert [(row.stream, row.version) for row in rows] == [(op, 1), (op, 2), ("vm-1", 1)]
    assert rows[1].event == ev.StepProgress(step=0, message="a\nb\u202e")
    assert log.read(after=2) == rows[2:]
    assert log.read(stream="vm-1") == rows[2:]
    assert log.last_seq() == 3


def test_a_failed_transaction_leaves_nothing(log: EventLog) -> None:
    """A block that raises takes its appends and their projections with it."""
    with contextlib.suppress(ZeroDivisionError), log.transaction() as tx:
        tx.append("op-x", request(), op="op-x")
        raise ZeroDivisionError
    assert log.read() == []
    assert queries.active_count(log) == 0


def test_a_stream_version_is_taken_once(log: EventLog) -> None:
    """The database itself refuses a second row with the same stream and version."""
    log.request(request())
    with pytest.raises(sqlite3.IntegrityError):
        log.db.execute(f"INSERT INTO event (seq, {REST}) SELECT 99, {REST} FROM event")


def test_a_name_is_reserved_once(log: EventLog) -> None:
    """The second request for a VM's name fails whole: no operation, no row."""
    log.request(request("vm-1"), ("vm-1", reserved("web")))
    with pytest.raises(AlreadyExists):
        log.request(request("vm-2"), ("vm-2", reserved("web")))
    assert len(queries.vms(log)) == 1
    assert queries.active_count(log) == 1


def test_the_hash_chain_covers_every_row(log: EventLog) -> None:
    """Each row's hash is sha256 over the previous hash and the row."""
    op = log.request(request())
    with log.transaction() as tx:
        tx.append(op, ev.OpCancelRequested(), op=op)
    previous = b"\0" * 32
    for *row, prev, digest in log.db.execute(f"SELECT seq, {REST} FROM event ORDER BY seq"):
        assert prev == previous
        assert digest == row_hash(previous, tuple(row))
        previous = digest


def test_projections_are_rebuilt_identically(log: EventLog) -> None:
    """Thrown away and rebuilt, every projection has the very same rows, the queue too."""
    first = log.request(request("vm-1"), ("vm-1", reserved("web")))
    log.request(request("other"))
    held = work.claim(log, proc.me())
    assert held is not None
    file = Resource(kind="file", id="/x")
    with log.transaction() as tx:
        tx.append(first, ev.StepStarted(step=0, name="one", title="1", attempt=1, deadline_s=9), op=first)
        tx.append(first, ev.ResourceIntended(resource=file, vm="vm-1", step="one"), op=first)
        tx.append(first, ev.StepDone(step=0, name="one", seconds=0.1, facts={"a": 1}), op=first)
        tx.append(first, ev.ResourceHeld(resource=file, vm="vm-1", step="one"), op=first)
        tx.append(first, ev.StepFailed(step=1, name="two", error={}, retry_in_s=5.0), op=first)
    before = dump(log)
    assert all(before[name] for name in ("op", "work", "vm", "resource"))
    log.rebuild()
    assert dump(log) == before


def test_fold_goes_on_from_where_it_stopped(log: EventLog) -> None:
    """fold(a + b) == fold(b, start=fold(a)), at every split."""
    op = log.request(request())
    work.claim(log, proc.me())
    with log.transaction() as tx:
        for index in (0, 1):
            started = ev.StepStarted(step=index, name="x", title="x", attempt=1, deadline_s=9)
            tx.append(op, started, op=op)
            tx.append(op, ev.StepDone(step=index, name="x", seconds=0.0, facts={str(index): index}), op=op)
        tx.append(op, ev.OpEnded(fate="done"), op=op)
    rows = log.read(stream=op)
    whole = fold_op(rows)
    assert whole is not None
    assert whole.fate == "done"
    assert whole.facts == {"0": 0, "1": 1}
    for split in range(len(rows)):
        assert fold_op(rows[split:], start=fold_op(rows[:split])) == whole


def test_a_lane_runs_in_order_and_lanes_in_parallel(log: EventLog) -> None:
    """The second operation of a lane waits for the first; another lane does not."""
    first, second, other = (log.request(request(lane)) for lane in ("a", "a", "b"))
    claims = [work.claim(log, proc.me()) for _ in range(3)]
    assert [c.op if c else None for c in claims] == [first, other, None]
    with log.transaction() as tx:
        tx.append(first, ev.OpEnded(fate="done"), op=first)
    after = work.claim(log, proc.me())
    assert after is not None
    assert after.op == second


def test_a_fenced_worker_records_nothing(log: EventLog) -> None:
    """After a second claim the first one's appends are refused."""
    op = log.request(request())
    old = work.claim(log, proc.me())
    assert old is not None
    with log.transaction() as tx:
        tx.append(op, ev.OpInterrupted(epoch=1, reason="test"), op=op)
    new = work.claim(log, proc.me())
    assert new is not None
    assert new.epoch == old.epoch + 1
    with pytest.raises(Fenced), log.transaction() as tx:
        work.guard(tx, old)
    with log.transaction() as tx:
        assert work.guard(tx, new) is False


def test_a_dead_workers_claim_is_freed(log: EventLog) -> None:
    """Reaping frees what a dead process holds and leaves what a living one holds."""
    dead = msgspec.structs.replace(proc.me(), start_ticks=1)
    lost, kept = log.request(request("a")), log.request(request("b"))
    assert work.claim(log, dead) is not None
    assert work.claim(log, proc.me()) is not None
    assert work.reap(log) == [lost]
    assert work.reap(log) == []
    again = work.claim(log, proc.me())
    assert again is not None
    assert (again.op, again.epoch) == (lost, 2)
    assert kept in queries.running_workers(log).values()


def test_an_operation_is_found_by_part_of_its_id(log: EventLog) -> None:
    """A unique end or beginning of an id is enough, with or without `op-`."""
    op = log.request(request())
    for word in (op, op[3:], op[-4:], op[:6]):
        assert queries.find_op(log, word).id == op


def test_ids_sort_by_time() -> None:
    """Ids minted later are greater."""
    ids = [mint("op", salt) for salt in range(100)]
    assert ids == sorted(ids)
    assert len(set(ids)) == 100


APPEND = """
import sys
from pathlib import Path
from banger.events import vocabulary as ev
from banger.events.log import EventLog

log = EventLog(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[2]), "writer")
for _ in range(200):
    with log.transaction() as tx:
        tx.append("shared", ev.OpCancelRequested(), op=None)
"""


def test_many_processes_append_without_losing_a_row(dirs: config.Dirs, log: EventLog) -> None:
    """Four writers at once: every row is there, numbered without gap, and none got `locked`."""
    words = [sys.executable, "-c", APPEND, str(dirs.database), str(dirs.work_bell)]
    writers = [subprocess.Popen(words) for _ in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    rows = log.read(stream="shared")
    assert [row.version for row in rows] == list(range(1, 801))
    assert [row.seq for row in rows] == list(range(1, 801))
