"""What root has made and for whom: intended before it is made, held after, gone when it is gone.

It is a table in root's own database, below a directory that only root can enter. What is removed is
removed by what is written here, never by what a caller says.
"""

from __future__ import annotations

import sqlite3
from typing import Any, Literal, NamedTuple

import msgspec

from banger.errors import Refused
from banger.helper.verbs import Call

Kind = Literal["bridge", "tap", "nat", "loop", "snapshot", "jail"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS held (
    kind TEXT NOT NULL, name TEXT NOT NULL, uid INTEGER NOT NULL, vm TEXT NOT NULL, op TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('intended', 'held')), facts TEXT NOT NULL,
    PRIMARY KEY (kind, name)
) STRICT
"""


class Held(NamedTuple):
    """One thing: its kind and name, whose it is, which operation made it, and what is known of it."""

    kind: str
    name: str
    uid: int
    vm: str
    op: str
    state: str
    facts: dict[str, Any]


class Ledger:
    """The table, on a connection in autocommit mode: each change is on the disk before the next effect."""

    def __init__(self, db: sqlite3.Connection):
        self._db = db
        db.execute(SCHEMA)

    def intend(self, kind: Kind, name: str, call: Call, vm: str, **facts: Any) -> Held:
        """Record what is about to be made; what the caller has already is given as it is.

        Raises Refused when it is another owner's, or another VM's.
        """
        self._db.execute(
            "INSERT INTO held VALUES (?, ?, ?, ?, ?, 'intended', ?) ON CONFLICT DO NOTHING",
            (kind, name, call.caller.uid, vm, call.op, msgspec.json.encode(facts).decode()),
        )
        found = self.get(kind, name)
        assert found is not None
        if (found.uid, found.vm) != (call.caller.uid, vm):
            raise Refused(f"The {kind} {name} is not yours.")
        return found

    def hold(self, kind: Kind, name: str, **facts: Any) -> None:
        """Record that it exists, with what more is known of it now."""
        found = self.get(kind, name)
        assert found is not None
        known = msgspec.json.encode({**found.facts, **facts}).decode()
        self._db.execute(
            "UPDATE held SET state = 'held', facts = ? WHERE kind = ? AND name = ?", (known, kind, name)
        )

    def release(self, kind: Kind, name: str) -> None:
        """Record that it is gone."""
        self._db.execute("DELETE FROM held WHERE kind = ? AND name = ?", (kind, name))

    def get(self, kind: Kind, name: str) -> Held | None:
        """Give one thing, if it is there or intended."""
        return next(iter(self._rows("kind = ? AND name = ?", (kind, name))), None)

    def of_vm(self, uid: int, vm: str, kind: Kind | None = None) -> list[Held]:
        """List what a VM has, of one kind or of all."""
        return self._rows("uid = ? AND vm = ? AND (kind = ? OR ? IS NULL)", (uid, vm, kind, kind))

    def of_kind(self, kind: Kind, uid: int | None = None) -> list[Held]:
        """List everything of a kind, of one owner or of all."""
        return self._rows("kind = ? AND (uid = ? OR ? IS NULL)", (kind, uid, uid))

    def of_owner(self, uid: int) -> list[Held]:
        """List everything an owner has."""
        return self._rows("uid = ?", (uid,))

    def _rows(self, where: str, values: tuple[Any, ...]) -> list[Held]:
        query = f"SELECT kind, name, uid, vm, op, state, facts FROM held WHERE {where} ORDER BY rowid"  # noqa: S608  constants
        rows = self._db.execute(query, values)
        return [Held._make((*row[:6], msgspec.json.decode(row[6]))) for row in rows]
