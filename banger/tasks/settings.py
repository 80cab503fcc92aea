"""Change what a VM is asked to be: its CPUs, its memory, its disk."""

from __future__ import annotations

from typing import Any

import msgspec

from banger.errors import WrongState
from banger.events import vocabulary as ev
from banger.model import VmSpec
from banger.tasks import lost
from banger.tasks.context import Ctx
from banger.tasks.make import forget_unfinished
from banger.tasks.network import SET_NAT
from banger.tasks.pipeline import Step

COPY_S = 1800.0


def _grow(ctx: Ctx) -> dict[str, Any]:
    """Have a larger disk take the place of the one there is."""
    if ctx.vm.process is not None:  # it was started since this was asked for
        raise WrongState(f"The disk of {ctx.vm.spec.name} is in use.")
    _forget_half_grown(ctx)
    ctx.world.disks.grow(ctx.paths.work, ctx.args["disk_mib"])
    return {"disk_mib": ctx.args["disk_mib"]}


def _forget_half_grown(ctx: Ctx) -> None:
    forget_unfinished(ctx.paths.work)


def _asked(ctx: Ctx) -> VmSpec:
    return msgspec.structs.replace(ctx.vm.spec, **ctx.args)


def _note(ctx: Ctx) -> None:
    _write(ctx, _asked(ctx))


def _note_as_it_was(ctx: Ctx) -> None:
    _write(ctx, ctx.vm.spec)


def _write(ctx: Ctx, spec: VmSpec) -> None:
    record = lost.read(ctx.paths)
    if record is not None:  # else it was never made whole
        lost.write(ctx.paths, msgspec.structs.replace(record, spec=spec))


def _record(ctx: Ctx) -> None:
    ctx.emit(ctx.vm_id, ev.VmChanged(spec=_asked(ctx)))


GROW = Step(
    name="disk",
    title="larger disk",
    run=_grow,
    undo=_forget_half_grown,  # one that has grown whole holds what it held: it is the right one for both
    deadline_s=COPY_S,
)
NOTE = Step(name="note", title="note beside its disks", run=_note, undo=_note_as_it_was)
RECORD = Step(
    name="record",
    title="what it is asked to be",
    run=_record,
    why_no_undo="it is the end: nothing comes after it that could fail",
)

SET = (SET_NAT, GROW, NOTE, RECORD)


def not_for(changes: dict[str, Any]) -> frozenset[str]:
    """Give the names of the steps that these changes have no use for."""
    asked = {SET_NAT.name: "nat" in changes, GROW.name: "disk_mib" in changes}
    return frozenset(name for name, wanted in asked.items() if not wanted)
