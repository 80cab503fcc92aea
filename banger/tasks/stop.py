"""Stop a VM, kill it, delete it, or release what it held when its VMM died by itself."""

from __future__ import annotations

import contextlib
from typing import Any

from banger.errors import BangerError
from banger.events import queries
from banger.events import vocabulary as ev
from banger.events.fold import Vm
from banger.guest import ssh
from banger.model import Resource
from banger.network import user
from banger.tasks import make, network, snapshot
from banger.tasks.context import Ctx
from banger.tasks.pipeline import Finish, Step

POWER_OFF_S = 10.0
"""How long a guest gets to switch itself off, per way of asking."""


def _runtime(ctx: Ctx) -> list[Resource]:
    """List what a VM holds only while it runs."""
    files = [r for r in ctx.held("file") if r.id == str(ctx.paths.initrd)]
    return [*ctx.held("process", "socket", "port", "address", "jail"), *files]


def _check_running(ctx: Ctx) -> None:
    vm = ctx.vm
    if vm.state in ("stopped", "creating") and not ctx.vmm.find(ctx.vm_id):
        raise Finish


def _shut_down(ctx: Ctx) -> dict[str, Any]:
    """Ask nicely over SSH, then press the power button, then SIGKILL."""
    how = _power_off(ctx, ctx.vm)
    _clean_up(ctx)
    _stopped(ctx, f"stopped ({how})")
    return {"how": how}


def _power_off(ctx: Ctx, vm: Vm) -> str:
    found = ctx.vmm.find(ctx.vm_id)
    if not found:
        return "was not running"
    if vm.state == "running" and vm.ssh_port is not None:
        with contextlib.suppress(BangerError):
            ctx.world.shell.power_off(
                ssh.Target(
                    vm=vm.id,
                    host=vm.address or user.HOST_ADDRESS,
                    port=vm.ssh_port,
                    paths=ctx.paths,
                    key=ctx.dirs.user_key,
                )
            )
            if ctx.vmm.wait_gone(found[0], POWER_OFF_S):
                return "power-off over SSH"
    with contextlib.suppress(BangerError):
        ctx.vmm.power_button(ctx.paths)
        if ctx.vmm.wait_gone(found[0], POWER_OFF_S):
            return "power button"
    return "killed: it did not switch itself off"


def _clean_up(ctx: Ctx) -> None:
    ctx.vmm.destroy(ctx.vm_id, ctx.paths)
    ctx.paths.initrd.unlink(missing_ok=True)


def _stopped(ctx: Ctx, reason: str) -> None:
    """Record that the VM is stopped, and that its root disk is lost, should it be."""
    told = (reason, snapshot.loss(ctx))
    ctx.emit(ctx.vm_id, ev.VmStopped(reason="; ".join(text for text in told if text)))


def _kill(ctx: Ctx) -> None:
    _clean_up(ctx)
    _stopped(ctx, "killed")


def _bury(ctx: Ctx) -> None:
    """Release what a VMM held that died by itself, and keep what it said last."""
    vm = ctx.vm
    if vm.process is not None and ctx.vmm.alive(vm.process):
        raise Finish
    said = [line.strip() for line in ctx.vmm.crash_report(ctx.paths).splitlines() if line.strip()]
    _clean_up(ctx)
    last = f"; the last it said: {said[-1][:200]}" if said else ""
    _stopped(ctx, f"its VMM ended by itself{last}")


def _halt(ctx: Ctx) -> None:
    vm = queries.vm(ctx.log, ctx.vm_id)
    if vm is None:
        raise Finish
    _clean_up(ctx)
    if vm.process is not None:
        ctx.emit(ctx.vm_id, ev.VmStopped(reason="it is being deleted"))


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
    attempts=network.ROOT_ATTEMPTS,
    deadline_s=90.0,
)

KILL = Step(
    name="kill",
    title="kill the VMM",
    run=_kill,
    why_no_undo="what is killed stays killed",
    forward_only=True,
    releases=_runtime,
    attempts=network.ROOT_ATTEMPTS,
)
BURY = Step(
    name="bury",
    title="release what a dead VMM held",
    run=_bury,
    why_no_undo="the VMM is gone already",
    forward_only=True,
    releases=_runtime,
    attempts=network.ROOT_ATTEMPTS,
)

DELETE = (
    Step(
        name="halt",
        title="end the VMM",
        run=_halt,
        why_no_undo="what is killed stays killed",
        forward_only=True,
        releases=_runtime,
        attempts=network.ROOT_ATTEMPTS,
    ),
    network.RELEASE,
    snapshot.RELEASE,
    Step(
        name="files",
        title="remove its files",
        run=make.remove_directory,
        why_no_undo="deleted files do not come back",
        forward_only=True,
        releases=_files,
    ),
    Step(
        name="name",
        title="free the name",
        run=make.free_name,
        why_no_undo="the VM is gone",
        forward_only=True,
        releases=_names,
    ),
)
