"""From each event to the tables that answer questions, inside the append's own transaction."""

from __future__ import annotations

import sqlite3

import msgspec

from banger.errors import AlreadyExists
from banger.events import vocabulary as ev
from banger.events.fold import Vm, apply_vm
from banger.events.vocabulary import Recorded

vm_decoder = msgspec.json.Decoder(Vm)


def project(db: sqlite3.Connection, row: Recorded) -> bool:
    """Apply one event to the projections; True when it may have made work ready."""
    event = row.event
    match event:
        case ev.VmReserved() | ev.VmDesired() | ev.VmCreated() | ev.VmStarted() | ev.VmReady():
            _project_vm(db, row)
        case ev.VmStopped() | ev.VmDeleted():
            _project_vm(db, row)
        case ev.ResourceIntended() | ev.ResourceHeld() | ev.ResourceReleased():
            _project_resource(db, row, event)
        case ev.ArtifactPublished() | ev.ArtifactDeleted():
            _project_artifact(db, row, event)
        case _:
            return _project_op(db, row)
    return False


def _project_op(db: sqlite3.Connection, row: Recorded) -> bool:
    op, event = row.stream, row.event
    match event:
        case ev.OpRequested(kind=kind, vm=vm, name=name, parent=parent, lane=lane):
            db.execute(
                "INSERT INTO op (op, kind, vm, name, parent, state, requested_us, start_boot_us)"
                " VALUES (?, ?, ?, ?, ?, 'waiting', ?, ?)",
                (op, kind, vm, name, parent, row.time_us, row.boot_us),
            )
            db.execute(
                "INSERT INTO work (op, seq, lane, state, due_us, epoch, cancel)"
                " VALUES (?, ?, ?, 'ready', 0, 0, 0)",
                (op, row.seq, lane),
            )
            return True
        case ev.OpClaimed(epoch=epoch, worker=worker):
            db.execute(
                "UPDATE work SET state = 'running', epoch = ?, pid = ?, start_ticks = ?, deadline_us = NULL,"
                " waits_on = NULL WHERE op = ?",
                (epoch, worker.pid, worker.start_ticks, op),
            )
            db.execute(
                "UPDATE op SET state = CASE state WHEN 'undoing' THEN state ELSE 'running' END WHERE op = ?",
                (op,),
            )
        case ev.OpInterrupted():
            _free(db, op, "ready", 0)
            return True
        case ev.OpParked(on=on):
            _free(db, op, "parked", 0)
            db.execute("UPDATE work SET waits_on = ? WHERE op = ?", (on, op))
            db.execute("UPDATE op SET state = 'waiting' WHERE op = ?", (op,))
        case ev.OpCancelRequested():
            db.execute(
                "UPDATE work SET cancel = 1, waits_on = NULL, due_us = 0,"
                " state = CASE state WHEN 'parked' THEN 'ready' ELSE state END WHERE op = ?",
                (op,),
            )
            return True
        case ev.StepStarted(name=name, deadline_s=deadline) | ev.UndoStarted(name=name, deadline_s=deadline):
            db.execute("UPDATE op SET step = ? WHERE op = ?", (name, op))
            db.execute(
                "UPDATE work SET deadline_us = ? WHERE op = ?", (row.boot_us + int(deadline * 1e6), op)
            )
        case ev.StepFailed(retry_in_s=retry) | ev.UndoFailed(retry_in_s=retry) if retry is not None:
            _free(db, op, "ready", row.boot_us + int(retry * 1e6))
            return True
        case ev.OpUndoing():
            db.execute("UPDATE op SET state = 'undoing' WHERE op = ?", (op,))
        case ev.OpEnded(fate=fate, error=error):
            db.execute("DELETE FROM work WHERE op = ?", (op,))
            db.execute(
                "UPDATE op SET state = 'ended', fate = ?, error = ?, ended_us = ?,"
                # CLOCK_BOOTTIME begins anew with the host: what spans a reboot has no duration.
                " seconds = CASE WHEN ? >= start_boot_us THEN (? - start_boot_us) / 1e6 END WHERE op = ?",
                (
                    fate,
                    None if error is None else msgspec.json.encode(error).decode(),
                    row.time_us,
                    row.boot_us,
                    row.boot_us,
                    op,
                ),
            )
            db.execute("UPDATE work SET state = 'ready', waits_on = NULL WHERE waits_on = ?", (op,))
            return True
        case ev.OpReopened(back=back):
            db.execute(
                "UPDATE op SET state = ?, fate = NULL, error = NULL, ended_us = NULL, seconds = NULL"
                " WHERE op = ?",
                ("undoing" if back else "waiting", op),
            )
            # Its epochs go on, so that a worker from before it stuck stays fenced off.
            db.execute(
                "INSERT INTO work (op, seq, lane, state, due_us, epoch, cancel)"
                " VALUES (?, ?, ?, 'ready', 0, ?, 0)",
                (op, row.seq, event.lane, event.epoch),
            )
            return True
        case ev.OpAbandoned():
            db.execute("UPDATE op SET fate = 'abandoned' WHERE op = ?", (op,))
        case _:
            pass
    return False


def _free(db: sqlite3.Connection, op: str, state: str, due_us: int) -> None:
    db.execute(
        "UPDATE work SET state = ?, due_us = ?, pid = NULL, start_ticks = NULL, deadline_us = NULL"
        " WHERE op = ?",
        (state, due_us, op),
    )


def _project_vm(db: sqlite3.Connection, row: Recorded) -> None:
    found = db.execute("SELECT data FROM vm WHERE vm = ?", (row.stream,)).fetchone()
    vm = apply_vm(None if found is None else vm_decoder.decode(found[0]), row)
    if vm is None:
        return
    if vm.state == "deleted":
        db.execute("DELETE FROM vm WHERE vm = ?", (row.stream,))
        return
    data = msgspec.json.encode(vm).decode()
    if found is not None:
        db.execute("UPDATE vm SET state = ?, data = ? WHERE vm = ?", (vm.state, data, row.stream))
        return
    try:
        db.execute(
            "INSERT INTO vm (vm, name, state, data) VALUES (?, ?, ?, ?)",
            (row.stream, vm.spec.name, vm.state, data),
        )
    except sqlite3.IntegrityError:
        raise AlreadyExists(
            f"A VM named {vm.spec.name!r} exists already.",
            hint=f"Choose another name, or `banger vm delete {vm.spec.name}` first.",
        ) from None


def _project_resource(
    db: sqlite3.Connection,
    row: Recorded,
    event: ev.ResourceIntended | ev.ResourceHeld | ev.ResourceReleased,
) -> None:
    resource = event.resource
    if isinstance(event, ev.ResourceReleased):
        db.execute("DELETE FROM resource WHERE kind = ? AND id = ?", (resource.kind, resource.id))
        return
    state = "held" if isinstance(event, ev.ResourceHeld) else "intended"
    db.execute(
        "INSERT INTO resource (kind, id, state, vm, op, step, time_us) VALUES (?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (kind, id) DO UPDATE SET state = excluded.state, vm = excluded.vm, op = excluded.op,"
        " step = excluded.step, time_us = excluded.time_us",
        (resource.kind, resource.id, state, event.vm, row.op or "", event.step, row.time_us),
    )


def _project_artifact(
    db: sqlite3.Connection, row: Recorded, event: ev.ArtifactPublished | ev.ArtifactDeleted
) -> None:
    if isinstance(event, ev.ArtifactDeleted):
        db.execute("DELETE FROM artifact WHERE kind = ? AND name = ?", (event.kind, event.name))
        return
    db.execute(
        "INSERT OR REPLACE INTO artifact (kind, name, digest, size_bytes, created_us, details)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (
            event.kind,
            event.name,
            event.digest,
            event.size_bytes,
            row.time_us,
            msgspec.json.encode(event.details).decode(),
        ),
    )
