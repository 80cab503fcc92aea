"""State as a pure fold over one stream: an operation, a VM.

`fold(a + b) == fold(b, start=fold(a))`, so a reader may go on from where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from banger.events import vocabulary as ev
from banger.events.vocabulary import Recorded
from banger.model import Process, Resource, VmSpec

StepState = Literal["pending", "started", "done", "failed", "undone"]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step of an operation; times are CLOCK_BOOTTIME microseconds."""

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


class Op(msgspec.Struct, frozen=True, kw_only=True):
    """One operation, as its events tell it."""

    id: str
    kind: str
    args: ev.Facts
    lane: str
    vm: str | None
    name: str | None
    steps: tuple[Step, ...]
    requested_us: int
    state: Literal["waiting", "running", "undoing", "ended"] = "waiting"
    epoch: int = 0
    cancelled: bool = False
    undoing: bool = False
    complete: bool = False
    parked_on: str | None = None
    last_child: str | None = None
    error: ev.Error | None = None
    undo_errors: tuple[ev.Error, ...] = ()
    fate: ev.Fate | None = None
    started_boot_us: int = 0
    ended_us: int | None = None
    ended_boot_us: int | None = None
    resources: dict[str, tuple[Resource, str, str]] = {}

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
    accelerator: str | None = None
    image_digest: str | None = None
    kernel_digest: str | None = None
    reason: str | None = None


def _with_step(op: Op, index: int, **changes: object) -> Op:
    step = msgspec.structs.replace(op.steps[index], **changes)
    return _replace(op, steps=(*op.steps[:index], step, *op.steps[index + 1 :]))


def _reopened(op: Op, *, back: bool) -> Op:
    """Forget how it ended; the step that it stuck at has all its attempts again."""
    op = _replace(
        op,
        state="waiting",
        undoing=back,
        cancelled=False,
        fate=None,
        error=op.error if back else None,
        undo_errors=(),
        ended_us=None,
        ended_boot_us=None,
    )
    index = op.next_undo() if back else op.next_step()
    return op if index is None else _with_step(op, index, attempts=0, undo_attempts=0)


def _uncount(op: Op) -> Op:
    """Take back one attempt: neither waiting for another operation nor a worker's stop is a failure."""
    index = op.next_undo() if op.undoing else op.next_step()
    if index is None:
        return op
    step = op.steps[index]
    if op.undoing:
        return _with_step(op, index, undo_attempts=max(0, step.undo_attempts - 1))
    if step.state != "started":
        return op
    return _with_step(op, index, attempts=max(0, step.attempts - 1))


def _replace(op: Op, **changes: object) -> Op:
    return msgspec.structs.replace(op, **changes)


def _with_resource(op: Op, resource: Resource, state: str, step: str) -> Op:
    key = f"{resource.kind}:{resource.id}"
    return _replace(op, resources={**op.resources, key: (resource, state, step)})


def apply_op(op: Op | None, row: Recorded) -> Op | None:
    """Apply one event of an operation's stream."""
    event = row.event
    if isinstance(event, ev.OpRequested):
        return Op(
            id=row.stream,
            kind=event.kind,
            args=event.args,
            lane=event.lane,
            vm=event.vm,
            name=event.name,
            steps=tuple(
                Step(name=name, title=title) for name, title in zip(event.steps, event.titles, strict=True)
            ),
            requested_us=row.time_us,
            started_boot_us=row.boot_us,
        )
    if op is None:
        return None
    match event:
        case ev.StepStarted(step=i, attempt=attempt):
            return _with_step(op, i, state="started", attempts=attempt, started_us=row.boot_us)
        case ev.StepDone(step=i, seconds=seconds, facts=facts, last=last):
            op = _with_step(op, i, state="done", seconds=seconds, facts=facts, error=None)
            return _replace(op, complete=last, last_child=None)
        case ev.StepFailed(step=i, error=error):
            return _with_step(op, i, state="failed", error=error)
        case ev.UndoStarted(step=i, attempt=attempt):
            return _with_step(op, i, undo_attempts=attempt)
        case ev.UndoDone(step=i, seconds=seconds):
            return _with_step(op, i, state="undone", undo_seconds=seconds)
        case ev.UndoFailed(error=error):
            return _replace(op, undo_errors=(*op.undo_errors, error))
        case ev.ResourceIntended(resource=resource, step=step):
            return _with_resource(op, resource, "intended", step)
        case ev.ResourceHeld(resource=resource, step=step):
            return _with_resource(op, resource, "held", step)
        case ev.ResourceReleased(resource=resource, step=step):
            return _with_resource(op, resource, "released", step)
        case ev.OpClaimed(epoch=epoch):
            state = "undoing" if op.undoing else "running"
            return _replace(op, state=state, epoch=epoch, parked_on=None)
        case ev.OpInterrupted(graceful=graceful):
            op = _replace(op, state="waiting")
            return _uncount(op) if graceful else op
        case ev.OpParked(on=on):
            return _replace(_uncount(op), state="waiting", parked_on=on, last_child=on)
        case ev.OpCancelRequested():
            return _replace(op, cancelled=True)
        case ev.OpUndoing(error=error):
            return _replace(op, undoing=True, state="undoing", error=error)
        case ev.OpEnded(fate=fate, error=error):
            return _replace(
                op, state="ended", fate=fate, error=error, ended_us=row.time_us, ended_boot_us=row.boot_us
            )
        case ev.OpReopened(back=back):
            return _reopened(op, back=back)
        case ev.OpAbandoned():
            return _replace(op, fate="abandoned")
        case _:
            return op


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
        case ev.VmStarted(process=process, ssh_port=port, accelerator=accelerator):
            return replace(
                vm,
                state="starting",
                process=process,
                ssh_port=port,
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
                started_us=None,
                ready_seconds=None,
                reason=reason,
            )
        case ev.VmDeleted():
            return replace(vm, state="deleted", desired="absent", process=None, ssh_port=None)
        case _:
            return vm


def fold_op(rows: Iterable[Recorded], start: Op | None = None) -> Op | None:
    """Fold the events of one operation's stream; None when there are none."""
    for row in rows:
        start = apply_op(start, row)
    return start


def fold_vm(rows: Iterable[Recorded], start: Vm | None = None) -> Vm | None:
    """Fold the events of one VM's stream; None when there are none."""
    for row in rows:
        start = apply_vm(start, row)
    return start
