"""The database file: opened, brought to this version's tables, watched for rows that go missing."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from peewee import DatabaseError, SqliteDatabase

from banger.errors import LogDamaged, LogTooNew, NotFound
from banger.events import tables
from banger.events import vocabulary as ev

NO_HASH = b"\0" * 32
WATCHED = tuple(tables.name(table) for table in tables.PROJECTIONS)
_SMALL = tuple(name for name in WATCHED if name != "op")  # no row of it is ever deleted, so it grows


def read_only_uri(path: Path) -> str:
    """Give the URI that opens a log to be read only: it is neither made nor changed.

    A WAL database needs a `-shm` file beside it, also for reading. On a read-only medium there can be
    none; without a `-wal` file none is needed, and `immutable` says so (sqlite.org/wal.html, section 5).
    """
    writable = os.access(path.parent, os.W_OK)
    wal = path.with_name(f"{path.name}-wal")
    return f"{path.absolute().as_uri()}?mode=ro{'' if writable or wal.exists() else '&immutable=1'}"


@contextlib.contextmanager
def only_read(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a log that may be in use, or damaged, to read it past its projections. Raises NotFound."""
    if not path.exists():
        raise NotFound(f"There is no event log at {path}.", hint="It is made by the first command.")
    with contextlib.closing(sqlite3.connect(read_only_uri(path), uri=True)) as db:
        yield db


def connect(path: Path, *, read_only: bool) -> SqliteDatabase:
    """Open the database; one that is only read is neither made nor changed.

    Raises LogDamaged when the file is no database.
    """
    if read_only:
        database = SqliteDatabase(read_only_uri(path), uri=True)
    else:
        pragmas = {"journal_mode": "wal", "synchronous": "normal", "busy_timeout": 10_000}
        database = SqliteDatabase(str(path), pragmas=pragmas)
    try:
        database.connect()
    except DatabaseError as error:
        raise LogDamaged(f"{path} cannot be read: {error}.") from error
    return database


def require_complete(db: sqlite3.Connection) -> None:
    """Raise LogTooNew or LogDamaged when the tables cannot be read as they are."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > tables.VERSION:
        raise LogTooNew
    if version != tables.VERSION or not _complete(db):
        raise LogDamaged(
            "The database lacks tables of this version, and is only read.",
            hint="`banger events export` reads the events all the same.",
        )


def prepare(database: SqliteDatabase, db: sqlite3.Connection) -> bool:
    """Make what tables are missing; True when the projections have to be made from the log.

    The caller holds the writers' lock and a transaction. Raises LogTooNew.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > tables.VERSION:
        raise LogTooNew
    if _complete(db) and version == tables.VERSION and db.execute("SELECT 1 FROM head").fetchone():
        return False
    if version != tables.VERSION:
        for name in WATCHED:
            db.execute(f"DROP TABLE IF EXISTS {name}")
    with database.bind_ctx(tables.TABLES):
        database.create_tables(tables.TABLES)
    _begin_head(db)
    db.execute(f"PRAGMA user_version = {tables.VERSION}")
    return db.execute("SELECT 1 FROM event").fetchone() is not None


def _complete(db: sqlite3.Connection) -> bool:
    names = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    return names >= {tables.name(table) for table in tables.TABLES}


def _begin_head(db: sqlite3.Connection) -> None:
    if db.execute("SELECT 1 FROM head").fetchone() is None:
        last = db.execute("SELECT seq, hash FROM event ORDER BY seq DESC LIMIT 1").fetchone()
        zeros = ", 0" * len(WATCHED)
        db.execute(f"INSERT INTO head VALUES (1, ?, ?{zeros})", last or (0, NO_HASH))  # noqa: S608
        recount(db)


def check_schema(db: sqlite3.Connection) -> None:
    """Raise LogTooNew when the newest event was written by a newer version."""
    last = db.execute("SELECT schema FROM event ORDER BY seq DESC LIMIT 1").fetchone()
    if last is not None and last[0] > ev.SCHEMA:
        raise LogTooNew


def watch(db: sqlite3.Connection) -> None:
    """Count this connection's inserts and deletes; triggers in TEMP are no other connection's."""
    for name in WATCHED:
        for when, sign in (("INSERT", "+"), ("DELETE", "-")):
            db.execute(
                f"CREATE TEMP TRIGGER {name}_{when.lower()} AFTER {when} ON main.{name}"  # noqa: S608
                f" BEGIN UPDATE head SET {name} = {name} {sign} 1; END"
            )


def missing(db: sqlite3.Connection) -> bool:
    """Tell whether a projection has another number of rows than banger's connections left there."""
    differences = db.execute(f"SELECT {_differences(WATCHED)} FROM head").fetchone()  # noqa: S608  our own names
    return differences is None or any(differences)


def _differences(names: Iterable[str]) -> str:
    return ", ".join(f"(SELECT count(*) FROM {name}) - {name}" for name in names)  # noqa: S608  our own names


def recount(db: sqlite3.Connection) -> None:
    """Take the numbers of rows as they are now for right."""
    counts = ", ".join(f"{name} = (SELECT count(*) FROM {name})" for name in WATCHED)  # noqa: S608  our names
    db.execute(f"UPDATE head SET {counts}")  # noqa: S608


_BEGIN = f"""
    SELECT h.seq, h.hash, e.seq, e.hash, {_differences(_SMALL)}
    FROM head h LEFT JOIN event e ON e.seq = (SELECT max(seq) FROM event)
"""  # noqa: S608  our own names


class Begin(NamedTuple):
    """What a writer finds: the log's last event, and whether rows of the projections are missing."""

    seq: int
    hash: bytes
    missing: bool


def begin(db: sqlite3.Connection) -> Begin:
    """Look where the log ends: one question, as every transaction asks it.

    Raises LogDamaged when the log does not end where it was last written.
    """
    found = db.execute(_BEGIN).fetchone()
    if found is None:  # something has deleted the note of where the log ends, and the counts with it
        _begin_head(db)
        found = (*db.execute("SELECT seq, hash, seq, hash FROM head").fetchone(), True)
    noted, noted_hash, last, last_hash, *differences = found
    if (noted, noted_hash) != (last or 0, last_hash or NO_HASH):
        raise LogDamaged(
            f"The event log ends with row {last or 0}; the last that was written is row {noted}."
            if last != noted
            else f"Row {last}, the last of the event log, is not what was written."
        )
    return Begin(noted, noted_hash, any(differences))


def note_head(db: sqlite3.Connection, seq: int, digest: bytes) -> None:
    """Write down where the log ends now."""
    db.execute("UPDATE head SET seq = ?, hash = ?", (seq, digest))
