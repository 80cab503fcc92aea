"""What root remembers of its callers: an audit line for each request, answers by key, epochs.

One SQLite file in a directory that only root can enter. A request is written to `running` before
anything is done for it and becomes one audit line when it ends, or when the helper starts after a
death; a line is never changed. Each carries the hash of the one before it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

import msgspec

from banger.errors import DiskFull, Refused
from banger.helper.requests import Request

MAX_KEYS = 10_000
"""Answers, and epochs, that are kept for each owner."""
MAX_LINES = 250_000
"""Audit lines that are kept: at most 1.5 GB. The chain then begins at the oldest that is there."""
MAX_ASK = 4096
"""Bytes of a request in its audit line."""
MAX_MESSAGE = 1000
LINES_SHOWN = 1000

Outcome = Literal["ok", "refused", "failed", "interrupted"]

_BUSY_S = 5.0
_TRIM_EVERY = 1000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS audit (
    seq INTEGER PRIMARY KEY, time_us INTEGER NOT NULL, uid INTEGER NOT NULL, op TEXT NOT NULL,
    step TEXT NOT NULL, epoch INTEGER NOT NULL, verb TEXT NOT NULL, ask TEXT NOT NULL,
    outcome TEXT NOT NULL, message TEXT NOT NULL, seconds REAL NOT NULL,
    prev TEXT NOT NULL, hash TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS audit_op ON audit (uid, op);
CREATE TABLE IF NOT EXISTS running (
    id INTEGER PRIMARY KEY, time_us INTEGER NOT NULL, uid INTEGER NOT NULL, op TEXT NOT NULL,
    step TEXT NOT NULL, epoch INTEGER NOT NULL, verb TEXT NOT NULL, ask TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS answered (
    id INTEGER PRIMARY KEY, uid INTEGER NOT NULL, key TEXT NOT NULL, digest TEXT NOT NULL,
    boot TEXT NOT NULL, facts TEXT, UNIQUE (uid, key)
) STRICT;
CREATE TABLE IF NOT EXISTS epochs (
    id INTEGER PRIMARY KEY, uid INTEGER NOT NULL, op TEXT NOT NULL, epoch INTEGER NOT NULL, UNIQUE (uid, op)
) STRICT;
"""


class Entry(NamedTuple):
    """Whose request it is, which, and since when: what an audit line says besides how it ended."""

    time_us: int
    uid: int
    op: str = ""
    step: str = ""
    epoch: int = 0
    verb: str = ""
    ask: str = ""


class Line(NamedTuple):
    """One line of the audit log."""

    seq: int
    time_us: int
    uid: int
    op: str
    step: str
    epoch: int
    verb: str
    ask: str
    outcome: str
    message: str
    seconds: float
    prev: str
    hash: str


class Admitted(NamedTuple):
    """A request that may be carried out; or one that was, with the facts it was answered with."""

    entry: Entry
    row: int | None
    facts: dict[str, Any] | None = None


def connect(state: str) -> sqlite3.Connection:
    """Open root's database in autocommit mode: WAL, and every commit is on the disk."""
    db = sqlite3.connect(
        PurePosixPath(state, "root.db"), timeout=_BUSY_S, isolation_level=None, check_same_thread=False
    )
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA trusted_schema = OFF")
    return db


def entry_of(uid: int, request: Request) -> Entry:
    """Describe a request that was understood."""
    ask = msgspec.json.encode(request.ask).decode("ascii")
    verb = str(request.ask.__struct_config__.tag)
    return Entry(now_us(), uid, request.op, request.step, request.epoch, verb, ask)


def raw_entry(uid: int, data: bytes) -> Entry:
    """Describe what was not understood: as a JSON text, in ASCII, of at most MAX_ASK bytes."""
    ask = json.dumps(data[: MAX_ASK - 2].decode("latin-1"))
    if len(ask) > MAX_ASK:
        ask = json.dumps(data[: (MAX_ASK - 2) // 6].decode("latin-1"))
    return Entry(now_us(), uid, ask=ask)


def digest(request: Request) -> str:
    """Hash what is asked, whatever its spelling was."""
    return hashlib.sha256(msgspec.json.encode(request.ask)).hexdigest()


def now_us() -> int:
    """Tell the time in microseconds since the epoch."""
    return time.time_ns() // 1000


def printable(text: str) -> str:
    """Escape what a terminal or a log could take for more than text, and cut it at MAX_MESSAGE."""
    return json.dumps(text)[1:-1].replace("\x7f", "\\u007f")[:MAX_MESSAGE]


def told(error: BaseException) -> BaseException:
    """Give DiskFull for a database that found no space, and is as it was; any other error as it is."""
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return DiskFull("There is no space left for what the root helper writes down.")
    return error


class Store:
    """The tables, for any thread."""

    def __init__(self, state: str):
        self._db = connect(state)
        self._db.executescript(_SCHEMA)
        self._lock = threading.Lock()
        self._boot = _boot()
        self._written = itertools.count(1)
        last = self._db.execute("SELECT hash FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
        self._last = last[0] if last else ""

    def recover(self) -> int:
        """Write down what was running when the helper died, forget answers of another boot; give a count.

        What was answered before a boot may be gone with it: taps, loops and the like do not outlive one.
        """
        with self._transaction() as db:
            db.execute("DELETE FROM answered WHERE boot != ?", (self._boot,))
            left = db.execute("SELECT id, time_us, uid, op, step, epoch, verb, ask FROM running ORDER BY id")
            return sum(self._interrupt(db, row, Entry(*entry)) for row, *entry in left.fetchall())

    def admit(self, entry: Entry, request: Request, *, reads: bool) -> Admitted:
        """Let a request in, unless a newer claim of its operation was seen or its key has another ask.

        One that only reads leaves nothing behind. Raises Refused.
        """
        with self._transaction() as db:
            _fence(db, entry, record=not reads)
            if reads:
                return Admitted(entry, None)
            facts = self._by_key(db, entry.uid, request.key, digest(request))
            if facts is not None:
                return Admitted(entry, None, facts)
            row = db.execute(
                "INSERT INTO running (time_us, uid, op, step, epoch, verb, ask) VALUES (?, ?, ?, ?, ?, ?, ?)",
                entry,
            ).lastrowid
            return Admitted(entry, row)

    def see(self, entry: Entry) -> None:
        """Take note of an epoch. Raises Refused when a newer one was seen."""
        with self._transaction() as db:
            _fence(db, entry, record=True)

    def finish(
        self,
        admitted: Admitted,
        outcome: Outcome,
        message: str,
        seconds: float,
        *,
        answer: tuple[str, dict[str, Any]] | None = None,
    ) -> int:
        """Write the audit line of a request that ended, and keep its answer by key; give the line's seq."""
        with self._transaction() as db:
            db.execute("DELETE FROM running WHERE id = ?", (admitted.row,))
            if answer is not None:
                key, facts = answer
                text = msgspec.json.encode(facts).decode()
                db.execute(
                    "UPDATE answered SET facts = ? WHERE uid = ? AND key = ?", (text, admitted.entry.uid, key)
                )
            return self._append(db, admitted.entry, outcome, message, seconds)

    def note(self, entry: Entry, outcome: Outcome, message: str) -> int:
        """Write the audit line of a request for which nothing was done; give its seq."""
        with self._transaction() as db:
            return self._append(db, entry, outcome, message, 0.0)

    def lines(self, uid: int, op: str) -> list[Line]:
        """Give the newest audit lines of one operation of one owner, in order."""
        with self._lock:
            rows = self._db.execute(
                "SELECT * FROM audit WHERE uid = ? AND op = ? ORDER BY seq DESC LIMIT ?",
                (uid, op, LINES_SHOWN),
            ).fetchall()
        return [Line(*row) for row in reversed(rows)]

    def verify(self) -> tuple[int, int | None]:
        """Count the audit lines, and give the first whose hash does not fit, or that follows a gap."""
        seen, prev, last = 0, None, 0
        for row in self._db.execute("SELECT * FROM audit ORDER BY seq"):
            line = Line(*row)
            follows = prev is None or (line.prev, line.seq) == (prev, last + 1)
            if not follows or line.hash != _hash(line[:-1]):
                return seen, line.seq
            seen, prev, last = seen + 1, line.hash, line.seq
        return seen, None

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            last = self._last
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                self._last = last
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise told(error) from None

    def _by_key(self, db: sqlite3.Connection, uid: int, key: str, wanted: str) -> dict[str, Any] | None:
        """Give the facts that this key was answered with; bind it to this ask when it is new."""
        query = "SELECT digest, facts FROM answered WHERE uid = ? AND key = ?"
        known = db.execute(query, (uid, key)).fetchone()
        if known is None:
            values = (uid, key, wanted, self._boot)
            db.execute("INSERT INTO answered (uid, key, digest, boot) VALUES (?, ?, ?, ?)", values)
            _keep_newest(db, "answered", uid)
            return None
        if known[0] != wanted:
            raise Refused(f"The key {key!r} was used for another request.")
        return msgspec.json.decode(known[1], type=dict[str, Any]) if known[1] is not None else None

    def _interrupt(self, db: sqlite3.Connection, row: int, entry: Entry) -> int:
        db.execute("DELETE FROM running WHERE id = ?", (row,))
        self._append(db, entry, "interrupted", "The helper ended before it.", 0.0)
        return 1

    def _append(
        self, db: sqlite3.Connection, entry: Entry, outcome: Outcome, message: str, seconds: float
    ) -> int:
        seq = db.execute("SELECT coalesce(max(seq), 0) + 1 FROM audit").fetchone()[0]
        values = (seq, *entry, outcome, printable(message), round(seconds, 6), self._last)
        self._last = _hash(values)
        db.execute(
            f"INSERT INTO audit VALUES ({', '.join('?' * len(Line._fields))})",  # noqa: S608  a constant
            (*values, self._last),
        )
        if next(self._written) % _TRIM_EVERY == 0:
            db.execute("DELETE FROM audit WHERE seq <= ?", (seq - MAX_LINES,))
        return int(seq)


def _fence(db: sqlite3.Connection, entry: Entry, *, record: bool) -> None:
    """Refuse an epoch lower than one seen of this operation; remember a higher one."""
    seen = db.execute("SELECT epoch FROM epochs WHERE uid = ? AND op = ?", (entry.uid, entry.op)).fetchone()
    if seen is not None and entry.epoch < seen[0]:
        raise Refused(f"This is a fenced request: epoch {entry.epoch} of {entry.op} is over.")
    if record and (seen is None or entry.epoch > seen[0]):
        db.execute(
            "INSERT OR REPLACE INTO epochs (uid, op, epoch) VALUES (?, ?, ?)",
            (entry.uid, entry.op, entry.epoch),
        )
        _keep_newest(db, "epochs", entry.uid)


def _keep_newest(db: sqlite3.Connection, table: Literal["answered", "epochs"], uid: int) -> None:
    """Forget an owner's oldest rows over MAX_KEYS; at most one is added at a time."""
    (count,) = db.execute(f"SELECT count(*) FROM {table} WHERE uid = ?", (uid,)).fetchone()  # noqa: S608  a constant
    if count > MAX_KEYS:
        oldest = f"SELECT id FROM {table} WHERE uid = ? ORDER BY id LIMIT ?"  # noqa: S608  a constant
        db.execute(f"DELETE FROM {table} WHERE id IN ({oldest})", (uid, count - MAX_KEYS))  # noqa: S608  a constant


def _hash(values: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()


def _boot() -> str:
    fd = os.open("/proc/sys/kernel/random/boot_id", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 64).decode("ascii").strip()
    finally:
        os.close(fd)
