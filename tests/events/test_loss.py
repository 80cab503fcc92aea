"""Rows that something else deletes from the projections come back from the log; nothing is lost."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from banger import config, proc
from banger.errors import AlreadyExists, LogDamaged
from banger.events import database, queries, work
from banger.events import vocabulary as ev
from banger.events.log import EventLog
from banger.events.verify import stored_end, verify_log
from banger.model import VmSpec
from banger.tasks.saga import Saga
from banger.testing.pipelines import FILES

SPEC = VmSpec(name="web", image="debian-12", kernel="debian-12", vcpu=1, memory_mib=256, disk_mib=1024)


@pytest.fixture
def vandal(log: EventLog, dirs: config.Dirs) -> Iterator[sqlite3.Connection]:
    """A connection of something that is not banger."""
    db = sqlite3.connect(dirs.database, isolation_level=None)
    yield db
    db.close()


def files(directory: Path, **traps: str) -> ev.OpRequested:
    return FILES.request(lane="l", args={"directory": str(directory), "traps": traps})


@pytest.mark.parametrize("fails", [False, True], ids=["forward", "undone"])
@pytest.mark.parametrize("table", [*database.WATCHED, "head"])
def test_an_operation_survives_the_loss_of_a_projection_between_any_two_steps(
    log: EventLog,
    vandal: sqlite3.Connection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    table: str,
    fails: bool,
) -> None:
    """The projection is emptied before each of the worker's transactions; the operation ends as ever."""
    op = log.request(files(tmp_path, **({"three/after": "fail"} if fails else {})))
    held = work.claim(log, proc.me())
    assert held is not None
    saga = Saga(log, {FILES.kind: FILES}, SimpleNamespace(dirs=None, config=None), held)  # type: ignore[arg-type]
    before = EventLog._synchronize

    def robbed(log: EventLog, **words: Any) -> None:
        vandal.execute(f"DELETE FROM {table}")
        before(log, **words)

    monkeypatch.setattr(EventLog, "_synchronize", robbed)
    saga.advance()
    monkeypatch.undo()
    log.mend()
    row = queries.op(log, op)
    assert row is not None
    assert row.fate == ("undone" if fails else "done")
    assert len(list(tmp_path.glob("[a-z]*"))) == (0 if fails else 3)
    assert log.rebuild() == []
    assert verify_log(log.path).bad_seq is None


@pytest.mark.parametrize("table", [*database.WATCHED, "head"])
def test_a_lost_projection_is_noticed_and_made_again(
    log: EventLog, vandal: sqlite3.Connection, tmp_path: Path, table: str
) -> None:
    """A single look finds what is missing and makes every projection as it was, byte for byte."""
    spec_of = ev.VmReserved(spec=SPEC, host="h")
    image = ev.ArtifactPublished(kind="image", name="i", digest="d", size_bytes=1, details={})
    log.request(files(tmp_path), ("vm-1", spec_of), ("image-i", image))
    held = work.claim(log, proc.me())
    assert held is not None
    with log.transaction() as tx:
        file = FILES.steps[0].acquires(SimpleNamespace(args={"directory": "/x"}))  # type: ignore[arg-type]
        tx.append(held.op, ev.ResourceIntended(resource=next(iter(file)), step="one"), op=held.op)
    before = log.projected()
    assert all(before.values())
    assert not log.mend(), "nothing is missing yet"
    vandal.execute(f"DELETE FROM {table}")
    assert log.mend()
    assert log.projected() == before
    assert not log.mend()


def test_a_name_stays_taken_while_its_row_is_missing(log: EventLog, vandal: sqlite3.Connection) -> None:
    """A request is decided on whole projections, also when a row was deleted a moment ago."""
    log.request(files(Path("/x")), ("vm-1", ev.VmReserved(spec=SPEC, host="h")))
    vandal.execute("DELETE FROM vm")
    with pytest.raises(AlreadyExists):
        log.request(files(Path("/x")), ("vm-2", ev.VmReserved(spec=SPEC, host="h")))


def test_dropped_tables_are_made_again(log: EventLog, dirs: config.Dirs, vandal: sqlite3.Connection) -> None:
    """Even without its tables, the next process to open the log has every projection."""
    log.request(files(Path("/x")), ("vm-1", ev.VmReserved(spec=SPEC, host="h")))
    before = log.projected()
    for table in database.WATCHED:
        vandal.execute(f"DROP TABLE {table}")
    again = EventLog(dirs.database, dirs.work_bell, dirs.event_bell, "test")
    assert again.projected() == before
    again.close()


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM event WHERE seq = (SELECT max(seq) FROM event)",
        "DELETE FROM event",
        "UPDATE event SET hash = randomblob(32) WHERE seq = 3",
    ],
    ids=["one row cut off", "all cut off", "last row changed"],
)
def test_a_log_that_was_cut_off_is_not_written_to(
    log: EventLog, vandal: sqlite3.Connection, damage: str
) -> None:
    """The next append is refused, whoever makes it, and the log stays as it was found."""
    for lane in "abc":
        log.request(ev.OpRequested(kind="t", args={}, steps=("a",), titles=("a",), lane=lane))
    assert stored_end(log.path) == (3, vandal.execute("SELECT hash FROM head").fetchone()[0])
    vandal.execute(damage)
    rows = vandal.execute("SELECT * FROM event").fetchall()
    with pytest.raises(LogDamaged):
        log.request(files(Path("/x")))
    with pytest.raises(LogDamaged):
        work.claim(log, proc.me())
    assert vandal.execute("SELECT * FROM event").fetchall() == rows
    verdict = verify_log(log.path)
    assert verdict.bad_seq is not None
    assert verdict.bad_seq == len(rows) + (0 if len(rows) == 3 else 1)


def test_a_log_whose_file_is_gone_is_not_written_to(log: EventLog, tmp_path: Path) -> None:
    """What would be written to a file without a name would be lost: it is refused, and so is another file."""
    op = log.request(files(Path("/x")))
    aside = tmp_path / "aside.db"
    log.path.rename(aside)
    with pytest.raises(LogDamaged, match="removed or replaced"):
        log.cancel(op)
    log.path.write_bytes(aside.read_bytes())
    with pytest.raises(LogDamaged, match="removed or replaced"):
        log.cancel(op)
    aside.rename(log.path)
    assert log.cancel(op)
