"""Questions to the projections."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from banger.errors import InvalidRequest, NotFound
from banger.events import vocabulary as ev
from banger.events.database import only_read
from banger.events.fold import Op, Vm, fold_op
from banger.events.log import EventLog
from banger.events.projections import vm_decoder
from banger.events.tables import ArtifactRow, OpRow, ResourceRow, VmRow, WorkRow
from banger.model import Resource, VmSpec


class OpSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One operation in a list. `state`: waiting, running, undoing or ended."""

    id: str
    kind: str
    vm: str | None
    name: str | None
    parent: str | None
    state: str
    fate: str | None
    step: str | None
    requested_us: int
    ended_us: int | None
    seconds: float | None
    error: ev.Error | None
    reason: str | None


class ArtifactSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A published image or kernel, as the log knows it."""

    kind: str
    name: str
    digest: str
    size_bytes: int
    created_us: int
    details: dict[str, Any]


class HeldResource(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the ledger; `state` is intended or held."""

    kind: str
    id: str
    state: str
    vm: str | None
    op: str
    step: str


def _one(log: EventLog, query: Any) -> Any:
    return next(iter(query.limit(1).execute(log.peewee)), None)


def _summary(row: Any) -> OpSummary:
    return OpSummary(
        id=row.op,
        kind=row.kind,
        vm=row.vm,
        name=row.name,
        parent=row.parent,
        state=row.state,
        fate=row.fate,
        step=row.step,
        requested_us=row.requested_us,
        ended_us=row.ended_us,
        seconds=row.seconds,
        error=None if row.error is None else json.loads(row.error),
        reason=row.reason,
    )


def _one_op(log: EventLog, query: Any) -> OpSummary | None:
    row = _one(log, query)
    return None if row is None else _summary(row)


def op(log: EventLog, op_id: str) -> OpSummary | None:
    """Find one operation by its whole id."""
    return _one_op(log, OpRow.select().where(OpRow.op == op_id))


def whole_op(log: EventLog, op_id: str) -> Op:
    """Fold one operation that exists from its events: its steps, facts and resources."""
    whole = fold_op(log.read(stream=op_id))
    assert whole is not None
    return whole


def spec_asked(log: EventLog, op_id: str) -> VmSpec:
    """Give the specification of the VM that an operation was asked to create."""
    events = (row.event for row in log.read(op=op_id, kind="vm.reserved", limit=1))
    return next(event.spec for event in events if isinstance(event, ev.VmReserved))


def op_word(short: str) -> str:
    """Give an id's own part, with or without `op-` before it. Raises InvalidRequest when it is none."""
    word = short.removeprefix("op-").lower()
    if not word or not word.isalnum():
        raise InvalidRequest(f"{short!r} is not an operation id.", hint="`banger ops list` shows them.")
    return word


def find_op(log: EventLog, short: str) -> OpSummary:
    """Find one operation by its id or a unique beginning or end of it, with or without `op-`.

    Raises NotFound, or InvalidRequest when several fit.
    """
    word = op_word(short)
    fits = OpRow.op.startswith(f"op-{word}") | OpRow.op.endswith(word)
    rows = list(OpRow.select().where(fits).limit(3).execute(log.peewee))
    if not rows:
        raise NotFound(f"There is no operation {short}.", hint="`banger ops list` shows them.")
    if len(rows) > 1 and not any(row.op == f"op-{word}" for row in rows):
        raise InvalidRequest(f"Several operations fit {short!r}.", hint="Give more of the id.")
    return _summary(next((row for row in rows if row.op == f"op-{word}"), rows[0]))


def ops(log: EventLog, *, limit: int, vm: str | None = None) -> list[OpSummary]:
    """List operations, the newest first."""
    query = OpRow.select().order_by(OpRow.seq.desc()).limit(limit)
    if vm is not None:
        query = query.where(OpRow.vm == vm)
    return [_summary(row) for row in query.execute(log.peewee)]


def active_ops(log: EventLog) -> dict[str, OpSummary]:
    """Map each VM to the operation that now works on it, or is the next to."""
    query = (
        OpRow.select()
        .join(WorkRow, on=(WorkRow.op == OpRow.op))
        .where(OpRow.vm.is_null(False))
        .order_by(WorkRow.seq.desc())
    )
    return {row.vm: _summary(row) for row in query.execute(log.peewee)}


def active_count(log: EventLog) -> int:
    """Count the operations that have not ended."""
    return int(WorkRow.select().count(log.peewee))


def running_workers(log: EventLog) -> dict[int, str]:
    """Map each busy worker's pid to its operation."""
    query = WorkRow.select(WorkRow.pid, WorkRow.op).where(WorkRow.state == "running")
    return {row.pid: row.op for row in query.execute(log.peewee)}


def op_by_key(log: EventLog, key: str) -> tuple[str, str] | None:
    """Find the operation that was asked for with an idempotency key: its id, and what was asked."""
    row = _one(log, OpRow.select(OpRow.op, OpRow.asked).where(OpRow.key == key))
    return None if row is None else (row.op, row.asked)


def last_in_lane(log: EventLog, lane: str) -> OpSummary | None:
    """Find the newest operation of a lane that has not ended and is not to be cancelled."""
    query = (
        OpRow.select()
        .join(WorkRow, on=(WorkRow.op == OpRow.op))
        .where((WorkRow.lane == lane) & (WorkRow.cancel == 0))
        .order_by(WorkRow.seq.desc())
    )
    return _one_op(log, query)


def ahead_of(log: EventLog, op_id: str) -> OpSummary | None:
    """Find the operation that runs before this one in its lane; None when it is the first."""
    mine = _one(log, WorkRow.select().where(WorkRow.op == op_id))
    if mine is None:
        return None
    before = (WorkRow.lane == mine.lane) & (WorkRow.seq < mine.seq)
    query = OpRow.select().join(WorkRow, on=(WorkRow.op == OpRow.op)).where(before).order_by(WorkRow.seq)
    return _one_op(log, query)


def stuck_vms(log: EventLog) -> dict[str, str]:
    """Map each VM whose last operation is stuck to that operation."""
    rows = log.db.execute(
        "SELECT o.vm, o.op FROM op o WHERE o.fate = 'stuck' AND o.vm IS NOT NULL"
        " AND NOT EXISTS (SELECT 1 FROM op later WHERE later.vm = o.vm AND later.seq > o.seq)"
    )
    return dict(rows.fetchall())


def active_op(log: EventLog, kind: str, lane: str) -> str | None:
    """Find an operation of this kind that is queued or running in a lane."""
    found = log.db.execute(
        "SELECT w.op FROM work w JOIN op o ON o.op = w.op WHERE w.lane = ? AND o.kind = ? AND w.cancel = 0"
        " ORDER BY w.seq DESC LIMIT 1",
        (lane, kind),
    ).fetchone()
    return None if found is None else str(found[0])


def vm(log: EventLog, vm_id: str) -> Vm | None:
    """Find one VM by its id."""
    row = _one(log, VmRow.select().where(VmRow.vm == vm_id))
    return None if row is None else vm_decoder.decode(row.data)


def find_vm(log: EventLog, word: str) -> Vm:
    """Find one VM by name or id. Raises NotFound."""
    row = _one(log, VmRow.select().where((VmRow.name == word) | (VmRow.vm == word)))
    if row is None:
        raise NotFound(f"There is no VM named {word!r}.", hint="`banger ps -a` lists them all.")
    return vm_decoder.decode(row.data)


def stuck(log: EventLog) -> list[OpSummary]:
    """List the operations that could be neither finished nor undone, and that nobody gave up.

    Those on a VM that has been deleted since are over with it.
    """
    there = OpRow.vm.is_null() | (OpRow.vm << VmRow.select(VmRow.vm))
    query = OpRow.select().where((OpRow.fate == "stuck") & there).order_by(OpRow.seq)
    return [_summary(row) for row in query.execute(log.peewee)]


def stuck_in(database: Path) -> list[tuple[str, str, str | None]]:
    """List them as (op, kind, name) from a database that is only read; empty where there is none."""
    if not database.exists():
        return []
    with only_read(database) as db:
        return db.execute(
            "SELECT op, kind, name FROM op WHERE fate = 'stuck' AND (vm IS NULL OR vm IN (SELECT vm FROM vm))"
            " ORDER BY seq"
        ).fetchall()


def known_vms(log: EventLog) -> set[str]:
    """Give the ids of all VMs that the log has heard of otherwise than by taking them back."""
    query = OpRow.select(OpRow.vm).where(OpRow.vm.is_null(False) & (OpRow.kind != "vm.recover")).distinct()
    return {row.vm for row in query.execute(log.peewee)} | {vm.id for vm in vms(log)}


def vm_ids(log: EventLog, word: str | None = None) -> list[str]:
    """List the ids of all VMs there have ever been, the oldest first; of one name or id if given."""
    made = OpRow.kind << ("vm.create", "vm.recover")
    query = OpRow.select(OpRow.vm).where(made).order_by(OpRow.seq)
    if word is not None:
        query = query.where((OpRow.name == word) | (OpRow.vm == word))
    return [row.vm for row in query.execute(log.peewee)]


def vms(log: EventLog) -> list[Vm]:
    """List every VM, the oldest first."""
    query = VmRow.select(VmRow.data).order_by(VmRow.seq)
    return [vm_decoder.decode(row.data) for row in query.execute(log.peewee)]


def resources(log: EventLog, *, vm_id: str | None = None) -> list[HeldResource]:
    """List the ledger: what operations acquired and nobody released; of one VM if given."""
    query = ResourceRow.select().order_by(ResourceRow.time_us)
    if vm_id is not None:
        query = query.where(ResourceRow.vm == vm_id)
    return [
        HeldResource(kind=r.kind, id=r.id, state=r.state, vm=r.vm, op=r.op, step=r.step)
        for r in query.execute(log.peewee)
    ]


def resources_of_vm(log: EventLog, vm_id: str) -> Iterator[Resource]:
    """Give the resources that the ledger has for a VM."""
    for held in resources(log, vm_id=vm_id):
        yield msgspec.convert({"kind": held.kind, "id": held.id}, Resource)


def resource_ids(log: EventLog, kind: str) -> set[str]:
    """Give the ids of all resources of a kind that are intended or held."""
    query = ResourceRow.select(ResourceRow.id).where(ResourceRow.kind == kind)
    return {row.id for row in query.execute(log.peewee)}


def ledger_counts(log: EventLog) -> tuple[int, int, int]:
    """Count what was acquired and released since the log began, and what is in the ledger now.

    Images and kernels are left out: they belong to the cache.
    """
    counted = (
        "SELECT count(*) FROM (SELECT DISTINCT op, data FROM event WHERE type = ?"
        " AND json_extract(data, '$.resource.kind') != 'artifact')"
    )
    acquired = log.db.execute(counted, ("resource.intended",)).fetchone()[0]
    released = log.db.execute(counted, ("resource.released",)).fetchone()[0]
    held = ResourceRow.select().where(ResourceRow.kind != "artifact").count(log.peewee)
    return int(acquired), int(released), int(held)


def last_acquired(log: EventLog, resource: Resource) -> tuple[str, int] | None:
    """Find the operation that last acquired a resource, and when (µs since the epoch)."""
    found = log.db.execute(
        "SELECT op, time_us FROM event WHERE type = 'resource.intended'"
        " AND json_extract(data, '$.resource.kind') = ? AND json_extract(data, '$.resource.id') = ?"
        " ORDER BY seq DESC LIMIT 1",
        (resource.kind, resource.id),
    ).fetchone()
    return None if found is None else (str(found[0]), int(found[1]))


def artifact(log: EventLog, kind: str, name: str) -> ArtifactSummary | None:
    """Find an image or kernel by name."""
    wanted = (ArtifactRow.kind == kind) & (ArtifactRow.name == name)
    row = _one(log, ArtifactRow.select().where(wanted))
    return None if row is None else _artifact(row)


def artifacts(log: EventLog, kind: str) -> list[ArtifactSummary]:
    """List images or kernels by name."""
    query = ArtifactRow.select().where(ArtifactRow.kind == kind).order_by(ArtifactRow.name)
    return [_artifact(row) for row in query.execute(log.peewee)]


def _artifact(row: Any) -> ArtifactSummary:
    return ArtifactSummary(
        kind=row.kind,
        name=row.name,
        digest=row.digest,
        size_bytes=row.size_bytes,
        created_us=row.created_us,
        details=json.loads(row.details),
    )
