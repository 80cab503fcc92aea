"""The life of a VM: what is done to it, in which order, and how each step is undone."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from typing import Any

from banger import proc
from banger.errors import BangerError, NotFound, WrongState
from banger.events import queries
from banger.events import vocabulary as ev
from banger.events.fold import Vm
from banger.guest import agent, initrd, keys, ssh
from banger.images import debian, store
from banger.images import kernel as kernels
from banger.model import Artifact, Process, Resource
from banger.network import user
from banger.storage import ext4
from banger.tasks import artifacts
from banger.tasks.context import Ctx
from banger.tasks.pipeline import Finish, Pipeline, Step
from banger.vmm.driver import Disk, Machine

POWER_OFF_S = 10.0
"""How long a guest gets to switch itself off, per way of asking."""

# -- what a VM is made of -------------------------------------------------------------------


def _use_image(ctx: Ctx) -> dict[str, Any]:
    """Find the image by name when the VM is made, by digest ever after."""
    return {"image_digest": artifacts.image(ctx, ctx.vm.spec.image).digest}


def _use_kernel(ctx: Ctx) -> dict[str, Any]:
    return {"kernel_digest": artifacts.kernel(ctx, ctx.vm.spec.kernel).digest}


def _directory(ctx: Ctx) -> list[Resource]:
    return [Resource(kind="directory", id=str(ctx.paths.directory))]


def _make_directory(ctx: Ctx) -> None:
    ctx.paths.directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def _remove_directory(ctx: Ctx) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(ctx.paths.directory)


def _make_keys(ctx: Ctx) -> None:
    """Make the guest's host key here, so that it is known before the first connection."""
    paths = ctx.paths
    pem = keys.make_key_file(paths.host_key)
    paths.known_hosts.write_text(keys.known_hosts_line(ctx.vm_id, pem) + "\n", "ascii")
    keys.make_key_file(ctx.dirs.user_key)


def _disks(ctx: Ctx) -> list[Resource]:
    return [Resource(kind="file", id=str(path)) for path in (ctx.paths.overlay, ctx.paths.work)]


def _make_disks(ctx: Ctx) -> None:
    ext4.make(ctx.paths.overlay, ctx.config.overlay_mib, label="overlay")
    ext4.make(ctx.paths.work, ctx.vm.spec.disk_mib, label="work")
    facts = ctx.facts
    created = ev.VmCreated(image_digest=facts["image_digest"], kernel_digest=facts["kernel_digest"])
    ctx.emit(ctx.vm_id, created)


def _remove_disks(ctx: Ctx) -> None:
    ctx.paths.overlay.unlink(missing_ok=True)
    ctx.paths.work.unlink(missing_ok=True)


def _name(ctx: Ctx) -> list[Resource]:
    return [Resource(kind="name", id=ctx.vm.spec.name)]


def _free_name(ctx: Ctx) -> None:
    ctx.emit(ctx.vm_id, ev.VmDeleted())


# -- how it is started ----------------------------------------------------------------------


def _check_startable(ctx: Ctx) -> dict[str, Any]:
    vm = ctx.vm
    if vm.image_digest is None or vm.kernel_digest is None:
        raise WrongState(f"{vm.spec.name} was never made whole.", hint=f"banger vm delete {vm.spec.name}")
    if vm.state == "running" and vm.process is not None and proc.alive(vm.process):
        raise Finish
    for kind, digest in (("image", vm.image_digest), ("kernel", vm.kernel_digest)):
        if store.find(ctx.dirs.cache, kind, digest) is None:
            raise NotFound(
                f"The {kind} that {vm.spec.name} was made from is no longer in the cache.",
                hint=f"banger vm delete {vm.spec.name}",
            )
    return {"image_digest": vm.image_digest, "kernel_digest": vm.kernel_digest}


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
    initrd.write_initrd(base, paths.initrd, files)


def _remove_guest_files(ctx: Ctx) -> None:
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
    agent.wait_ready(
        ctx.paths.agent,
        ctx.config.ready_timeout_s,
        cancelled=ctx.cancelled,
        alive=lambda: process is not None and proc.alive(process),
        report=lambda: ctx.world.vmm.crash_report(ctx.paths),
    )
    seconds = 0.0 if process is None else round(proc.age_s(process), 3)
    ctx.emit(ctx.vm_id, ev.VmReady(seconds=seconds))
    return {"ready_seconds": seconds}


def _artifact(ctx: Ctx, kind: str) -> Artifact:
    digest = ctx.facts[f"{kind}_digest"]
    found = store.find(ctx.dirs.cache, kind, digest)
    if found is None:
        raise NotFound(f"The {kind} {digest[:12]} is no longer in the cache.")
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
            Disk(serial="base", path=debian.rootfs_path(_artifact(ctx, "image")), read_only=True),
            Disk(serial="up", path=paths.overlay, read_only=False),
            Disk(serial="work", path=paths.work, read_only=False),
        ),
        ssh_port=ctx.facts["ssh_port"],
        mac=user.mac(ctx.vm_id),
        nat=spec.nat,
        paths=paths,
    )


MAKE = (
    Step(
        name="name",
        title="reserve the name",
        run=lambda _: None,  # the request itself reserved it
        undo=_free_name,
        acquires=_name,
    ),
    Step(
        name="image",
        title="image",
        run=_use_image,
        why_no_undo="it only looks; an image that had to be built stays for the next VM",
    ),
    Step(
        name="kernel",
        title="kernel",
        run=_use_kernel,
        why_no_undo="it only looks; a kernel that had to be unpacked stays for the next VM",
    ),
    Step(
        name="directory",
        title="directory",
        run=_make_directory,
        undo=_remove_directory,
        acquires=_directory,
    ),
    Step(
        name="keys",
        title="SSH host key",
        run=_make_keys,
        why_no_undo="it goes with the directory; the user's own key pair stays",
    ),
    Step(name="disks", title="disks", run=_make_disks, undo=_remove_disks, acquires=_disks),
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

# -- how it is stopped and deleted ----------------------------------------------------------


def _runtime(ctx: Ctx) -> list[Resource]:
    """List what a VM holds only while it runs."""
    files = [r for r in ctx.held("file") if r.id == str(ctx.paths.initrd)]
    return [*ctx.held("process", "socket", "port"), *files]


def _check_running(ctx: Ctx) -> None:
    vm = ctx.vm
    if vm.state in ("stopped", "creating") and not ctx.world.vmm.find(ctx.vm_id):
        raise Finish


def _shut_down(ctx: Ctx) -> dict[str, Any]:
    """Ask nicely over SSH, then press the power button, then SIGKILL."""
    how = _power_off(ctx, ctx.vm)
    _clean_up(ctx)
    ctx.emit(ctx.vm_id, ev.VmStopped(reason=f"stopped ({how})"))
    return {"how": how}


def _power_off(ctx: Ctx, vm: Vm) -> str:
    found = ctx.world.vmm.find(ctx.vm_id)
    if not found:
        return "was not running"
    if vm.state == "running" and vm.ssh_port is not None:
        with contextlib.suppress(BangerError):
            ssh.power_off(ssh.Target(vm=vm.id, port=vm.ssh_port, paths=ctx.paths, key=ctx.dirs.user_key))
            if proc.wait_gone(found[0], POWER_OFF_S):
                return "power-off over SSH"
    with contextlib.suppress(BangerError):
        ctx.world.vmm.power_button(ctx.paths)
        if proc.wait_gone(found[0], POWER_OFF_S):
            return "power button"
    return "killed: it did not switch itself off"


def _clean_up(ctx: Ctx) -> None:
    ctx.world.vmm.destroy(ctx.vm_id, ctx.paths)
    ctx.paths.initrd.unlink(missing_ok=True)


def _kill(ctx: Ctx) -> None:
    _clean_up(ctx)
    ctx.emit(ctx.vm_id, ev.VmStopped(reason="killed"))


def _bury(ctx: Ctx) -> None:
    """Release what a VMM held that died by itself, and keep what it said last."""
    vm = ctx.vm
    if vm.process is not None and proc.alive(vm.process):
        raise Finish
    report = ctx.world.vmm.crash_report(ctx.paths)
    _clean_up(ctx)
    ctx.emit(ctx.vm_id, ev.VmStopped(reason=report or "its VMM ended by itself"))


def _halt(ctx: Ctx) -> None:
    if queries.vm(ctx.log, ctx.vm_id) is None:
        raise Finish
    _clean_up(ctx)


def _files(ctx: Ctx) -> list[Resource]:
    return ctx.held("directory", "file")


def _names(ctx: Ctx) -> list[Resource]:
    return ctx.held("name")


CHECK_RUNNING = Step(
    name="check",
    title="check",
    run=_check_running,
    why_no_undo="it only looks",
)
SHUT_DOWN = Step(
    name="shut-down",
    title="guest shuts down",
    run=_shut_down,
    why_no_undo="a guest that is switched off cannot be switched back on where it was",
    forward_only=True,
    releases=_runtime,
    deadline_s=90.0,
)

CREATE = Pipeline("vm.create", MAKE + START)
ONLY_MAKE = frozenset(step.name for step in START)
"""The steps to leave out of CREATE for a VM that is not started yet."""

PIPELINES = (
    CREATE,
    Pipeline("vm.start", (CHECK_START, *START)),
    Pipeline("vm.stop", (CHECK_RUNNING, SHUT_DOWN)),
    Pipeline(
        "vm.restart",
        # If the start fails it is undone, and the VM is what its state says: stopped.
        (replace(SHUT_DOWN, forward_only=False), CHECK_START, *START),
    ),
    Pipeline(
        "vm.kill",
        (
            CHECK_RUNNING,
            Step(
                name="kill",
                title="kill the VMM",
                run=_kill,
                why_no_undo="what is killed stays killed",
                forward_only=True,
                releases=_runtime,
            ),
        ),
    ),
    Pipeline(
        "vm.bury",
        (
            Step(
                name="bury",
                title="release what a dead VMM held",
                run=_bury,
                why_no_undo="the VMM is gone already",
                forward_only=True,
                releases=_runtime,
            ),
        ),
    ),
    Pipeline(
        "vm.delete",
        (
            Step(
                name="halt",
                title="end the VMM",
                run=_halt,
                why_no_undo="what is killed stays killed",
                forward_only=True,
                releases=_runtime,
            ),
            Step(
                name="files",
                title="remove its files",
                run=_remove_directory,
                why_no_undo="deleted files do not come back",
                forward_only=True,
                releases=_files,
            ),
            Step(
                name="name",
                title="free the name",
                run=_free_name,
                why_no_undo="the VM is gone",
                forward_only=True,
                releases=_names,
            ),
        ),
    ),
)
