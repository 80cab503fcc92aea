"""Check the log: every row is what was appended, in the order in which it was appended."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from banger.errors import InvalidRequest, LogDamaged, NotFound
from banger.events.database import NO_HASH, only_read
from banger.events.log import row_hash
from banger.model import Value

COLUMNS = (
    "seq",
    "stream",
    "version",
    "op",
    "type",
    "schema",
    "data",
    "actor",
    "time_us",
    "boot_us",
    "prev",
    "hash",
)
Row = tuple[Any, ...]
"""The columns above, `prev` and `hash` as bytes."""


class Verdict(Value):
    """What the check found. `bad_seq` is the first row that is not what was appended.

    `head` is the hash of the last good row, in hex: written down elsewhere, it also proves later
    that no row was cut off the end.
    """

    rows: int
    head: str
    bad_seq: int | None = None
    why: str | None = None

    def require_good(self) -> None:
        """Raise LogDamaged when a row is not what was written."""
        if self.bad_seq is not None:
            raise LogDamaged(
                f"Row {self.bad_seq} is the first bad one of the log: {self.why}",
                hint=f"{self.rows} rows before it are good. Nothing is written to a damaged log:"
                " `banger daemon start --read-only` shows what there is, `banger state salvage` goes on"
                " with the good rows.",
            )


class End(NamedTuple):
    """Where a log ended when it was last written: its rows, and the last one's hash."""

    rows: int
    head: bytes


def verify(rows: Iterable[Row], *, end: End | None = None, after: int = 0) -> Verdict:
    """Check rows in the order of `seq`: numbers without gap, each stream's versions, the hash chain.

    With `end` also that none was cut off. With `after`, the rows are those with seq > `after`, and
    what was before them is taken for good.
    """
    good, head = after, NO_HASH
    versions: dict[str, int] = {}
    try:
        for row in rows:
            if after and good == after:
                head = row[-2]
            why = _fault(row, good + 1, head, versions, whole=not after)
            if why is None and end is not None and row[0] == end.rows and row[-1] != end.head:
                why = "It is the last one that was written, and its hash is another."
            if why is not None:
                return Verdict(rows=good, head=head.hex(), bad_seq=good + 1, why=why)
            good, head = good + 1, row[-1]
            versions[row[1]] = row[2]
    except (sqlite3.DatabaseError, msgspec.DecodeError, ValueError, KeyError) as error:
        return Verdict(rows=good, head=head.hex(), bad_seq=good + 1, why=f"It cannot be read: {error}.")
    if end is not None and good < end.rows:
        why = f"It is missing, as are all after it: {end.rows} rows were written."
        return Verdict(rows=good, head=head.hex(), bad_seq=good + 1, why=why)
    return Verdict(rows=good, head=head.hex())


def _fault(row: Row, seq: int, head: bytes, versions: dict[str, int], *, whole: bool) -> str | None:
    """Tell what is wrong with a row; None when nothing is."""
    if row[0] != seq:
        return f"Row {seq} is missing: the next one is numbered {row[0]}."
    if row[-2] != head:
        return "It does not follow the row before it: that one, or this one, was changed or moved."
    if row[-1] != row_hash(head, row[:-2]):
        return "Its content is not what was appended."
    if row[2] != versions.get(row[1], 0) + 1 and (whole or row[1] in versions):
        return f"Version {row[2]} of {row[1]} does not follow version {versions.get(row[1], 0)}."
    return None


def verify_log(database: Path, *, newest: int | None = None) -> Verdict:
    """Check a log that may be in use; of a long one only the `newest` rows, if given.

    Raises NotFound without a log.
    """
    end = stored_end(database)
    after = max(0, end.rows - newest) if end is not None and newest is not None else 0
    return verify(stored_rows(database, after), end=end, after=after)


def stored_rows(database: Path, after: int = 0) -> Iterator[Row]:
    """Read the rows with seq > `after` of a log that may be in use, or damaged; nothing is written.

    Raises NotFound without a log, sqlite3.DatabaseError where the file is damaged.
    """
    with only_read(database) as db:
        yield from db.execute(
            f"SELECT {', '.join(COLUMNS)} FROM event WHERE seq > ? ORDER BY seq",  # noqa: S608  constants
            (after or -(1 << 63),),  # a row that was numbered below 1 is a bad one, too
        )


def stored_end(database: Path) -> End | None:
    """Read where a log ended when it was last written; None where that cannot be told.

    To be read before the rows: a log that is in use grows meanwhile. Raises NotFound without a log.
    """
    with only_read(database) as db, contextlib.suppress(sqlite3.DatabaseError):
        found = db.execute("SELECT seq, hash FROM head").fetchone()
        return None if found is None else End(*found)
    return None


def export(rows: Iterable[Row], end: End | None = None) -> Iterator[str]:
    """Give each row as one line of JSON, hashes in hex; `imported` reads them back.

    A first line tells where the log ends, so that lines which are cut off later are missed.
    """
    if end is not None:
        yield json.dumps({"rows": end.rows, "head": end.head.hex()})
    for row in rows:
        named = dict(zip(COLUMNS, row, strict=True))
        named |= {"prev": named["prev"].hex(), "hash": named["hash"].hex()}
        yield json.dumps(named)


def verify_export(path: Path) -> Verdict:
    """Check an exported log. Raises NotFound without the file, InvalidRequest for a directory."""
    return verify(imported(path), end=_exported_end(path))


def _exported_end(path: Path) -> End | None:
    with _lines(path) as file, contextlib.suppress(ValueError, KeyError, TypeError):
        first = json.loads(next(file, ""))
        return End(first["rows"], bytes.fromhex(first["head"]))
    return None


@contextlib.contextmanager
def _lines(path: Path) -> Iterator[Iterator[str]]:
    try:
        file = path.open(encoding="utf-8")
    except FileNotFoundError:
        raise NotFound(f"There is no file {path}.") from None
    except IsADirectoryError:
        raise InvalidRequest(f"{path} is a directory.") from None
    with file:
        yield file


def imported(path: Path) -> Iterator[Row]:
    """Read the rows of an exported log.

    Raises NotFound without the file, InvalidRequest for a directory, ValueError for a bad line.
    """
    with _lines(path) as file:
        for number, line in enumerate(file):
            named = json.loads(line)
            if number == 0 and "head" in named:
                continue  # where it ends
            yield (
                *(named[column] for column in COLUMNS[:-2]),
                bytes.fromhex(named["prev"]),
                bytes.fromhex(named["hash"]),
            )
