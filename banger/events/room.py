"""Is there room on the host? First come, first served: a large request is not overtaken for ever.

An operation that needs memory, CPUs or disk space is taken from the queue only when they are free.
What is taken follows from the projections: the VMs that run, and those that an operation has begun
to make or start.
"""

from __future__ import annotations

import shutil
from typing import NamedTuple

from banger.config import Capacity
from banger.events import vocabulary as ev
from banger.events.log import EventLog, Tx, boot_us

# A due time further ahead than any back-off was written before a reboot reset CLOCK_BOOTTIME.
FAR_US = 120_000_000

READY = "w.state = 'ready' AND (w.due_us <= :now OR w.due_us > :now + :far)"
OLDEST_OF_ITS_LANE = "NOT EXISTS (SELECT 1 FROM work o WHERE o.lane = w.lane AND o.seq < w.seq)"
NEEDS_ROOM = "w.memory_mib + w.vcpu + w.disk_mib > 0 AND w.epoch = 0 AND w.cancel = 0"

_FIRST = f"""
    SELECT w.op, w.lane, w.memory_mib, w.vcpu, w.disk_mib FROM work w
    WHERE {READY} AND {NEEDS_ROOM} AND {OLDEST_OF_ITS_LANE} ORDER BY w.seq LIMIT 1
"""  # noqa: S608  constants
_TURN = "waits for its turn"
# Told once; and once more when it is no longer its turn but something of the host's that is lacking.
_UNTOLD = f"""
    SELECT w.op FROM work w
    WHERE w.state = 'ready' AND {NEEDS_ROOM} AND {OLDEST_OF_ITS_LANE}
      AND (w.reason IS NULL OR (w.reason LIKE '{_TURN}%' AND :reason NOT LIKE '{_TURN}%'))
    ORDER BY w.seq
"""  # noqa: S608  constants
_TAKEN = """
    SELECT coalesce(sum(memory_mib), 0), coalesce(sum(vcpu), 0) FROM vm
    WHERE vm != :lane
      AND (live = 1 OR vm IN (SELECT lane FROM work WHERE epoch > 0 AND memory_mib > 0))
"""
_MAKING = "SELECT count(*) FROM work WHERE state = 'running' AND memory_mib + vcpu + disk_mib > 0"
_DISK_BEGUN = "SELECT count(*), coalesce(sum(disk_mib), 0) FROM work WHERE epoch > 0 AND disk_mib > 0"


class _First(NamedTuple):
    """The operation that is the first to need room on the host."""

    op: str
    lane: str
    memory_mib: int
    vcpu: int
    disk_mib: int


class Look(NamedTuple):
    """What there is room for: the first operation that needs some, if it `fits`, else what it lacks."""

    fits: str | None
    lacking: str | None


def look(log: EventLog, capacity: Capacity | None) -> Look:
    """Look whether there is room for the operation that is the first to need some."""
    first = _first(log)
    lacking = None if first is None else _lacking(log, first, capacity)
    return Look(None if first is None or lacking else first.op, lacking)


def untold(log: EventLog, lacking: str | None) -> list[str]:
    """List the operations that wait for room and have not been told so."""
    return [op for (op,) in log.db.execute(_UNTOLD, {"reason": lacking})] if lacking else []


def tell_why(tx: Tx, lacking: str | None) -> None:
    """Tell every operation that waits for room why: what the first one lacks, all lack."""
    for op in untold(tx.log, lacking):
        tx.append(op, ev.OpWaiting(reason=lacking or ""), op=op)


def _first(log: EventLog) -> _First | None:
    row = log.db.execute(_FIRST, {"now": boot_us(), "far": FAR_US}).fetchone()
    return None if row is None else _First(*row)


def _lacking(log: EventLog, first: _First, capacity: Capacity | None) -> str | None:
    """Say what the host lacks for an operation; None when it fits, or nothing bounds it."""
    if capacity is None:
        return None
    memory_mib, vcpu = log.db.execute(_TAKEN, {"lane": first.lane}).fetchone()
    for what, needed, taken, limit, unit in (
        ("memory", first.memory_mib, memory_mib, capacity.memory_mib, " MiB"),
        ("virtual CPUs", first.vcpu, vcpu, capacity.vcpu, ""),
    ):
        if needed and taken + needed > limit:
            return f"waits for {what}: {needed}{unit} needed, {max(0, limit - taken)} of {limit}{unit} free"
    return _lacking_disk(log, first, capacity) or _lacking_turn(log, capacity)


def _lacking_turn(log: EventLog, capacity: Capacity) -> str | None:
    making = log.db.execute(_MAKING).fetchone()[0]
    if making < capacity.at_once:
        return None
    return f"{_TURN}: {making} of {capacity.at_once} at once are being made or started"


def _lacking_disk(log: EventLog, first: _First, capacity: Capacity) -> str | None:
    """Look at the disk's free space; the only one to need it is not held up, but fails by itself."""
    begun, promised_mib = log.db.execute(_DISK_BEGUN).fetchone()
    if not first.disk_mib or not begun:
        return None
    free_mib = (shutil.disk_usage(capacity.disk).free >> 20) - promised_mib - capacity.disk_reserve_mib
    if first.disk_mib <= free_mib:
        return None
    return f"waits for disk space: {first.disk_mib} MiB needed, {max(0, free_mib)} MiB free"
