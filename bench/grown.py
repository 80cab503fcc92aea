"""A log that has grown to millions of events: an append there costs what it costs in a small one."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from pathlib import Path

from banger.events import database
from banger.events import vocabulary as ev
from banger.events.log import EventLog, mint
from bench.figures import OUTPUT, Figures, median

SMALL, LARGE = 1_000, 5_000_000
APPENDS = 1_000
CHUNK = 250_000
FREE_BYTES = 4 << 30
FILL_S = 90.0

# Both hashes are noise of the right size: an append needs only the last row's, as 32 bytes.
_FILL = """
    WITH RECURSIVE op (n) AS (SELECT :first UNION ALL SELECT n + 1 FROM op WHERE n + 1 < :past)
    INSERT INTO event (seq, stream, version, op, type, schema, data, actor, time_us, boot_us, prev, hash)
    SELECT n * :length + version, printf('op-%08x', n), version, printf('op-%08x', n), type, schema, data,
           actor, time_us + n * 1000, boot_us + n * 1000, randomblob(32), randomblob(32)
    FROM op CROSS JOIN pattern
    WHERE n * :length + version <= :rows
    ORDER BY n, version
"""


def measure(figures: Figures, source: EventLog, op: str) -> None:
    """Fill two private logs with copies of an operation's events; append to each, in turns.

    Says so, and measures nothing, where the large one finds no room or takes too long.
    """
    OUTPUT.parent.mkdir(exist_ok=True)
    name = f"append at {LARGE:,} rows p50"
    # Not in the temporary directory, which may be memory.
    with tempfile.TemporaryDirectory(dir=OUTPUT.parent) as directory:
        if (free := shutil.disk_usage(directory).free) < FREE_BYTES:
            figures.skip(name, f"{free >> 20} MiB free, {FREE_BYTES >> 20} wanted")
            return
        small, large = Path(directory, "small"), Path(directory, "large")
        _fill(small, SMALL, source, op)
        if (rows := _fill(large, LARGE, source, op)) < LARGE:
            figures.skip(name, f"only {rows:,} rows in {FILL_S:g} s")
            return
        figures.add("bytes per event, indexes included", (large / "db").stat().st_size / LARGE, "B")
        _compare(figures, name, _open(small), _open(large))


def append(log: EventLog, stream: str, op: str | None) -> float:
    """Append one event, in a transaction of its own; give the seconds."""
    began = time.perf_counter()
    with log.transaction() as tx:
        tx.append(stream, ev.StepProgress(step=0, message="bench"), op=op)
    return time.perf_counter() - began


def _open(directory: Path) -> EventLog:
    directory.mkdir(exist_ok=True)
    return EventLog(directory / "db", directory / "work", directory / "events", "bench")


def _fill(directory: Path, rows: int, source: EventLog, op: str) -> int:
    """Fill a new log with that many rows; give how many there are when the time is over."""
    _open(directory).close()
    pattern = source.db.execute(
        "SELECT version, type, schema, data, actor, time_us, boot_us FROM event WHERE stream = ?", (op,)
    ).fetchall()
    db = sqlite3.connect(directory / "db", isolation_level=None)
    # Nothing to roll back and nobody else here: a journal would write everything twice.
    db.execute("PRAGMA journal_mode = OFF")
    db.execute("PRAGMA synchronous = OFF")
    db.execute("CREATE TEMP TABLE pattern (version, type, schema, data, actor, time_us, boot_us)")
    db.executemany("INSERT INTO pattern VALUES (?, ?, ?, ?, ?, ?, ?)", pattern)
    began, at_once = time.monotonic(), CHUNK // len(pattern)
    for first in range(0, -(-rows // len(pattern)), at_once):
        if time.monotonic() - began > FILL_S:
            break
        values = {"first": first, "past": first + at_once, "length": len(pattern), "rows": rows}
        db.execute(_FILL, values)
    seq, digest = db.execute("SELECT seq, hash FROM event ORDER BY seq DESC LIMIT 1").fetchone()
    database.note_head(db, seq, digest)
    db.execute("PRAGMA journal_mode = WAL")
    db.close()
    _settle(directory / "db")
    return int(seq)


def _settle(path: Path) -> None:
    """Wait until the kernel has written what was filled in: it is not to write during the appends."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _compare(figures: Figures, name: str, small: EventLog, large: EventLog) -> None:
    op, times_small, times_large = mint("op"), [], []
    for _ in range(APPENDS):  # in turns, so that a busy moment hits both
        times_small.append(append(small, op, op))
        times_large.append(append(large, op, op))
    small.close()
    large.close()
    figures.add(f"append at {SMALL:,} rows p50", median(times_small) * 1e3, "ms")
    figures.add(name, median(times_large) * 1e3, "ms")
    figures.add("append at the large / at the small", median(times_large) / median(times_small), "times", 1.2)
