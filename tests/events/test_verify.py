from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from banger.errors import NotFound
from banger.events import vocabulary as ev
from banger.events.log import EventLog
from banger.events.verify import export, imported, stored_rows, verify

ROWS = 20
Tamper = Callable[[sqlite3.Connection], object]


@pytest.fixture
def database(log: EventLog) -> Path:
    """A log of twenty events in two streams."""
    for number in range(ROWS):
        with log.transaction() as tx:
            tx.append(f"stream-{number % 2}", ev.StepProgress(step=number, message="m"), op=None)
    return log.path


def test_a_log_that_nobody_touched_is_good(log: EventLog, database: Path) -> None:
    """Every row is accepted, and the head is the last row's hash."""
    verdict = verify(stored_rows(database))
    last = log.db.execute("SELECT hash FROM event ORDER BY seq DESC LIMIT 1").fetchone()[0]
    assert (verdict.rows, verdict.bad_seq, verdict.head) == (ROWS, None, last.hex())


@pytest.mark.parametrize(
    ("tamper", "bad"),
    [
        (lambda db: db.execute("UPDATE event SET data = replace(data, 'm', 'n') WHERE seq = 7"), 7),
        (lambda db: db.execute("UPDATE event SET time_us = time_us + 1 WHERE seq = 1"), 1),
        (lambda db: db.execute("UPDATE event SET actor = '{}' WHERE seq = 20"), 20),
        (lambda db: db.execute("UPDATE event SET hash = randomblob(32) WHERE seq = 5"), 5),
        (lambda db: db.execute("UPDATE event SET prev = randomblob(32) WHERE seq = 9"), 9),
        (lambda db: db.execute("UPDATE event SET version = 99 WHERE seq = 9"), 9),
        (lambda db: db.execute("DELETE FROM event WHERE seq = 11"), 11),
        (lambda db: db.execute("DELETE FROM event WHERE seq <= 3"), 1),
        (lambda db: db.execute("UPDATE event SET seq = -seq WHERE seq IN (4, 6)"), 1),
        (
            lambda db: db.executescript(
                "UPDATE event SET seq = 104 WHERE seq = 4; UPDATE event SET seq = 4 WHERE seq = 6;"
                "UPDATE event SET seq = 6 WHERE seq = 104;"
            ),
            4,
        ),
    ],
)
def test_the_first_bad_row_is_named(log: EventLog, database: Path, tamper: Tamper, bad: int) -> None:
    """Changed, cut out, renumbered or swapped: the first row that is not as written is found."""
    tamper(log.db)
    verdict = verify(stored_rows(database))
    assert verdict.bad_seq == bad, verdict.why
    assert verdict.rows == bad - 1
    assert verdict.why


def test_a_damaged_file_does_not_raise(log: EventLog, database: Path) -> None:
    """A file whose pages are garbage is a bad log, not a traceback."""
    log.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with database.open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    verdict = verify(stored_rows(database))
    assert verdict.bad_seq is not None


def test_an_export_is_verified_like_the_log(database: Path, tmp_path: Path) -> None:
    """Exported and read back, the rows are the same; a changed line is found."""
    file = tmp_path / "log.jsonl"
    lines = list(export(stored_rows(database)))
    file.write_text("".join(f"{line}\n" for line in lines))
    assert list(imported(file)) == list(stored_rows(database))
    assert verify(imported(file)).bad_seq is None
    changed = json.loads(lines[12]) | {"op": "op-forged00"}
    file.write_text("".join(f"{line}\n" for line in [*lines[:12], json.dumps(changed), *lines[13:]]))
    assert verify(imported(file)).bad_seq == 13
    file.write_text("".join(f"{line}\n" for line in lines[:5]) + '{"seq": 6')
    assert verify(imported(file)).bad_seq == 6


def test_without_a_log_there_is_a_sentence(tmp_path: Path) -> None:
    """Neither a missing database nor a missing export is created or raises a traceback."""
    with pytest.raises(NotFound):
        verify(stored_rows(tmp_path / "none.db"))
    with pytest.raises(NotFound):
        verify(imported(tmp_path / "none.jsonl"))
    assert list(tmp_path.iterdir()) == []


def test_projections_that_were_tampered_with_are_named_and_mended(log: EventLog) -> None:
    """A rebuild tells which projection was not what the log says."""
    asked = ev.OpRequested(kind="t", args={}, steps=("a",), titles=("a",), lane="l")
    log.request(asked)
    good = log.projected()
    assert log.rebuild() == []
    log.db.execute("UPDATE op SET state = 'ended'")
    log.db.execute("DELETE FROM work")
    assert set(log.rebuild()) == {"op", "work"}
    assert log.projected() == good
