"""VMs that the log does not know, found again by what lies beside their disks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import msgspec

from banger import proc
from banger.config import Dirs, VmPaths
from banger.errors import HelperDown, NotFound
from banger.events import queries
from banger.events import vocabulary as ev
from banger.events.log import EventLog
from banger.model import Resource, Value, VmSpec
from banger.tasks import root
from banger.tasks.context import Ctx
from banger.tasks.pipeline import Pipeline, Step
from banger.tasks.root import Root
from banger.vmm import qemu
from banger.vmm.driver import Running

BY_ROOT = ("tap", "nat", "jail", "snapshot")
"""What root makes for a VM that is on a bridge, or has a root disk of its making."""


class Record(Value):
    """What is written beside a VM's disks: enough to take it back without the log.

    `base` is the uuid of what a root disk that the host makes has changes of.
    """

    vm: str
    spec: VmSpec
    image_digest: str
    kernel_digest: str
    base: str | None = None


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
        if record is None or not paths.work.exists():
            continue
        if paths.changes(record.spec.root_disk).exists():
            yield record


def is_running(record: Record, dirs: Dirs, asked: Root) -> bool:
    """Tell whether a VM has a VMM, as far as this host and root tell at the moment."""
    if any(vmm.vm == record.vm for vmm in qemu.running(dirs.runtime)):
        return True
    if record.spec.network == "user":
        return False
    with contextlib.suppress(HelperDown):
        return any(_has_process(made, record.vm) for made in root.made(asked))
    return False


def _has_process(made: root.Made, vm: str) -> bool:
    return made.vm == vm and made.process is not None and proc.alive(made.process)


def _there(ctx: Ctx) -> list[Resource]:
    """List what there is of the VM."""
    paths = ctx.paths
    found = [Resource(kind="name", id=ctx.vm.spec.name), Resource(kind="directory", id=str(paths.directory))]
    files = (paths.overlay, paths.cow, paths.work, paths.initrd)
    found += [Resource(kind="file", id=str(path)) for path in files if path.exists()]
    sockets = (paths.qmp, paths.agent)
    found += [Resource(kind="socket", id=str(path)) for path in sockets if path.exists()]
    vmm = _running(ctx)
    if vmm is not None:
        found.append(Resource(kind="process", id=ctx.vm_id))
        found += [Resource(kind="port", id=str(vmm.ssh_port))] if vmm.ssh_port else []
        found += [Resource(kind="address", id=vmm.address)] if vmm.address else []
    for each in _by_root(ctx):
        found.append(Resource(kind=each.kind, id=each.id))  # type: ignore[arg-type]  # one of BY_ROOT
        found += [Resource(kind="address", id=each.address)] if each.address else []
    return found


def _gone(ctx: Ctx) -> list[Resource]:
    """List what was there at the first attempt and is not any more: the host was rebooted since."""
    there = _there(ctx)
    runtime = ctx.held("process", "socket", "port", "address", *BY_ROOT)
    return [resource for resource in runtime if resource not in there]


def _by_root(ctx: Ctx) -> list[root.Made]:
    """List what root has made for the VM; one with neither a bridge nor a root disk of its has nothing."""
    if ctx.vm.spec.network == "user" and ctx.vm.spec.root_disk == "overlay":
        return []
    return [each for each in root.made(ctx.world.root) if each.vm == ctx.vm_id and each.kind in BY_ROOT]


def _running(ctx: Ctx) -> Running | None:
    return next((vmm for vmm in ctx.world.running(ctx.dirs.runtime) if vmm.vm == ctx.vm_id), None)


def _started(ctx: Ctx) -> Running | None:
    """Tell which VMM runs the VM, in a jail or without; the ledger has its jail by now."""
    if not ctx.held("jail"):
        return _running(ctx)
    for each in _by_root(ctx):
        if each.process is not None and ctx.vmm.alive(each.process):
            return Running(vm=ctx.vm_id, process=each.process, ssh_port=None, address=each.address)
    return None


def _take_back(ctx: Ctx) -> dict[str, Any]:
    """Write down what the VM is made of and, if its VMM runs, that it does."""
    record = read(ctx.paths)
    if record is None:
        raise NotFound(f"There is no record of a VM in {ctx.paths.directory}.")
    digests = {"image_digest": record.image_digest, "kernel_digest": record.kernel_digest}
    ctx.emit(ctx.vm_id, ev.VmCreated(**digests))
    vmm = _started(ctx)
    port = None if vmm is None else 22 if vmm.address else vmm.ssh_port
    if vmm is not None and port is not None:
        started = ev.VmStarted(
            process=vmm.process,
            ssh_port=port,
            accelerator="kvm" if ctx.held("jail") else ctx.world.accelerator.name,
            address=vmm.address,
        )
        ctx.emit(ctx.vm_id, started)
        ctx.emit(ctx.vm_id, ev.VmReady(seconds=round(ctx.vmm.age_s(vmm.process), 3)))
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
