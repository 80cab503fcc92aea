"""VMs that the log does not know, found again by what lies beside their disks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import msgspec

from banger.config import Dirs, VmPaths
from banger.errors import NotFound
from banger.events import queries
from banger.events import vocabulary as ev
from banger.events.log import EventLog
from banger.model import Resource, Value, VmSpec
from banger.tasks.context import Ctx
from banger.tasks.pipeline import Pipeline, Step
from banger.vmm.driver import Running


class Record(Value):
    """What is written beside a VM's disks: enough to take it back without the log."""

    vm: str
    spec: VmSpec
    image_digest: str
    kernel_digest: str


def write(paths: VmPaths, record: Record) -> None:
    """Make it so that the record is there, whole."""
    temporary = paths.record.with_name(f".{paths.record.name}.new")
    temporary.write_bytes(msgspec.json.encode(record))
    temporary.replace(paths.record)


def read(paths: VmPaths) -> Record | None:
    """Read a VM's record; None when there is none, or it is no record of this VM."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        record = msgspec.json.decode(paths.record.read_bytes(), type=Record)
        return record if record.vm == paths.vm else None
    return None


def find(log: EventLog, dirs: Dirs) -> Iterator[Record]:
    """Find the VMs whose disks are whole and of which the log has never heard."""
    known = queries.known_vms(log)
    for directory in sorted((dirs.state / "vms").iterdir()):
        paths = dirs.vm(directory.name)
        record = None if paths.vm in known else read(paths)
        if record is not None and paths.overlay.exists() and paths.work.exists():
            yield record


def _there(ctx: Ctx) -> list[Resource]:
    """List what there is of the VM."""
    paths = ctx.paths
    found = [Resource(kind="name", id=ctx.vm.spec.name), Resource(kind="directory", id=str(paths.directory))]
    files = (paths.overlay, paths.work, paths.initrd)
    found += [Resource(kind="file", id=str(path)) for path in files if path.exists()]
    sockets = (paths.qmp, paths.agent)
    found += [Resource(kind="socket", id=str(path)) for path in sockets if path.exists()]
    vmm = _running(ctx)
    if vmm is not None:
        found.append(Resource(kind="process", id=ctx.vm_id))
        found += [Resource(kind="port", id=str(vmm.ssh_port))] if vmm.ssh_port else []
    return found


def _gone(ctx: Ctx) -> list[Resource]:
    """List what was there at the first attempt and is not any more: the host was rebooted since."""
    there = _there(ctx)
    return [resource for resource in ctx.held("process", "socket", "port") if resource not in there]


def _running(ctx: Ctx) -> Running | None:
    return next((vmm for vmm in ctx.world.running(ctx.dirs.runtime) if vmm.vm == ctx.vm_id), None)


def _take_back(ctx: Ctx) -> dict[str, Any]:
    """Write down what the VM is made of and, if its VMM runs, that it does."""
    record = read(ctx.paths)
    if record is None:
        raise NotFound(f"There is no record of a VM in {ctx.paths.directory}.")
    digests = {"image_digest": record.image_digest, "kernel_digest": record.kernel_digest}
    ctx.emit(ctx.vm_id, ev.VmCreated(**digests))
    vmm = _running(ctx)
    if vmm is not None and vmm.ssh_port is not None:
        started = ev.VmStarted(
            process=vmm.process, ssh_port=vmm.ssh_port, accelerator=ctx.world.accelerator.name
        )
        ctx.emit(ctx.vm_id, started)
        ctx.emit(ctx.vm_id, ev.VmReady(seconds=round(ctx.world.vmm.age_s(vmm.process), 3)))
    return digests


RECOVER = Pipeline(
    "vm.recover",
    (
        Step(
            name="take-back",
            title="take back what is there",
            run=_take_back,
            why_no_undo="it only writes down what is there; a VM's disks are never undone",
            forward_only=True,
            acquires=_there,
            releases=_gone,
        ),
    ),
)
PIPELINES = (RECOVER,)
