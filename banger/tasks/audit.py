"""Compare the ledger with the host: what nobody owns, what is owned and not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from banger import proc
from banger.config import Dirs
from banger.events import queries
from banger.events.log import EventLog
from banger.model import Resource, Value
from banger.tasks.context import Ctx
from banger.tasks.pipeline import Pipeline, Step
from banger.vmm.driver import MARK_VM

_SOCKETS = (".qmp", ".agent")


class Finding(Value):
    """A resource that is on one side only, and who acquired it last, if the log knows."""

    kind: str
    id: str
    vm: str | None
    op: str | None
    time_us: int | None


class Audit(Value):
    """How often something was acquired and released since the log began, and what does not add up.

    `leaked` is on the host and in nobody's ledger; `missing` is in the ledger and not on the host.
    What an operation works on at this moment is left out: it may be on either side.
    """

    acquired: int
    released: int
    held: int
    leaked: tuple[Finding, ...]
    missing: tuple[Finding, ...]


def audit(log: EventLog, dirs: Dirs) -> Audit:
    """Look at the host and at the ledger. Images and kernels are the cache's affair and left out."""
    leaked, missing = _compare(log, dirs)
    if leaked or missing:
        # An operation may have ended between the look at the host and the look at the ledger.
        again = _compare(log, dirs)
        leaked, missing = leaked & again[0], missing & again[1]
    acquired, released, held = queries.ledger_counts(log)
    return Audit(
        acquired=acquired,
        released=released,
        held=held,
        leaked=tuple(_finding(log, each) for each in sorted(leaked, key=_key)),
        missing=tuple(_finding(log, each) for each in sorted(missing, key=_key)),
    )


def _compare(log: EventLog, dirs: Dirs) -> tuple[set[Resource], set[Resource]]:
    busy = set(queries.active_ops(log))
    real = {resource for resource in on_host(dirs) if _vm_of(resource) not in busy}
    ours = {
        Resource(kind=held.kind, id=held.id)  # type: ignore[arg-type]  # the ledger's kinds are Resource's
        for held in queries.resources(log)
        if held.vm not in busy and held.kind in ("directory", "file", "process", "socket")
    }
    return real - ours, ours - real


def on_host(dirs: Dirs) -> Iterator[Resource]:
    """List what there is on the host that only banger makes, for this owner."""
    for directory in (dirs.state / "vms").iterdir():
        yield Resource(kind="directory", id=str(directory))
        paths = dirs.vm(directory.name)
        for file in (paths.overlay, paths.work, paths.initrd):
            if file.exists():
                yield Resource(kind="file", id=str(file))
    for path in dirs.runtime.iterdir():
        if path.suffix in _SOCKETS:
            yield Resource(kind="socket", id=str(path))
    for process, vm in proc.marked(MARK_VM):
        # Other owners', and those of banger's tests, live below other directories.
        if str(dirs.runtime) in proc.words(process):
            yield Resource(kind="process", id=vm)


def _vm_of(resource: Resource) -> str:
    """Read the id of the VM from what is derived from it."""
    if resource.kind == "process":
        return resource.id
    path = Path(resource.id)
    if resource.kind == "socket":
        return path.stem
    return path.name if resource.kind == "directory" else path.parent.name


def _key(resource: Resource) -> tuple[str, str]:
    return resource.kind, resource.id


def _finding(log: EventLog, resource: Resource) -> Finding:
    op, time_us = queries.last_acquired(log, resource) or (None, None)
    return Finding(kind=resource.kind, id=resource.id, vm=_vm_of(resource), op=op, time_us=time_us)


def _sweep(ctx: Ctx) -> dict[str, Any]:
    """Remove what the audit finds to be nobody's, and nothing else of a VM that is somebody's."""
    found = audit(ctx.log, ctx.dirs).leaked
    # A VMM before its sockets and files, a file before its directory.
    for each in sorted(found, key=lambda finding: _ORDER.index(finding.kind)):
        _remove(ctx, each)
    return {"removed": [f"{each.kind} {each.id}" for each in found]}


_ORDER = ("process", "socket", "file", "directory")


def _remove(ctx: Ctx, stray: Finding) -> None:
    match stray.kind:
        case "process":
            ctx.world.vmm.destroy(stray.id, ctx.dirs.vm(stray.id))
        case "directory":
            shutil.rmtree(stray.id, ignore_errors=True)
        case _:
            Path(stray.id).unlink(missing_ok=True)


SWEEP = Pipeline(
    "host.sweep",
    (
        Step(
            name="sweep",
            title="remove what is nobody's",
            run=_sweep,
            why_no_undo="what belongs to nobody is missed by nobody",
            forward_only=True,
        ),
    ),
)
PIPELINES = (SWEEP,)
