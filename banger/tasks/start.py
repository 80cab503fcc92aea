"""Start a VM: a port, the guest's own files, the VMM, and the guest's word that it is ready."""

from __future__ import annotations

from typing import Any

from banger.errors import NotFound, WrongState
from banger.events import queries
from banger.events import vocabulary as ev
from banger.guest import initrd, keys
from banger.images import base, local, store
from banger.images import kernel as kernels
from banger.model import Artifact, Process, Resource
from banger.network import user
from banger.tasks.context import Ctx
from banger.tasks.make import forget_unfinished
from banger.tasks.pipeline import Finish, Step
from banger.vmm.driver import Disk, Machine


def _check_startable(ctx: Ctx) -> dict[str, Any]:
    vm = ctx.vm
    if vm.image_digest is None or vm.kernel_digest is None:
        raise WrongState(f"{vm.spec.name} was never made whole.", hint=f"`banger vm delete {vm.spec.name}`")
    if vm.state == "running" and vm.process is not None and ctx.world.vmm.alive(vm.process):
        raise Finish
    for kind, digest in (("image", vm.image_digest), ("kernel", vm.kernel_digest)):
        if store.find(ctx.dirs.cache, kind, digest) is None:
            raise NotFound(
                f"The {kind} that {vm.spec.name} was made from is no longer in the cache.",
                hint=f"`banger vm delete {vm.spec.name}`",
            )
    mended = _mend_disks(ctx)
    return {"image_digest": vm.image_digest, "kernel_digest": vm.kernel_digest, **mended}


def _mend_disks(ctx: Ctx) -> dict[str, Any]:
    """Check disks that were used before, while nobody uses them; tell which had to be mended."""
    if ctx.world.vmm.find(ctx.vm_id):
        return {}
    mended = [path.name for path in (ctx.paths.overlay, ctx.paths.work) if ctx.world.disks.check(path)]
    return {"mended": mended} if mended else {}


def _choose_port(ctx: Ctx) -> list[Resource]:
    """Allocate inside the append's transaction: no two operations get the same port."""
    if (have := ctx.acquired("port")) is not None:
        return [have]
    taken = {int(port) for port in queries.resource_ids(ctx.log, "port")}
    return [Resource(kind="port", id=str(user.pick_port(taken)))]


def _use_port(ctx: Ctx) -> dict[str, Any]:
    port = ctx.acquired("port")
    assert port is not None
    return {"ssh_port": int(port.id)}


def _nothing_to_undo(_: Ctx) -> None:
    """Do nothing: the port is a line in the ledger; the VMM that listened on it has its own undo."""


def _guest_files(ctx: Ctx) -> list[Resource]:
    return [Resource(kind="file", id=str(ctx.paths.initrd))]


def _write_guest_files(ctx: Ctx) -> None:
    paths, spec = ctx.paths, ctx.vm.spec
    _, base = kernels.kernel_paths(_artifact(ctx, "kernel"))
    files = initrd.GuestFiles(
        hostname=spec.name,
        authorized_keys=keys.public_line(ctx.dirs.user_key.read_bytes()) + "\n",
        host_key_pem=paths.host_key.read_bytes(),
        address=f"{user.GUEST_ADDRESS}/{user.PREFIX_LENGTH}",
        gateway=user.GATEWAY,
        nameserver=user.DNS_SERVER,
    )
    forget_unfinished(paths.initrd)
    initrd.write_initrd(base, paths.initrd, files)


def _remove_guest_files(ctx: Ctx) -> None:
    forget_unfinished(ctx.paths.initrd)
    ctx.paths.initrd.unlink(missing_ok=True)


def _vmm(ctx: Ctx) -> list[Resource]:
    paths = ctx.paths
    return [
        Resource(kind="process", id=ctx.vm_id),
        Resource(kind="socket", id=str(paths.qmp)),
        Resource(kind="socket", id=str(paths.agent)),
    ]


def _launch(ctx: Ctx) -> dict[str, Any]:
    process = ctx.world.vmm.launch(_machine(ctx))
    _started(ctx, process)
    return {"pid": process.pid, "start_ticks": process.start_ticks}


def _started(ctx: Ctx, process: Process) -> None:
    started = ev.VmStarted(
        process=process, ssh_port=ctx.facts["ssh_port"], accelerator=ctx.world.accelerator.name
    )
    ctx.emit(ctx.vm_id, started)


def _destroy(ctx: Ctx) -> None:
    ctx.world.vmm.destroy(ctx.vm_id, ctx.paths)
    if queries.vm(ctx.log, ctx.vm_id) is not None:
        ctx.emit(ctx.vm_id, ev.VmStopped(reason="its start was undone"))


def _wait_ready(ctx: Ctx) -> dict[str, Any]:
    """Wait for the guest's word. A boot that hangs under emulation is tried once more."""
    if ctx.attempt > 1:
        ctx.world.vmm.destroy(ctx.vm_id, ctx.paths)
        _started(ctx, ctx.world.vmm.launch(_machine(ctx)))
    found = ctx.world.vmm.find(ctx.vm_id)
    process = found[0] if found else None
    ctx.world.agent.wait_ready(
        ctx.paths.agent,
        ctx.config.ready_timeout_s,
        cancelled=ctx.cancelled,
        alive=lambda: process is not None and ctx.world.vmm.alive(process),
        report=lambda: ctx.world.vmm.crash_report(ctx.paths),
    )
    seconds = 0.0 if process is None else round(ctx.world.vmm.age_s(process), 3)
    ctx.emit(ctx.vm_id, ev.VmReady(seconds=seconds))
    return {"ready_seconds": seconds}


def _artifact(ctx: Ctx, kind: str) -> Artifact:
    digest = ctx.facts[f"{kind}_digest"]
    found = store.find(ctx.dirs.cache, kind, digest)
    if found is None:
        raise NotFound(f"The {kind} {digest[:12]} is no longer in the cache.")
    local.check(found)
    return found


def _machine(ctx: Ctx) -> Machine:
    paths, spec = ctx.paths, ctx.vm.spec
    vmlinuz, _ = kernels.kernel_paths(_artifact(ctx, "kernel"))
    return Machine(
        vm=ctx.vm_id,
        op=ctx.op.id,
        name=spec.name,
        vcpu=spec.vcpu,
        memory_mib=spec.memory_mib,
        kernel=vmlinuz,
        initrd=paths.initrd,
        words=initrd.KERNEL_WORDS,
        disks=(
            Disk(serial="base", path=base.path_of(_artifact(ctx, "image")), read_only=True),
            Disk(serial="up", path=paths.overlay, read_only=False),
            Disk(serial="work", path=paths.work, read_only=False),
        ),
        ssh_port=ctx.facts["ssh_port"],
        mac=user.mac(ctx.vm_id),
        nat=spec.nat,
        paths=paths,
    )


CHECK_START = Step(
    name="check",
    title="check",
    run=_check_startable,
    why_no_undo="it only looks",
)

START = (
    Step(name="port", title="SSH port", run=_use_port, undo=_nothing_to_undo, acquires=_choose_port),
    Step(
        name="guest-files",
        title="guest files",
        run=_write_guest_files,
        undo=_remove_guest_files,
        acquires=_guest_files,
    ),
    Step(name="vmm", title="start the VMM", run=_launch, undo=_destroy, acquires=_vmm),
    Step(
        name="ready",
        title="guest boots",
        run=_wait_ready,
        why_no_undo="the guest's readiness goes with its VMM",
        attempts=2,
        deadline_s=300.0,
    ),
)
