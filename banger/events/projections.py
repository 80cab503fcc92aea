"""From each event to the tables that answer questions, inside the append's own transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import msgspec

from banger.errors import AlreadyExists
from banger.events import vocabulary as ev
from banger.events.fold import Vm, apply_vm
from banger.events.vocabulary import Recorded
from banger.model import Needs

vm_decoder = msgspec.json.Decoder(Vm)


def _requested(db: sqlite3.Connection, row: Recorded, event: ev.OpRequested) -> bool:
    db.execute(
        "INSERT INTO op (op, seq, kind, vm, name, parent, state, requested_us, start_boot_us, key, asked)"
        " VALUES (?, ?, ?, ?, ?, ?, 'waiting', ?, ?, ?, ?)",
        (
            row.stream,
            row.seq,
            event.kind,
            event.vm,
            event.name,
            event.parent,
            row.time_us,
            row.boot_us,
            event.key,
            event.asked,
        ),
    )
    return _enqueue(db, row, event.lane, event.needs or Needs(), epoch=0)


def _enqueue(db: sqlite3.Connection, row: Recorded, lane: str, needs: Needs, *, epoch: int) -> bool:
    db.execute(
        "INSERT INTO work (op, seq, lane, state, due_us, epoch, cancel, memory_mib, vcpu, disk_mib)"
        " VALUES (?, ?, ?, 'ready', 0, ?, 0, ?, ?, ?)",
        (row.stream, row.seq, lane, epoch, needs.memory_mib, needs.vcpu, needs.disk_mib),
    )
    return True


def _waiting(db: sqlite3.Connection, row: Recorded, event: ev.OpWaiting) -> bool:
    db.execute("UPDATE work SET reason = ? WHERE op = ?", (event.reason, row.stream))
    db.execute("UPDATE op SET reason = ? WHERE op = ?", (event.reason, row.stream))
    return False


def _claimed(db: sqlite3.Connection, row: Recorded, event: ev.OpClaimed) -> bool:
    db.execute(
        "UPDATE work SET state = 'running', epoch = ?, pid = ?, start_ticks = ?, boot_id = ?,"
        " deadline_us = NULL, waits_on = NULL, reason = NULL WHERE op = ?",
        (event.epoch, event.worker.pid, event.worker.start_ticks, event.worker.boot_id, row.stream),
    )
    db.execute(
        "UPDATE op SET state = CASE state WHEN 'undoing' THEN state ELSE 'running' END, reason = NULL"
        " WHERE op = ?",
        (row.stream,),
    )
    return False


def _interrupted(db: sqlite3.Connection, row: Recorded, _: ev.OpInterrupted) -> bool:
    _free(db, row.stream, "ready", 0)
    return True


def _parked(db: sqlite3.Connection, row: Recorded, event: ev.OpParked) -> bool:
    _free(db, row.stream, "parked", 0)
    db.execute("UPDATE work SET waits_on = ? WHERE op = ?", (event.on, row.stream))
    db.execute("UPDATE op SET state = 'waiting', reason = ? WHERE op = ?", (event.reason, row.stream))
    return False


def _cancel_requested(db: sqlite3.Connection, row: Recorded, _: ev.OpCancelRequested) -> bool:
    db.execute(
        "UPDATE work SET cancel = 1, waits_on = NULL, due_us = 0,"
        " state = CASE state WHEN 'parked' THEN 'ready' ELSE state END WHERE op = ?",
        (row.stream,),
    )
    return True


def _started(db: sqlite3.Connection, row: Recorded, event: ev.StepStarted | ev.UndoStarted) -> bool:
    db.execute("UPDATE op SET step = ? WHERE op = ?", (event.name, row.stream))
    deadline_us = row.boot_us + int(event.deadline_s * 1e6)
    db.execute("UPDATE work SET deadline_us = ? WHERE op = ?", (deadline_us, row.stream))
    return False


def _failed(db: sqlite3.Connection, row: Recorded, event: ev.StepFailed | ev.UndoFailed) -> bool:
    if event.retry_in_s is None:
        return False
    _free(db, row.stream, "ready", row.boot_us + int(event.retry_in_s * 1e6))
    return True


def _undoing(db: sqlite3.Connection, row: Recorded, _: ev.OpUndoing) -> bool:
    db.execute("UPDATE op SET state = 'undoing' WHERE op = ?", (row.stream,))
    return False


def _ended(db: sqlite3.Connection, row: Recorded, event: ev.OpEnded) -> bool:
    error = None if event.error is None else msgspec.json.encode(event.error).decode()
    db.execute("DELETE FROM work WHERE op = ?", (row.stream,))
    db.execute(
        "UPDATE op SET state = 'ended', fate = ?, error = ?, ended_us = ?, reason = NULL,"
        # CLOCK_BOOTTIME begins anew with the host: what spans a reboot has no duration.
        " seconds = CASE WHEN ? >= start_boot_us THEN (? - start_boot_us) / 1e6 END WHERE op = ?",
        (event.fate, error, row.time_us, row.boot_us, row.boot_us, row.stream),
    )
    db.execute("UPDATE work SET state = 'ready', waits_on = NULL WHERE waits_on = ?", (row.stream,))
    return True


def _reopened(db: sqlite3.Connection, row: Recorded, event: ev.OpReopened) -> bool:
    db.execute(
        "UPDATE op SET state = ?, fate = NULL, error = NULL, ended_us = NULL, seconds = NULL WHERE op = ?",
        ("undoing" if event.back else "waiting", row.stream),
    )
    # Its epochs go on, so that a worker from before it stuck stays fenced off.
    return _enqueue(db, row, event.lane, Needs(), epoch=event.epoch)


def _abandoned(db: sqlite3.Connection, row: Recorded, _: ev.OpAbandoned) -> bool:
    db.execute("UPDATE op SET fate = 'abandoned' WHERE op = ?", (row.stream,))
    return False


def _free(db: sqlite3.Connection, op: str, state: str, due_us: int) -> None:
    db.execute(
        "UPDATE work SET state = ?, due_us = ?, pid = NULL, start_ticks = NULL, boot_id = NULL,"
        " deadline_us = NULL WHERE op = ?",
        (state, due_us, op),
    )


def _project_vm(db: sqlite3.Connection, row: Recorded, _: ev.Event) -> bool:
    found = db.execute("SELECT data FROM vm WHERE vm = ?", (row.stream,)).fetchone()
    vm = apply_vm(None if found is None else vm_decoder.decode(found[0]), row)
    if vm is None:
        return False
    if vm.state == "deleted":
        db.execute("DELETE FROM vm WHERE vm = ?", (row.stream,))
        return False
    shown = (
        vm.state,
        vm.process is not None,
        vm.spec.memory_mib,
        vm.spec.vcpu,
        msgspec.json.encode(vm).decode(),
    )
    if found is not None:
        db.execute(
            "UPDATE vm SET state = ?, live = ?, memory_mib = ?, vcpu = ?, data = ? WHERE vm = ?",
            (*shown, row.stream),
        )
        return True  # a VM that has ended makes room
    try:
        db.execute(
            "INSERT INTO vm (vm, seq, name, state, live, memory_mib, vcpu, data)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (row.stream, row.seq, vm.spec.name, *shown),
        )
    except sqlite3.IntegrityError:
        raise AlreadyExists(
            f"A VM named {vm.spec.name!r} exists already.",
            hint=f"Choose another name, or `banger vm delete {vm.spec.name}` first.",
        ) from None
    return False


def _project_resource(
    db: sqlite3.Connection,
    row: Recorded,
    event: ev.ResourceIntended | ev.ResourceHeld | ev.ResourceReleased,
) -> bool:
    resource = event.resource
    if isinstance(event, ev.ResourceReleased):
        db.execute("DELETE FROM resource WHERE kind = ? AND id = ?", (resource.kind, resource.id))
        return False
    state = "held" if isinstance(event, ev.ResourceHeld) else "intended"
    db.execute(
        "INSERT INTO resource (kind, id, state, vm, op, step, time_us) VALUES (?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (kind, id) DO UPDATE SET state = excluded.state, vm = excluded.vm, op = excluded.op,"
        " step = excluded.step, time_us = excluded.time_us",
        (resource.kind, resource.id, state, event.vm, row.op or "", event.step, row.time_us),
    )
    return False


def _project_artifact(
    db: sqlite3.Connection, row: Recorded, event: ev.ArtifactPublished | ev.ArtifactDeleted
) -> bool:
    if isinstance(event, ev.ArtifactDeleted):
        db.execute("DELETE FROM artifact WHERE kind = ? AND name = ?", (event.kind, event.name))
        return False
    db.execute(
        "INSERT INTO artifact (kind, name, digest, size_bytes, created_us, details)"
        " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (kind, name) DO UPDATE SET digest = excluded.digest,"
        " size_bytes = excluded.size_bytes, created_us = excluded.created_us, details = excluded.details",
        (
            event.kind,
            event.name,
            event.digest,
            event.size_bytes,
            row.time_us,
            msgspec.json.encode(event.details).decode(),
        ),
    )
    return False


_PROJECTORS: dict[type[ev.Event], Callable[[sqlite3.Connection, Recorded, Any], bool]] = {
    ev.OpRequested: _requested,
    ev.OpWaiting: _waiting,
    ev.OpClaimed: _claimed,
    ev.OpInterrupted: _interrupted,
    ev.OpParked: _parked,
    ev.OpCancelRequested: _cancel_requested,
    ev.OpUndoing: _undoing,
    ev.OpEnded: _ended,
    ev.OpReopened: _reopened,
    ev.OpAbandoned: _abandoned,
    ev.StepStarted: _started,
    ev.StepFailed: _failed,
    ev.UndoStarted: _started,
    ev.UndoFailed: _failed,
    ev.ResourceIntended: _project_resource,
    ev.ResourceHeld: _project_resource,
    ev.ResourceReleased: _project_resource,
    ev.VmReserved: _project_vm,
    ev.VmDesired: _project_vm,
    ev.VmCreated: _project_vm,
    ev.VmStarted: _project_vm,
    ev.VmChanged: _project_vm,
    ev.VmReady: _project_vm,
    ev.WorkspacePrepared: _project_vm,
    ev.VmStopped: _project_vm,
    ev.VmDeleted: _project_vm,
    ev.ArtifactPublished: _project_artifact,
    ev.ArtifactDeleted: _project_artifact,
}


def project(db: sqlite3.Connection, row: Recorded) -> bool:
    """Apply one event to the projections; True when it may have made work ready."""
    projector = _PROJECTORS.get(type(row.event))
    return projector is not None and projector(db, row, row.event)
