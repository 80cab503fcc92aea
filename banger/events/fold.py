"""State as a pure fold over one stream: an operation, a VM.

`fold(a + b) == fold(b, start=fold(a))`, so a reader may go on from where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from typing import Any, Literal

import msgspec

from banger.events import vocabulary as ev
from banger.events.vocabulary import Recorded
from banger.model import Needs, Process, Resource, VmSpec, Workspace

StepState = Literal["pending", "started", "done", "failed", "undone"]


class Step(msgspec.Struct, kw_only=True):
    """One step of an operation; times are CLOCK_BOOTTIME microseconds. Only the fold writes to it."""

    name: str
    title: str
    state: StepState = "pending"
    attempts: int = 0
    undo_attempts: int = 0
    started_us: int | None = None
    seconds: float | None = None
    undo_seconds: float | None = None
    facts: ev.Facts = {}
    error: ev.Error | None = None

    @property
    def touched(self) -> bool:
        """It may have left something behind: started, whether or not it ended well."""
        return self.state in ("started", "done", "failed")


class Op(msgspec.Struct, kw_only=True):
    """One operation, as its events tell it. Only the fold writes to it, and to a copy of its own."""

    id: str
    kind: str
    args: ev.Facts
    lane: str
    vm: str | None
    name: str | None
    parent: str | None
    needs: Needs | None
    steps: list[Step]
    requested_us: int
    state: Literal["waiting", "running", "undoing", "ended"] = "waiting"
    epoch: int = 0
    cancelled: bool = False
    undoing: bool = False
    complete: bool = False
    parked_on: str | None = None
    waits_for: str | None = None
    last_child: str | None = None
    error: ev.Error | None = None
    undo_errors: tuple[ev.Error, ...] = ()
    fate: ev.Fate | None = None
    started_boot_us: int = 0
    ended_us: int | None = None
    ended_boot_us: int | None = None
    resources: dict[str, tuple[Resource, str, str]] = {}

    def copy(self) -> Op:
        """Give one that can be folded on without changing this one."""
        steps = [copy(step) for step in self.steps]
        return msgspec.structs.replace(self, steps=steps, resources=dict(self.resources))

    @property
    def facts(self) -> ev.Facts:
        """Everything the done steps found or made, later steps winning."""
        merged: ev.Facts = {}
        for step in self.steps:
            merged.update(step.facts)
        return merged

    def next_step(self) -> int | None:
        """Give the index of the step to run next; None when all are done."""
        if self.complete:
            return None
        return next((i for i, step in enumerate(self.steps) if step.state != "done"), None)

    def next_undo(self) -> int | None:
        """Give the index of the step to undo next, last started first; None when all are."""
        return next((i for i in reversed(range(len(self.steps))) if self.steps[i].touched), None)


class Vm(msgspec.Struct, frozen=True, kw_only=True):
    """One VM, as its events tell it."""

    id: str
    spec: VmSpec
    host: str
    desired: Literal["running", "stopped", "absent"] = "running"
    state: Literal["creating", "stopped", "starting", "running", "deleted"] = "creating"
    created_us: int
    started_us: int | None = None
    ready_seconds: float | None = None
    process: Process | None = None
    ssh_port: int | None = None
    address: str | None = None
    accelerator: str | None = None
    image_digest: str | None = None
    kernel_digest: str | None = None
    reason: str | None = None
    workspace: Workspace | None = None


Handler = Callable[[Op, Recorded, Any], None]


def _requested(row: Recorded, event: ev.OpRequested) -> Op:
    return Op(
        id=row.stream,
        kind=event.kind,
        args=event.args,
        lane=event.lane,
        vm=event.vm,
        name=event.name,
        parent=event.parent,
        needs=event.needs,
        steps=[Step(name=name, title=title) for name, title in zip(event.steps, event.titles, strict=True)],
        requested_us=row.time_us,
        started_boot_us=row.boot_us,
    )


def _step_started(op: Op, row: Recorded, event: ev.StepStarted) -> None:
    step = op.steps[event.step]
    step.state, step.attempts, step.started_us = "started", event.attempt, row.boot_us


def _step_done(op: Op, _: Recorded, event: ev.StepDone) -> None:
    step = op.steps[event.step]
    step.state, step.seconds, step.facts, step.error = "done", event.seconds, event.facts, None
    op.complete, op.last_child = event.last, None


def _step_failed(op: Op, _: Recorded, event: ev.StepFailed) -> None:
    step = op.steps[event.step]
    step.state, step.error = "failed", event.error


def _undo_started(op: Op, _: Recorded, event: ev.UndoStarted) -> None:
    op.steps[event.step].undo_attempts = event.attempt


def _undo_done(op: Op, _: Recorded, event: ev.UndoDone) -> None:
    step = op.steps[event.step]
    step.state, step.undo_seconds = "undone", event.seconds


def _undo_failed(op: Op, _: Recorded, event: ev.UndoFailed) -> None:
    op.undo_errors = (*op.undo_errors, event.error)


def _intended(op: Op, _: Recorded, event: ev.ResourceIntended) -> None:
    _put(op, event, "intended")


def _held(op: Op, _: Recorded, event: ev.ResourceHeld) -> None:
    _put(op, event, "held")


def _released(op: Op, _: Recorded, event: ev.ResourceReleased) -> None:
    _put(op, event, "released")


def _put(op: Op, event: ev.ResourceIntended | ev.ResourceHeld | ev.ResourceReleased, state: str) -> None:
    resource = event.resource
    op.resources[f"{resource.kind}:{resource.id}"] = (resource, state, event.step)


def _claimed(op: Op, _: Recorded, event: ev.OpClaimed) -> None:
    op.state = "undoing" if op.undoing else "running"
    op.epoch, op.parked_on, op.waits_for = event.epoch, None, None


def _interrupted(op: Op, _: Recorded, event: ev.OpInterrupted) -> None:
    op.state = "waiting"
    if event.graceful:
        _uncount(op)


def _parked(op: Op, _: Recorded, event: ev.OpParked) -> None:
    _uncount(op)
    op.state, op.parked_on, op.last_child, op.waits_for = "waiting", event.on, event.on, event.reason


def _waiting(op: Op, _: Recorded, event: ev.OpWaiting) -> None:
    op.waits_for = event.reason


def _cancel_requested(op: Op, _: Recorded, __: ev.OpCancelRequested) -> None:
    op.cancelled = True


def _undoing(op: Op, _: Recorded, event: ev.OpUndoing) -> None:
    op.undoing, op.state, op.error = True, "undoing", event.error


def _ended(op: Op, row: Recorded, event: ev.OpEnded) -> None:
    op.state, op.fate, op.error, op.waits_for = "ended", event.fate, event.error, None
    op.ended_us, op.ended_boot_us = row.time_us, row.boot_us


def _reopened(op: Op, _: Recorded, event: ev.OpReopened) -> None:
    """Forget how it ended; what is not done has all its attempts again."""
    op.state, op.undoing, op.cancelled, op.fate = "waiting", event.back, False, None
    op.error = op.error if event.back else None
    op.undo_errors, op.ended_us, op.ended_boot_us = (), None, None
    for step in op.steps:
        if event.back or step.state != "done":
            step.attempts = step.undo_attempts = 0


def _abandoned(op: Op, _: Recorded, __: ev.OpAbandoned) -> None:
    op.fate = "abandoned"


def _uncount(op: Op) -> None:
    """Take back one attempt: neither waiting for another operation nor a worker's stop is a failure."""
    index = op.next_undo() if op.undoing else op.next_step()
    if index is None:
        return
    step = op.steps[index]
    if op.undoing:
        step.undo_attempts = max(0, step.undo_attempts - 1)
    elif step.state == "started":
        step.attempts = max(0, step.attempts - 1)


_HANDLERS: dict[type[ev.Event], Handler] = {
    ev.StepStarted: _step_started,
    ev.StepDone: _step_done,
    ev.StepFailed: _step_failed,
    ev.UndoStarted: _undo_started,
    ev.UndoDone: _undo_done,
    ev.UndoFailed: _undo_failed,
    ev.ResourceIntended: _intended,
    ev.ResourceHeld: _held,
    ev.ResourceReleased: _released,
    ev.OpClaimed: _claimed,
    ev.OpInterrupted: _interrupted,
    ev.OpParked: _parked,
    ev.OpWaiting: _waiting,
    ev.OpCancelRequested: _cancel_requested,
    ev.OpUndoing: _undoing,
    ev.OpEnded: _ended,
    ev.OpReopened: _reopened,
    ev.OpAbandoned: _abandoned,
}


def apply_vm(vm: Vm | None, row: Recorded) -> Vm | None:
    """Apply one event of a VM's stream."""
    event = row.event
    if isinstance(event, ev.VmReserved):
        return Vm(id=row.stream, spec=event.spec, host=event.host, created_us=row.time_us)
    if vm is None:
        return None
    replace = msgspec.structs.replace
    match event:
        case ev.VmDesired(state=desired):
            return replace(vm, desired=desired)
        case ev.VmCreated(image_digest=image, kernel_digest=kernel):
            return replace(vm, state="stopped", image_digest=image, kernel_digest=kernel)
        case ev.VmStarted(process=process, ssh_port=port, accelerator=accelerator, address=address):
            return replace(
                vm,
                state="starting",
                process=process,
                ssh_port=port,
                address=address,
                accelerator=accelerator,
                started_us=row.time_us,
                reason=None,
            )
        case ev.VmReady(seconds=seconds):
            return replace(vm, state="running", ready_seconds=seconds)
        case ev.VmStopped(reason=reason):
            return replace(
                vm,
                state="creating" if vm.image_digest is None else "stopped",
                process=None,
                ssh_port=None,
                address=None,
                started_us=None,
                ready_seconds=None,
                reason=reason,
            )
        case ev.WorkspacePrepared(workspace=workspace):
            return replace(vm, workspace=workspace)
        case ev.VmChanged(spec=spec):
            return replace(vm, spec=spec)
        case ev.VmDeleted():
            return replace(vm, state="deleted", desired="absent", process=None, ssh_port=None, address=None)
        case _:
            return vm


def fold_op(rows: Iterable[Recorded], start: Op | None = None) -> Op | None:
    """Fold the events of one operation's stream; None when there are none. `start` stays as it is."""
    op = None if start is None else start.copy()
    for row in rows:
        if op is not None:
            fold_on(op, row)
        elif isinstance(row.event, ev.OpRequested):
            op = _requested(row, row.event)
    return op


def fold_on(op: Op, row: Recorded) -> None:
    """Apply one more event to an operation that is the caller's own."""
    handler = _HANDLERS.get(type(row.event))
    if handler is not None:
        handler(op, row, row.event)


def fold_vm(rows: Iterable[Recorded], start: Vm | None = None) -> Vm | None:
    """Fold the events of one VM's stream; None when there are none."""
    for row in rows:
        start = apply_vm(start, row)
    return start
