"""The database file: opened, brought to this version's tables, watched for rows that go missing."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path

from peewee import DatabaseError, SqliteDatabase

from banger.errors import LogDamaged, LogTooNew
from banger.events import tables
from banger.events import vocabulary as ev

NO_HASH = b"\0" * 32
WATCHED = tuple(tables.name(table) for table in tables.PROJECTIONS)
_SMALL = tuple(name for name in WATCHED if name != "op")  # no row of it is ever deleted, so it grows


def connect(path: Path, *, read_only: bool) -> SqliteDatabase:
    """Open the database; one that is only read is neither made nor changed.

    Raises LogDamaged when the file is no database.
    """
    if read_only:
        database = SqliteDatabase(f"file:{path}?mode=ro", uri=True)
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


def missing(db: sqlite3.Connection, names: Iterable[str] = _SMALL) -> list[str]:
    """Name the projections that have another number of rows than banger's connections left there."""
    asked = list(names)
    counts = ", ".join(f"(SELECT count(*) FROM {name}) - {name}" for name in asked)  # noqa: S608  our names
    differences = db.execute(f"SELECT {counts} FROM head").fetchone()  # noqa: S608
    return [name for name, difference in zip(asked, differences, strict=True) if difference]


def recount(db: sqlite3.Connection) -> None:
    """Take the numbers of rows as they are now for right."""
    counts = ", ".join(f"{name} = (SELECT count(*) FROM {name})" for name in WATCHED)  # noqa: S608  our names
    db.execute(f"UPDATE head SET {counts}")  # noqa: S608


def head(db: sqlite3.Connection) -> tuple[int, bytes]:
    """Give the number and the hash of the log's last event; (0, NO_HASH) when there is none.

    Raises LogDamaged when the log does not end where it was last written.
    """
    noted = db.execute("SELECT seq, hash FROM head").fetchone()
    last = db.execute("SELECT seq, hash FROM event ORDER BY seq DESC LIMIT 1").fetchone() or (0, NO_HASH)
    if noted != last:
        raise LogDamaged(
            f"The event log ends with row {last[0]}; the last that was written is row {noted[0]}."
            if last[0] != noted[0]
            else f"Row {last[0]}, the last of the event log, is not what was written."
        )
    return last[0], last[1]


def note_head(db: sqlite3.Connection, seq: int, digest: bytes) -> None:
    """Write down where the log ends now."""
    db.execute("UPDATE head SET seq = ?, hash = ?", (seq, digest))
