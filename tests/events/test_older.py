"""A log that an older version wrote: read, gone on with, and never rewritten.

`data/schema-1.sql` is the whole database of a banger whose events had schema 1: real VMs that were
created, stopped, restarted, killed and deleted, an operation cancelled, others undone, stuck,
retried and abandoned, with that version's own projections.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from banger import config, proc
from banger.errors import LogTooNew
from banger.events import queries, upcast, work
from banger.events import vocabulary as ev
from banger.events.fold import fold_op
from banger.events.log import EventLog
from banger.events.projections import vm_decoder
from banger.events.verify import verify_log

SCHEMA_1 = Path(__file__).with_name("data") / "schema-1.sql"
Rows = list[tuple[Any, ...]]


@pytest.fixture
def old(dirs: config.Dirs) -> Iterator[sqlite3.Connection]:
    """The database as the older version left it."""
    db = sqlite3.connect(dirs.database, isolation_level=None)
    db.executescript(SCHEMA_1.read_text("utf-8"))
    yield db
    db.close()


def opened(dirs: config.Dirs) -> EventLog:
    return EventLog(dirs.database, dirs.work_bell, dirs.event_bell, "test")


def projected(db: sqlite3.Connection, table: str, columns: str) -> Rows:
    """Give a projection's rows; a VM as a value, since it has more fields today."""
    rows = sorted(db.execute(f"SELECT {columns} FROM {table}"), key=repr)
    return [(*row[:-1], vm_decoder.decode(row[-1])) for row in rows] if table == "vm" else rows


COLUMNS = {
    "op": "op, kind, vm, name, parent, state, fate, step, requested_us, ended_us, seconds, error",
    "resource": "kind, id, state, vm, op, step, time_us",
    "artifact": "kind, name, digest, size_bytes, created_us, details",
    "vm": "vm, name, state, data",
    "work": "op",
}


def test_its_projections_are_made_anew_and_say_the_same(dirs: config.Dirs, old: sqlite3.Connection) -> None:
    """What the older version had projected from its events, this one projects, too."""
    before = {table: projected(old, table, columns) for table, columns in COLUMNS.items()}
    assert [len(before[table]) for table in ("op", "vm", "artifact")] == [18, 1, 2]
    log = opened(dirs)
    assert {table: projected(log.db, table, columns) for table, columns in COLUMNS.items()} == before
    assert log.rebuild() == []
    log.close()


def test_every_event_is_read_in_todays_shape(dirs: config.Dirs, old: sqlite3.Connection) -> None:
    """Upcast on reading: each operation folds to the fate that was recorded, and the chain stands."""
    hashes = old.execute("SELECT seq, hash FROM event ORDER BY seq").fetchall()
    log = opened(dirs)
    rows = log.read()
    assert len(rows) == len(hashes) == 507
    claims = [row.event for row in rows if isinstance(row.event, ev.OpClaimed)]
    assert {claim.worker.boot_id for claim in claims} == {""}
    for op in queries.ops(log, limit=-1):
        folded = fold_op(log.read(stream=op.id))
        assert folded is not None
        assert (folded.fate, folded.error) == (op.fate, op.error)
    assert log.db.execute("SELECT seq, hash FROM event ORDER BY seq").fetchall() == hashes
    log.close()


def test_it_is_gone_on_with_in_one_chain(dirs: config.Dirs, old: sqlite3.Connection) -> None:
    """New events follow the old ones, in their own schema; verification covers both."""
    log = opened(dirs)
    op = log.request(ev.OpRequested(kind="t", args={}, steps=("a",), titles=("a",), lane="l"))
    held = work.claim(log, proc.me())
    assert held is not None
    assert held.op == op
    schemas = log.db.execute("SELECT DISTINCT schema FROM event ORDER BY seq").fetchall()
    assert schemas == [(1,), (ev.SCHEMA,)]
    log.close()
    verdict = verify_log(dirs.database)
    assert (verdict.rows, verdict.bad_seq) == (509, None)


def test_an_interrupted_claim_of_an_older_version_is_freed(
    dirs: config.Dirs, old: sqlite3.Connection
) -> None:
    """A claim without a boot id, by a process that is no more, is given to another worker."""
    log = opened(dirs)
    op = log.request(ev.OpRequested(kind="t", args={}, steps=("a",), titles=("a",), lane="l"))
    worker = {"pid": 2**22 + 1, "start_ticks": 7}
    with log.transaction() as tx:
        tx.append(op, ev.OpClaimed(epoch=1, worker=proc.me()), op=op)
    log.close()
    old.execute(
        "UPDATE event SET schema = 1, data = ? WHERE seq = 509",
        (json.dumps({"type": "op.claimed", "epoch": 1, "worker": worker}),),
    )
    log = opened(dirs)
    assert log.rebuild() == ["work"]
    assert work.reap(log) == [op]
    log.close()


def test_what_a_newer_version_wrote_is_not_misread(dirs: config.Dirs, old: sqlite3.Connection) -> None:
    """An event of a schema that is not known yet ends the opening with a sentence, not a guess."""
    opened(dirs).close()
    old.execute("UPDATE event SET schema = ? WHERE seq = 507", (ev.SCHEMA + 1,))
    with pytest.raises(LogTooNew):
        opened(dirs)
    with pytest.raises(LogTooNew):
        upcast.upcast(ev.SCHEMA + 1, "op.ended", "{}")


def test_projections_of_a_newer_version_are_left_alone(dirs: config.Dirs, old: sqlite3.Connection) -> None:
    """A database whose tables have a newer version is not opened for writing, and not changed."""
    old.execute("PRAGMA user_version = 99")
    before = old.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall()
    with pytest.raises(LogTooNew):
        opened(dirs)
    assert old.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall() == before
