"""The queue's questions: who takes the next operation, who still holds one, who is dead.

Claiming is an append, so is giving up a dead worker's claim. The work table is a projection:
it says nothing that the log does not say.
"""

from __future__ import annotations

from typing import NamedTuple

from banger import proc
from banger.errors import Fenced
from banger.events import vocabulary as ev
from banger.events.log import EventLog, Tx, boot_us
from banger.model import Process

# A due time further ahead than any back-off was written before a reboot reset CLOCK_BOOTTIME.
_FAR_US = 120_000_000

# The oldest operation of its lane; or one that was cancelled before anyone took it.
_NEXT = """
    SELECT w.op, w.epoch FROM work w
    WHERE w.state = 'ready' AND (w.due_us <= :now OR w.due_us > :now + :far)
      AND ((w.cancel = 1 AND w.epoch = 0)
           OR NOT EXISTS (SELECT 1 FROM work o WHERE o.lane = w.lane AND o.seq < w.seq))
    ORDER BY w.seq LIMIT 1
"""


class Claim(NamedTuple):
    """The right of one worker to record what happens to one operation."""

    op: str
    epoch: int


def claim(log: EventLog, worker: Process) -> Claim | None:
    """Take the next operation that may run; None when there is none."""
    question = {"now": boot_us(), "far": _FAR_US}
    if log.db.execute(_NEXT, question).fetchone() is None:
        return None  # an idle look takes no lock
    with log.transaction() as tx:
        found = tx.db.execute(_NEXT, question).fetchone()
        if found is None:
            return None
        op, epoch = found[0], found[1] + 1
        tx.append(op, ev.OpClaimed(epoch=epoch, worker=worker), op=op)
        return Claim(op, epoch)


def guard(tx: Tx, held: Claim) -> bool:
    """Check inside a transaction that the claim still stands; True when a cancel was asked for.

    Raises Fenced when another worker has the operation now, or it has ended.
    """
    row = tx.db.execute(
        "SELECT cancel FROM work WHERE op = ? AND epoch = ? AND state = 'running'", (held.op, held.epoch)
    ).fetchone()
    if row is None:
        raise Fenced(op=held.op)
    return bool(row[0])


def cancel_wanted(log: EventLog, held: Claim) -> bool:
    """Tell, from inside a long step, whether to stop: cancelled, or fenced off."""
    row = log.db.execute(
        "SELECT cancel FROM work WHERE op = ? AND epoch = ? AND state = 'running'", (held.op, held.epoch)
    ).fetchone()
    return row is None or bool(row[0])


def reap(log: EventLog) -> list[str]:
    """Free the operations whose worker is dead, and tell which."""
    held = log.db.execute("SELECT op, pid, start_ticks FROM work WHERE state = 'running'").fetchall()
    freed = []
    for op, pid, ticks in held:
        if not proc.alive(Process(pid=pid, start_ticks=ticks)) and _interrupt(log, op, pid, ticks):
            freed.append(op)
    return freed


def _interrupt(log: EventLog, op: str, pid: int, ticks: int) -> bool:
    with log.transaction() as tx:
        row = tx.db.execute(
            "SELECT epoch FROM work WHERE op = ? AND state = 'running' AND pid = ? AND start_ticks = ?",
            (op, pid, ticks),
        ).fetchone()
        if row is None:  # freed by someone else meanwhile
            return False
        tx.append(op, ev.OpInterrupted(epoch=row[0], reason=f"worker {pid} is gone"), op=op)
        return True


def overdue(log: EventLog) -> list[tuple[str, Process]]:
    """List the operations whose step has run past its deadline, with their workers."""
    rows = log.db.execute(
        "SELECT op, pid, start_ticks FROM work WHERE state = 'running' AND deadline_us < ?", (boot_us(),)
    )
    return [(op, Process(pid=pid, start_ticks=ticks)) for op, pid, ticks in rows]


def nudge(log: EventLog) -> None:
    """Wake a worker to look at the queue."""
    log.work_bell.ring()


def more(log: EventLog) -> bool:
    """Tell whether another operation may run at once."""
    return log.db.execute(_NEXT, {"now": boot_us(), "far": _FAR_US}).fetchone() is not None
