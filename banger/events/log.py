"""The event log: append, read, verify.

One SQLite file per owner. An append and its projections (the queue is one of them) are ONE
transaction, so none is ever ahead of another. Writers take turns through a file lock before they
BEGIN: SQLite's own busy handler is unfair under load. A writer holds the lock for microseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from banger.errors import DiskFull, LogDamaged, ReadOnly
from banger.events import database
from banger.events import vocabulary as ev
from banger.events.bell import Bell
from banger.events.projections import project
from banger.events.upcast import upcast
from banger.events.vocabulary import Actor, Event, Recorded

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(ev.AnyEvent)
_actor_decoder = msgspec.json.Decoder(Actor)

COLUMNS = "seq, stream, version, op, type, schema, data, actor, time_us, boot_us"
_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"
_EPOCH_MS = 1_735_689_600_000  # 2025-01-01: 40 bits of milliseconds last until 2059


def boot_us() -> int:
    """Give CLOCK_BOOTTIME in microseconds: it neither jumps nor stops while suspended."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000


def mint(prefix: str, salt: int = 0) -> str:
    """Make an id that sorts by time, for example `op-27f3k9qd` (Crockford's base 32)."""
    number = time.time_ns() // 1_000_000 - _EPOCH_MS + salt
    letters = "".join(_CROCKFORD[number >> shift & 31] for shift in range(35, -1, -5))
    return f"{prefix}-{letters}"


def row_hash(prev: bytes, row: tuple[Any, ...]) -> bytes:
    """Chain one row: sha256 over the previous hash and the row's canonical JSON."""
    return hashlib.sha256(prev + _encoder.encode(row)).digest()


class Tx:
    """One transaction on the log, held by `EventLog.transaction`."""

    def __init__(self, log: EventLog, actor: str):
        self.log = log
        self.db = db = log.db
        self.recorded: list[Recorded] = []
        self.work_ready = False
        self._actor = actor
        self._seq, self._hash, self._missing = database.begin(db)
        self._versions: dict[str, int] = {}

    def mint(self, prefix: str) -> str:
        """Make an id that no stream has ever had, also when the clock was set back."""
        for salt in itertools.count():
            new = mint(prefix, salt)
            if self.db.execute("SELECT 1 FROM event WHERE stream = ?", (new,)).fetchone() is None:
                return new
        raise AssertionError

    def append(self, stream: str, event: Event, *, op: str | None = None) -> Recorded:
        """Append one event to a stream and apply it to the projections.

        Raises AlreadyExists when a projection's unique key (a VM's name) is taken.
        """
        version = self._version(stream)
        seq, time_us, now_us = self._seq + 1, time.time_ns() // 1000, boot_us()
        kind, data = ev.type_of(event), _encoder.encode(event).decode()
        row = (seq, stream, version, op, kind, ev.SCHEMA, data, self._actor, time_us, now_us)
        digest = row_hash(self._hash, row)
        self.db.execute(
            "INSERT INTO event (seq, stream, version, op, type, schema, data, actor, time_us, boot_us,"
            " prev, hash) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*row, self._hash, digest),
        )
        self._seq, self._hash = seq, digest
        recorded = Recorded(
            seq=seq,
            stream=stream,
            version=version,
            op=op,
            event=event,  # type: ignore[arg-type]  # every Event subclass is in the union
            actor=_actor(self._actor),
            time_us=time_us,
            boot_us=now_us,
        )
        if project(self.db, recorded):
            self.work_ready = True
        self.recorded.append(recorded)
        return recorded

    def _version(self, stream: str) -> int:
        last = self._versions.get(stream)
        if last is None:
            found = self.db.execute("SELECT max(version) FROM event WHERE stream = ?", (stream,)).fetchone()
            last = found[0] or 0
        self._versions[stream] = last + 1
        return last + 1

    def rebuild(self) -> None:
        """Throw the projections away and make them again from the log."""
        self._missing = False
        for name in database.WATCHED:
            self.db.execute(f"DELETE FROM {name}")  # noqa: S608  our own names
        for row in self.db.execute(f"SELECT {COLUMNS} FROM event ORDER BY seq"):  # noqa: S608
            project(self.db, decode(row))
        database.recount(self.db)
        self.work_ready = True

    def mend(self) -> bool:
        """Make the projections again if something else has deleted rows of them; True if so."""
        found = self._missing
        if found:
            self.rebuild()
        return found

    def close(self) -> None:
        """Write down where the log ends."""
        if self.recorded:
            database.note_head(self.db, self._seq, self._hash)


class EventLog:
    """The log of one owner, opened by one process.

    Give each process its own: an SQLite connection does not survive a fork. Opening it makes the
    tables, and makes the projections anew where another version's are found.
    Raises LogDamaged, LogTooNew.
    """

    def __init__(self, path: Path, work_bell: Path, event_bell: Path, role: str, *, read_only: bool = False):
        self.path = path
        self.read_only = read_only
        self._durable = False  # as it is opened: synchronous=normal
        self.work_bell = Bell(work_bell)
        self.event_bell = Bell(event_bell)
        self._actor = _encoder.encode(Actor(uid=os.getuid(), pid=os.getpid(), role=role)).decode()
        self.peewee = database.connect(path, read_only=read_only)
        self._lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.db: sqlite3.Connection = self.peewee.connection()  # type: ignore[no-untyped-call]
        self._inode = path.stat().st_ino
        if read_only:
            database.require_complete(self.db)
        else:
            self._prepare()
        database.check_schema(self.db)

    def _prepare(self) -> None:
        with self._written():
            stale = database.prepare(self.peewee, self.db)
            database.watch(self.db)
            if stale:
                Tx(self, self._actor).rebuild()

    def close(self) -> None:
        """Close the database and the bells."""
        self.peewee.close()
        self.work_bell.close()
        self.event_bell.close()
        os.close(self._lock)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[Tx]:
        """Append any number of events as one; all of them or none.

        `durable` waits for the disk (synchronous=FULL): for what acknowledges a request or ends
        an operation. Without it a power cut, but no crash of a process, may take the last appends.
        What is decided durably is decided on whole projections: rows that something else deleted
        are made again first. Raises DiskFull, LogDamaged, ReadOnly; whatever the block raises rolls
        everything back.
        """
        with self._written(durable=durable):
            tx = Tx(self, self._actor)
            if durable:
                tx.mend()
            yield tx
            tx.close()
        if tx.recorded:
            self.event_bell.ring()
        if tx.work_ready:
            self.work_bell.ring()

    @contextlib.contextmanager
    def _written(self, *, durable: bool = False) -> Iterator[None]:
        """Hold the writers' lock and an SQLite transaction; commit it at the end of the block."""
        if self.read_only:
            raise ReadOnly
        self.require_file()
        with self._locked():
            try:
                self._synchronize(durable=durable)
                self.db.execute("BEGIN IMMEDIATE")
                yield
                self.db.execute("COMMIT")
            except BaseException as error:
                with contextlib.suppress(sqlite3.DatabaseError):
                    if self.db.in_transaction:
                        self.db.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
                    raise DiskFull("The event log cannot grow: the disk is full.") from error
                if type(error) is sqlite3.DatabaseError:
                    raise LogDamaged(f"{self.path} cannot be read: {error}.") from error
                raise

    def require_file(self) -> None:
        """Raise LogDamaged when the file was removed or replaced: what is written would be lost."""
        try:
            there = self.path.stat().st_ino
        except FileNotFoundError:
            there = None
        if there != self._inode:
            raise LogDamaged(
                f"{self.path} was removed or replaced while it was in use.",
                hint="`banger daemon stop`; the next command begins with what is there then.",
            )

    def _synchronize(self, *, durable: bool) -> None:
        if durable != self._durable:
            self.db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._durable = durable

    def mend(self) -> bool:
        """Make the projections again if rows of them have gone missing; True if so."""
        if not database.missing(self.db):
            return False
        with self.transaction() as tx:
            if tx.mend():
                return True
            lost = database.missing(self.db)
            if lost:
                tx.rebuild()
            return lost

    def request(self, event: ev.OpRequested, *also: tuple[str, Event]) -> str:
        """Record a request and return its new op id; `also` is appended in the same transaction."""
        with self.transaction(durable=True) as tx:
            op = tx.mint("op")
            tx.append(op, event, op=op)
            for stream, other in also:
                tx.append(stream, other, op=op)
        return op

    def cancel(self, op: str) -> bool:
        """Record that an operation is to be cancelled; False when it has ended already."""
        with self.transaction(durable=True) as tx:
            if tx.db.execute("SELECT 1 FROM work WHERE op = ?", (op,)).fetchone() is None:
                return False
            tx.append(op, ev.OpCancelRequested(), op=op)
            return True

    def at(self, time_us: int) -> int:
        """Give the number of the last event appended up to a moment (µs since the epoch); 0 for none.

        The log's order is `seq`; where the clock was set back, the later rows with earlier times count.
        """
        found = self.db.execute("SELECT max(seq) FROM event WHERE time_us <= ?", (time_us,)).fetchone()
        return int(found[0] or 0)

    def read(
        self,
        *,
        after: int = 0,
        stream: str | None = None,
        op: str | None = None,
        kind: str | None = None,
        limit: int = -1,
        newest: bool = False,
    ) -> list[Recorded]:
        """Read events with `seq > after` in order; of one stream, operation or type if given.

        At most `limit` of them: the first, or the `newest`.
        """
        where, values = ["seq > ?"], [after]
        for column, value in (("stream", stream), ("op", op), ("type", kind)):
            if value is not None:
                where.append(f"{column} = ?")
                values.append(value)  # type: ignore[arg-type]
        order = "DESC" if newest else "ASC"
        rows = self.db.execute(
            f"SELECT {COLUMNS} FROM event WHERE {' AND '.join(where)} ORDER BY seq {order} LIMIT ?",  # noqa: S608
            (*values, limit),
        )
        found = [decode(row) for row in rows]
        return found[::-1] if newest else found

    def last_seq(self) -> int:
        """Give the number of the newest event; 0 when there is none."""
        return int(self.db.execute("SELECT coalesce(max(seq), 0) FROM event").fetchone()[0])

    def rebuild(self) -> list[str]:
        """Throw the projections away and make them again from the log.

        Returns the names of those that were not, byte for byte, what the log says: none, unless
        something else wrote to the database.
        """
        with self.transaction() as tx:
            before = self.projected()
            tx.rebuild()
            after = self.projected()
        return [name for name in before if before[name] != after[name]]

    def projected(self) -> dict[str, list[tuple[Any, ...]]]:
        """Give every row of every projection, sorted."""
        return {
            name: sorted(self.db.execute(f"SELECT * FROM {name}"), key=repr)  # noqa: S608  our own names
            for name in database.WATCHED
        }


def decode(row: tuple[Any, ...]) -> Recorded:
    """Make an event from its row (the columns of COLUMNS). Raises LogTooNew."""
    seq, stream, version, op, kind, schema, data, actor, time_us, boot = row
    if schema != ev.SCHEMA:
        data = upcast(schema, kind, data)
    return Recorded(
        seq=seq,
        stream=stream,
        version=version,
        op=op,
        event=_decoder.decode(data),
        actor=_actor(actor),
        time_us=time_us,
        boot_us=boot,
    )


@functools.lru_cache(maxsize=256)
def _actor(text: str) -> Actor:
    """Decode who did it: a few processes wrote all of a log."""
    return _actor_decoder.decode(text)
