"""The queue's questions: who takes the next operation, who still holds one, who is dead.

Claiming is an append, so is giving up a dead worker's claim. The work table is a projection:
it says nothing that the log does not say.
"""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

from banger import proc
from banger.config import Capacity
from banger.errors import Fenced
from banger.events import database, room
from banger.events import vocabulary as ev
from banger.events.log import EventLog, Tx, boot_us
from banger.model import Process

# The oldest operation of its lane; or one that was cancelled before anyone took it. One that needs
# room on the host is taken only when it is the one that `fits`, and after those that need none: they
# are short, and make room.
_NEXT = f"""
    SELECT w.op, w.epoch FROM work w
    WHERE {room.READY} AND ((w.cancel = 1 AND w.epoch = 0) OR {room.OLDEST_OF_ITS_LANE})
      AND (w.op = :fits OR NOT ({room.NEEDS_ROOM}))
    ORDER BY {room.NEEDS_ROOM}, w.seq LIMIT 1
"""  # noqa: S608  constants


class Claim(NamedTuple):
    """The right of one worker to record what happens to one operation."""

    op: str
    epoch: int


def claim(log: EventLog, worker: Process, capacity: Capacity | None = None) -> Claim | None:
    """Take the next operation that may run; None when there is none.

    `capacity` bounds what may run at once; those that have to wait for room are told why, once.
    """
    seen = room.look(log, capacity)
    if _next(log, seen) is None and not room.untold(log, seen.lacking):
        return None  # an idle look takes no lock
    with log.transaction() as tx:
        seen = room.look(log, capacity)
        room.tell_why(tx, seen.lacking)
        found = _next(log, seen)
        if found is None:
            return None
        op, epoch = found[0], found[1] + 1
        tx.append(op, ev.OpClaimed(epoch=epoch, worker=worker), op=op)
        return Claim(op, epoch)


def _next(log: EventLog, seen: room.Look) -> tuple[str, int] | None:
    question = {"now": boot_us(), "far": room.FAR_US, "fits": seen.fits}
    found: tuple[str, int] | None = log.db.execute(_NEXT, question).fetchone()
    return found


def tell_why(log: EventLog, capacity: Capacity) -> None:
    """Tell the operations that wait for room why: while all workers are busy, nobody else looks."""
    lacking = room.look(log, capacity).lacking
    if room.untold(log, lacking):
        with log.transaction() as tx:
            room.tell_why(tx, lacking)


def let_go(log: EventLog, worker: Process) -> None:
    """Give back what a worker is said to hold that has nothing in hand.

    Its row of the queue was deleted under it, it was fenced off, and the row was made again.
    """
    if not _held_by(log, worker):
        return
    with log.transaction() as tx:
        for op, epoch in _held_by(log, worker):
            gone = ev.OpInterrupted(epoch=epoch, reason="its worker let it go", graceful=True)
            tx.append(op, gone, op=op)


def _held_by(log: EventLog, worker: Process) -> list[tuple[str, int]]:
    rows = log.db.execute(
        "SELECT op, epoch FROM work WHERE state = 'running' AND pid = ? AND start_ticks = ?",
        (worker.pid, worker.start_ticks),
    )
    return rows.fetchall()


def guard(tx: Tx, held: Claim) -> bool:
    """Check inside a transaction that the claim still stands; True when a cancel was asked for.

    Projections that rows were deleted from are made again first: a step sees the whole state.

    Raises Fenced when another worker has the operation now, or it has ended.
    """
    tx.mend()
    row = _held(tx.db, held)
    if row is None:
        raise Fenced(op=held.op)
    return bool(row[0])


def cancel_wanted(log: EventLog, held: Claim) -> bool:
    """Tell, from inside a long step, whether to stop: cancelled, or fenced off."""
    row = _held(log.db, held)
    if row is None:
        return not database.missing(log.db)  # a row that was deleted is made again
    return bool(row[0])


def _held(db: sqlite3.Connection, held: Claim) -> tuple[int] | None:
    row: tuple[int] | None = db.execute(
        "SELECT cancel FROM work WHERE op = ? AND epoch = ? AND state = 'running'", (held.op, held.epoch)
    ).fetchone()
    return row


def reap(log: EventLog) -> list[str]:
    """Free the operations whose worker is dead, and tell which."""
    held = log.db.execute("SELECT op, pid, start_ticks, boot_id FROM work WHERE state = 'running'").fetchall()
    return [op for op, *worker in held if _interrupt(log, op, _process(*worker))]


def _process(pid: int, start_ticks: int, boot_id: str) -> Process:
    return Process(pid=pid, start_ticks=start_ticks, boot_id=boot_id)


def _interrupt(log: EventLog, op: str, worker: Process) -> bool:
    if proc.alive(worker):
        return False
    with log.transaction() as tx:
        row = tx.db.execute(
            "SELECT epoch FROM work WHERE op = ? AND state = 'running' AND pid = ? AND start_ticks = ?",
            (op, worker.pid, worker.start_ticks),
        ).fetchone()
        if row is None:  # freed by someone else meanwhile
            return False
        tx.append(op, ev.OpInterrupted(epoch=row[0], reason=f"worker {worker.pid} is gone"), op=op)
        return True


def overdue(log: EventLog) -> list[tuple[str, Process]]:
    """List the operations whose step has run past its deadline, with their workers."""
    rows = log.db.execute(
        "SELECT op, pid, start_ticks, boot_id FROM work WHERE state = 'running' AND deadline_us < ?",
        (boot_us(),),
    )
    return [(op, _process(*worker)) for op, *worker in rows]


def nudge(log: EventLog) -> None:
    """Wake a worker to look at the queue."""
    log.work_bell.ring()


def more(log: EventLog, capacity: Capacity | None = None) -> bool:
    """Tell whether another operation may run at once."""
    return _next(log, room.look(log, capacity)) is not None
