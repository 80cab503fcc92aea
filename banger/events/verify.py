"""Check the log: every row is what was appended, in the order in which it was appended."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from banger.errors import InvalidRequest, NotFound
from banger.events.log import NO_HASH, row_hash
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


def verify(rows: Iterable[Row]) -> Verdict:
    """Check rows in the order of `seq`: numbers without gap, each stream's versions, the hash chain."""
    good, head = 0, NO_HASH
    versions: dict[str, int] = {}
    try:
        for row in rows:
            why = _fault(row, good + 1, head, versions)
            if why is not None:
                return Verdict(rows=good, head=head.hex(), bad_seq=good + 1, why=why)
            good, head = good + 1, row[-1]
            versions[row[1]] = row[2]
    except (sqlite3.DatabaseError, msgspec.DecodeError, ValueError, KeyError) as error:
        return Verdict(rows=good, head=head.hex(), bad_seq=good + 1, why=f"It cannot be read: {error}.")
    return Verdict(rows=good, head=head.hex())


def _fault(row: Row, seq: int, head: bytes, versions: dict[str, int]) -> str | None:
    """Tell what is wrong with a row; None when nothing is."""
    if row[0] != seq:
        return f"Row {seq} is missing: the next one is numbered {row[0]}."
    if row[-2] != head:
        return "It does not follow the row before it: that one, or this one, was changed or moved."
    if row[-1] != row_hash(head, row[:-2]):
        return "Its content is not what was appended."
    if row[2] != versions.get(row[1], 0) + 1:
        return f"Version {row[2]} of {row[1]} does not follow version {versions.get(row[1], 0)}."
    return None


def stored_rows(database: Path) -> Iterator[Row]:
    """Read the rows of a log that may be in use, or damaged; nothing is written.

    Raises NotFound without a log, sqlite3.DatabaseError where the file is damaged.
    """
    if not database.exists():
        raise NotFound(f"There is no event log at {database}.", hint="It is made by the first command.")
    db = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        yield from db.execute(f"SELECT {', '.join(COLUMNS)} FROM event ORDER BY seq")  # noqa: S608  constants
    finally:
        db.close()


def export(rows: Iterable[Row]) -> Iterator[str]:
    """Give each row as one line of JSON, hashes in hex; `imported` reads them back."""
    for row in rows:
        named = dict(zip(COLUMNS, row, strict=True))
        named |= {"prev": named["prev"].hex(), "hash": named["hash"].hex()}
        yield json.dumps(named)


def imported(path: Path) -> Iterator[Row]:
    """Read the rows of an exported log.

    Raises NotFound without the file, InvalidRequest when it is no export, ValueError for a bad line.
    """
    try:
        file = path.open(encoding="utf-8")
    except FileNotFoundError:
        raise NotFound(f"There is no file {path}.") from None
    except IsADirectoryError:
        raise InvalidRequest(f"{path} is a directory.") from None
    with file:
        for line in file:
            named = json.loads(line)
            yield (
                *(named[column] for column in COLUMNS[:-2]),
                bytes.fromhex(named["prev"]),
                bytes.fromhex(named["hash"]),
            )
