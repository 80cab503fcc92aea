"""Begin anew from the good rows of a damaged log; the damaged file is kept beside it."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import time
from pathlib import Path

from banger.events import database as db_file
from banger.events import verify
from banger.model import Value

_BESIDE = ("", "-wal", "-shm")


class Salvaged(Value):
    """What came of it: the good rows that the log has now, why the rest is bad, and where the old file is."""

    rows: int
    why: str | None
    kept: Path | None


def salvage(database: Path) -> Salvaged:
    """Replace a damaged log by its good rows; a log that is good is left alone.

    Nobody else may have it open. Raises NotFound without a log.
    """
    verdict = verify.verify_log(database)
    if verdict.bad_seq is None:
        return Salvaged(rows=verdict.rows, why=None, kept=None)
    fresh = database.with_name(f"{database.name}.salvaged")
    _remove(fresh)
    _copy(database, fresh, verdict.rows)
    kept = database.with_name(f"{database.name}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
    for suffix in _BESIDE:
        with contextlib.suppress(FileNotFoundError):
            Path(f"{database}{suffix}").rename(f"{kept}{suffix}")
    fresh.rename(database)
    return Salvaged(rows=verdict.rows, why=verdict.why, kept=kept)


def _remove(path: Path) -> None:
    for suffix in _BESIDE:
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def _copy(source: Path, target: Path, rows: int) -> None:
    """Make a database of the first rows. Its projections are made when it is opened for use."""
    opened = db_file.connect(target, read_only=False)
    db: sqlite3.Connection = opened.connection()  # type: ignore[no-untyped-call]
    try:
        db.execute("BEGIN")
        db_file.prepare(opened, db)
        good = itertools.islice(verify.stored_rows(source), rows)
        columns, marks = ", ".join(verify.COLUMNS), ", ".join("?" * len(verify.COLUMNS))
        db.executemany(f"INSERT INTO event ({columns}) VALUES ({marks})", good)  # noqa: S608  constants
        db.execute("DROP TABLE head")
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        opened.close()
