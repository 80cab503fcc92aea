"""Start a VM: a port, the guest's own files, the VMM, and the guest's word that it is ready."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from banger.errors import NotFound, WrongState
from banger.events import queries
from banger.events import vocabulary as ev
from banger.guest import initrd, keys, ssh
from banger.helper import names
from banger.images import base, store
from banger.images import kernel as kernels
from banger.model import Process, Resource
from banger.network import user
from banger.tasks import network, snapshot, supply
from banger.tasks.context import Ctx
from banger.tasks.make import forget_unfinished
from banger.tasks.pipeline import Finish, Step
from banger.vmm.driver import ROOT, Disk, Machine


def _check_startable(ctx: Ctx) -> dict[str, Any]:
    vm = ctx.vm
    if vm.image_digest is None or vm.kernel_digest is None:
        raise WrongState(f"{vm.spec.name} was never made whole.", hint=f"`banger vm delete {vm.spec.name}`")
    if vm.state == "running" and vm.process is not None and ctx.vmm.alive(vm.process):
        raise Finish
    for kind, digest in (("image", vm.image_digest), ("kernel", vm.kernel_digest)):
        if store.find(ctx.dirs.cache, kind, digest) is None:
            raise NotFound(
                f"The {kind} that {vm.spec.name} was made from is no longer in the cache.",
                hint=f"`banger vm delete {vm.spec.name}`",
            )
    snapshot.check_whole(ctx)
    mended = _mend_disks(ctx)
    return {"image_digest": vm.image_digest, "kernel_digest": vm.kernel_digest, **mended}


def _mend_disks(ctx: Ctx) -> dict[str, Any]:
    """Check disks that were used before, while nobody uses them; tell which had to be mended.

    A root disk that the host makes is checked when it is made.
    """
    if ctx.vmm.find(ctx.vm_id):
        return {}
    paths = ctx.paths
    used = (paths.work,) if ctx.vm.spec.root_disk == "snapshot" else (paths.overlay, paths.work)
    mended = [path.name for path in used if ctx.world.disks.check(path)]
    return {"mended": mended} if mended else {}


def _guest_files(ctx: Ctx) -> list[Resource]:
    return [Resource(kind="file", id=str(ctx.paths.initrd))]


def _write_guest_files(ctx: Ctx) -> None:
    paths, spec = ctx.paths, ctx.vm.spec
    _, base = kernels.kernel_paths(supply.in_cache(ctx, "kernel"))
    place = network.place(ctx)
    files = initrd.GuestFiles(
        hostname=spec.name,
        authorized_keys=keys.public_line(ctx.dirs.user_key.read_bytes()) + "\n",
        host_key_pem=paths.host_key.read_bytes(),
        address=place.address,
        gateway=place.gateway,
        nameserver=place.nameserver,
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


def _jail(ctx: Ctx) -> list[Resource]:
    return [Resource(kind="jail", id=names.jail(os.getuid(), ctx.vm_id))]


def _launch(ctx: Ctx) -> dict[str, Any]:
    process = ctx.vmm.launch(_machine(ctx))
    _started(ctx, process)
    return {"pid": process.pid, "start_ticks": process.start_ticks}


def _started(ctx: Ctx, process: Process) -> None:
    started = ev.VmStarted(
        process=process,
        ssh_port=ctx.facts["ssh_port"],
        accelerator="kvm" if ctx.held("jail") else ctx.world.accelerator.name,
        address=ctx.facts.get("address"),
    )
    ctx.emit(ctx.vm_id, started)


def _destroy(ctx: Ctx) -> None:
    ctx.vmm.destroy(ctx.vm_id, ctx.paths)
    if queries.vm(ctx.log, ctx.vm_id) is not None:
        ctx.emit(ctx.vm_id, ev.VmStopped(reason="its start was undone"))


def _wait_ready(ctx: Ctx) -> dict[str, Any]:
    """Wait for the guest's word. A boot that hangs under emulation is tried once more.

    A guest in a jail is heard at its address: to connect to its agent is a request to root each time.
    """
    vmm = ctx.vmm
    if ctx.attempt > 1:
        vmm.destroy(ctx.vm_id, ctx.paths)
        _started(ctx, vmm.launch(_machine(ctx)))
    found = vmm.find(ctx.vm_id)
    process = found[0] if found else None
    waits: dict[str, Any] = {
        "cancelled": ctx.cancelled,
        "alive": lambda: process is not None and vmm.alive(process),
        "report": lambda: vmm.crash_report(ctx.paths),
    }
    if ctx.held("jail"):
        ctx.world.shell.wait_ready(_target(ctx), ctx.config.ready_timeout_s, **waits)
        vmm.crash_report(ctx.paths)  # `vm logs` has the boot from here on: root keeps the console
    else:
        ctx.world.agent.wait_ready(ctx.paths.agent, ctx.config.ready_timeout_s, **waits)
    seconds = 0.0 if process is None else round(vmm.age_s(process), 3)
    ctx.emit(ctx.vm_id, ev.VmReady(seconds=seconds))
    return {"ready_seconds": seconds}


def _target(ctx: Ctx) -> ssh.Target:
    return ssh.Target(
        vm=ctx.vm_id,
        host=ctx.facts["address"],
        port=ctx.facts["ssh_port"],
        paths=ctx.paths,
        key=ctx.dirs.user_key,
    )


def _machine(ctx: Ctx) -> Machine:
    paths, spec = ctx.paths, ctx.vm.spec
    vmlinuz, _ = kernels.kernel_paths(supply.in_cache(ctx, "kernel"))
    return Machine(
        vm=ctx.vm_id,
        op=ctx.op.id,
        name=spec.name,
        vcpu=spec.vcpu,
        memory_mib=spec.memory_mib,
        kernel=vmlinuz,
        initrd=paths.initrd,
        words=initrd.KERNEL_WORDS,
        disks=(*_root(ctx), Disk(serial="work", path=paths.work)),
        ssh_port=ctx.facts["ssh_port"],
        mac=user.mac(ctx.vm_id),
        nat=spec.nat,
        paths=paths,
        tap=ctx.facts.get("tap"),
        address=ctx.facts.get("address"),
    )


def _root(ctx: Ctx) -> tuple[Disk, ...]:
    """Give what the guest's root is made of, as its initrd (assets/init) knows it."""
    if "root_disk" in ctx.facts:
        return (Disk(serial=ROOT, path=Path(ctx.facts["root_disk"])),)
    image = base.path_of(supply.in_cache(ctx, "image"))
    return Disk(serial="base", path=image, read_only=True), Disk(serial="up", path=ctx.paths.overlay)


CHECK_START = Step(
    name="check",
    title="check",
    run=_check_startable,
    why_no_undo="it only looks",
)

VMM = Step(name="vmm", title="start the VMM", run=_launch, undo=_destroy, acquires=_vmm)
JAIL = Step(
    name="jail",
    title="start Firecracker in a jail",
    run=_launch,
    undo=_destroy,
    acquires=_jail,
    attempts=network.ROOT_ATTEMPTS,
    deadline_s=120.0,
    pool="root",
)

START = (
    network.PORT,
    network.ADDRESS,
    network.TAP,
    network.NAMES,
    network.NAT,
    snapshot.SNAPSHOT,
    Step(
        name="guest-files",
        title="guest files",
        run=_write_guest_files,
        undo=_remove_guest_files,
        acquires=_guest_files,
    ),
    VMM,
    JAIL,
    Step(
        name="ready",
        title="guest boots",
        run=_wait_ready,
        why_no_undo="the guest's readiness goes with its VMM",
        attempts=2,
        deadline_s=300.0,
    ),
)
