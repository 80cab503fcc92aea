"""What can happen: one frozen struct per event type.

A struct's tag is the event's `type` in the log. A field is never renamed or given another
meaning; a change of shape gets a new `schema` number and an upcaster.
"""

from __future__ import annotations

from typing import Any, Literal, dataclass_transform

import msgspec

from banger.model import Needs, Process, Resource, VmSpec, Workspace

Facts = dict[str, Any]
Error = dict[str, Any]
Fate = Literal["done", "undone", "cancelled", "stuck", "abandoned"]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=True):
    """Something that happened."""


# -- an operation ---------------------------------------------------------------------------


class OpRequested(Event, tag="op.requested"):
    """Someone asked for an operation; its list of steps is pinned here.

    `parent` is the operation that waits for it, if it was one that asked. `key` is the caller's
    idempotency key, and `asked` a digest of what came with it.
    """

    kind: str
    args: Facts
    steps: tuple[str, ...]
    titles: tuple[str, ...]
    lane: str
    vm: str | None = None
    name: str | None = None
    parent: str | None = None
    needs: Needs | None = None
    key: str | None = None
    asked: str | None = None


class OpWaiting(Event, tag="op.waiting"):
    """There is no room for the operation on the host yet; `reason` says what is lacking."""

    reason: str


class OpClaimed(Event, tag="op.claimed"):
    """A worker took the operation; a later claim has a higher epoch."""

    epoch: int
    worker: Process


class OpInterrupted(Event, tag="op.interrupted"):
    """The worker that held the operation is no more, or gave it back (`graceful`)."""

    epoch: int
    reason: str
    graceful: bool = False


class OpParked(Event, tag="op.parked"):
    """The operation waits for another one and holds no worker meanwhile."""

    on: str
    reason: str


class OpCancelRequested(Event, tag="op.cancel-requested"):
    """Someone asked to stop the operation and undo it."""


class OpUndoing(Event, tag="op.undoing"):
    """From here on the operation runs backwards."""

    error: Error


class OpEnded(Event, tag="op.ended"):
    """The operation's end."""

    fate: Fate
    error: Error | None = None


class OpReopened(Event, tag="op.reopened"):
    """Someone asked to try a stuck operation again: to go on, or to go on undoing (`back`).

    `lane` and `epoch` are those it had: its row in the queue is made from them.
    """

    lane: str
    epoch: int
    back: bool = False


class OpAbandoned(Event, tag="op.abandoned"):
    """Someone gave a stuck operation up; what it still holds stays in the ledger."""


# -- a step ---------------------------------------------------------------------------------


class StepStarted(Event, tag="step.started"):
    """A step is about to act."""

    step: int
    name: str
    title: str
    attempt: int
    deadline_s: float


class StepProgress(Event, tag="step.progress"):
    """A word from inside a long step."""

    step: int
    message: str


class StepDone(Event, tag="step.done"):
    """A step has acted; these are the facts it found or made."""

    step: int
    name: str
    seconds: float
    facts: Facts
    last: bool = False


class StepFailed(Event, tag="step.failed"):
    """A step failed; it is tried again after `retry_in_s` seconds, or not at all."""

    step: int
    name: str
    error: Error
    retry_in_s: float | None = None


class UndoStarted(Event, tag="undo.started"):
    """A step is about to be undone."""

    step: int
    name: str
    attempt: int
    deadline_s: float


class UndoDone(Event, tag="undo.done"):
    """A step is undone."""

    step: int
    name: str
    seconds: float


class UndoFailed(Event, tag="undo.failed"):
    """Undoing a step failed."""

    step: int
    name: str
    error: Error
    retry_in_s: float | None = None


# -- a resource -----------------------------------------------------------------------------


class ResourceIntended(Event, tag="resource.intended"):
    """It is about to be acquired, and may exist from now on."""

    resource: Resource
    vm: str | None = None
    step: str = ""


class ResourceHeld(Event, tag="resource.held"):
    """It exists."""

    resource: Resource
    vm: str | None = None
    step: str = ""


class ResourceReleased(Event, tag="resource.released"):
    """It is gone."""

    resource: Resource
    vm: str | None = None
    step: str = ""


# -- a VM -----------------------------------------------------------------------------------


class VmReserved(Event, tag="vm.reserved"):
    """The name is taken before any work is done."""

    spec: VmSpec
    host: str


class VmDesired(Event, tag="vm.desired"):
    """What the user wants the VM to be."""

    state: Literal["running", "stopped", "absent"]


class VmCreated(Event, tag="vm.created"):
    """Its disks exist; it has never run."""

    image_digest: str
    kernel_digest: str


class VmStarted(Event, tag="vm.started"):
    """Its VMM runs. The SSH server is at `address`, or behind a port of the host's 127.0.0.1."""

    process: Process
    ssh_port: int
    accelerator: str
    address: str | None = None


class VmChanged(Event, tag="vm.changed"):
    """It is asked to be something else than before."""

    spec: VmSpec


class VmReady(Event, tag="vm.ready"):
    """The guest said that it is ready, `seconds` after its VMM was started."""

    seconds: float


class WorkspacePrepared(Event, tag="vm.workspace-prepared"):
    """A repository is in the guest, whole, in place of the one that was there before."""

    workspace: Workspace


class VmStopped(Event, tag="vm.stopped"):
    """Its VMM is gone; `reason` says why, in words."""

    reason: str


class VmDeleted(Event, tag="vm.deleted"):
    """Nothing of it is left, and its name is free."""


# -- images and kernels ---------------------------------------------------------------------


class ArtifactPublished(Event, tag="artifact.published"):
    """An image or a kernel can be used under this name."""

    kind: Literal["image", "kernel"]
    name: str
    digest: str
    size_bytes: int
    details: Facts


class ArtifactDeleted(Event, tag="artifact.deleted"):
    """The image or kernel is gone."""

    kind: Literal["image", "kernel"]
    name: str
    digest: str


AnyEvent = (
    OpRequested
    | OpWaiting
    | OpClaimed
    | OpInterrupted
    | OpParked
    | OpCancelRequested
    | OpUndoing
    | OpEnded
    | OpReopened
    | OpAbandoned
    | StepStarted
    | StepProgress
    | StepDone
    | StepFailed
    | UndoStarted
    | UndoDone
    | UndoFailed
    | ResourceIntended
    | ResourceHeld
    | ResourceReleased
    | VmReserved
    | VmDesired
    | VmCreated
    | VmStarted
    | VmChanged
    | VmReady
    | WorkspacePrepared
    | VmStopped
    | VmDeleted
    | ArtifactPublished
    | ArtifactDeleted
)

SCHEMA = 2
"""The version of the shapes above; stored with every event. `banger.events.upcast` reads older ones."""


def type_of(event: Event) -> str:
    """Give the event's type as the log has it, for example `step.done`."""
    tag = event.__struct_config__.tag
    assert isinstance(tag, str)
    return tag


class Actor(msgspec.Struct, frozen=True, kw_only=True):
    """Who did it: the uid and pid of the process, and its role."""

    uid: int
    pid: int
    role: str


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """An event as the log has it.

    `time_us` is wall time for people; `boot_us` is CLOCK_BOOTTIME for durations. Order is `seq`.
    """

    seq: int
    stream: str
    version: int
    op: str | None
    event: AnyEvent
    actor: Actor
    time_us: int
    boot_us: int
