"""What each method does: validate, append the request, answer from the projections."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from banger import __version__, proc
from banger import log as logging
from banger.config import Config, Dirs, capacity, dns_wanted, sizes
from banger.errors import BangerError, WrongState
from banger.events import queries, verify
from banger.events import vocabulary as ev
from banger.events.fold import Vm
from banger.events.log import EventLog
from banger.guest import ssh
from banger.model import Needs, Resource, VmSpec, check_artifact_name, check_vm_name
from banger.network import user
from banger.rpc import asking, limits, prune, settings, views
from banger.rpc import protocol as p
from banger.rpc.artifacts import Artifacts
from banger.rpc.names import random_name
from banger.rpc.operations import Operations
from banger.rpc.past import Past
from banger.rpc.uses import Uses
from banger.rpc.workspace import Workspaces
from banger.tasks import lost, monitor, network, snapshot
from banger.tasks.registry import pipelines
from banger.tasks.root import Pool, Root
from banger.tasks.settings import not_for
from banger.tasks.vm import ONLY_MAKE

FRESH_DISK_MIB = 64
"""What a new VM writes before its guest does anything: its disks are sparse."""
DESIRED = {
    "vm.start": "running",
    "vm.restart": "running",
    "vm.stop": "stopped",
    "vm.kill": "stopped",
    "vm.delete": "absent",
}


class Service:
    """The plain methods: one request, one answer."""

    def __init__(
        self,
        dirs: Dirs,
        config: Config,
        log: EventLog,
        *,
        since_us: int,
        stop: Callable[[], None],
        root: Root | None = None,
    ):
        self.dirs = dirs
        self.config = config
        self.log = log
        self.uses = Uses()
        self._since_us = since_us
        self._stop = stop
        self._pipelines = pipelines()
        self._root = root = root or Pool(Path(config.root_socket))
        self._shelf = Artifacts(log, dirs, config, self._pipelines)
        self._answers: dict[type[p.Request], Callable[[Any], dict[str, Any]]] = {
            p.Hello: self._hello,
            p.DaemonStatus: self._status,
            p.DaemonStop: self._daemon_stop,
            p.VmCreate: self._vm_create,
            p.VmStart: self._vm_change,
            p.VmStop: self._vm_change,
            p.VmRestart: self._vm_change,
            p.VmKill: self._vm_change,
            p.VmDelete: self._vm_delete,
            p.VmSet: self._vm_set,
            p.VmShow: self._vm_show,
            p.VmSsh: self._vm_ssh,
            p.VmTouch: self._vm_touch,
            p.VmPrune: lambda request: prune.prune(self, request),
            p.VmList: lambda _: {"vms": self.vm_views()},
            **self._shelf.answers,
            **Operations(log, dirs, self._pipelines, self._create, root).answers,
            **Past(log).answers,
            **Workspaces(log, dirs, self._pipelines, self.target).answers,
        }

    def answer(self, request: p.Request) -> dict[str, Any]:
        """Answer a plain method. Raises a BangerError."""
        return asking.repeated(self.log, request) or self._answers[type(request)](request)

    # -- the daemon --------------------------------------------------------------------------

    def _hello(self, _: p.Hello) -> dict[str, Any]:
        return {"version": __version__, "pid": os.getpid(), "read_only": self.log.read_only}

    def _status(self, _: p.DaemonStatus) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "version": __version__,
            "since_us": self._since_us,
            "workers": [{"pid": pid, "op": op} for pid, op in queries.running_workers(self.log).items()],
            "vms_running": sum(vm.state == "running" for vm in queries.vms(self.log)),
            "ops_active": queries.active_count(self.log),
            "state_dir": str(self.dirs.state),
            "read_only": self.log.read_only,
            "damage": verify.verify_log(self.log.path).why if self.log.read_only else None,
        }

    def _daemon_stop(self, _: p.DaemonStop) -> dict[str, Any]:
        self._stop()
        return {}

    # -- VMs ---------------------------------------------------------------------------------

    def vm_views(self) -> list[dict[str, Any]]:
        """Show every VM."""
        active, stuck = queries.active_ops(self.log), queries.stuck_vms(self.log)
        return [views.vm(vm, active.get(vm.id), stuck=vm.id in stuck) for vm in queries.vms(self.log)]

    def vm_table(self, *, everything: bool) -> str:
        """Lay out the VMs, and below them the operations that wait for a person."""
        rows = [row for row in self.vm_views() if everything or row["state"] not in ("stopped", "failed")]
        return views.vm_table(rows) + views.stuck_lines(queries.stuck(self.log))

    def _vm_create(self, request: p.VmCreate) -> dict[str, Any]:
        spec, reference = self._spec(request)
        twin = self._twin(spec, start=request.start) if request.join and not request.ephemeral else None
        if twin is not None:
            return asking.reply(self.log, twin)
        return self._create(spec, start=request.start, request=request, reference=reference)

    def _twin(self, spec: VmSpec, *, start: bool) -> str | None:
        """Find the operation that is making this very VM."""
        vm = next((vm for vm in queries.vms(self.log) if vm.spec == spec), None)
        op = None if vm is None else asking.under_way(self.log, "vm.create", vm.id)
        return op if op and queries.whole_op(self.log, op).args["start"] == start else None

    def _create(
        self,
        spec: VmSpec,
        *,
        start: bool,
        request: p.VmCreate | None = None,
        reference: str | None = None,
    ) -> dict[str, Any]:
        """Take the name and ask for the VM in one transaction."""
        pipeline = self._pipelines["vm.create"]
        first = pipeline.steps[0]
        with self.log.transaction(durable=True) as tx:
            vm, op = tx.mint("vm"), tx.mint("op")
            asked = pipeline.request(
                lane=vm,
                vm=vm,
                name=spec.name,
                args={"start": start, **({"reference": reference} if reference else {})},
                needs=_needs(spec, make=True, start=start),
                leave_out=self._not_for(spec, start=start) | (frozenset() if start else ONLY_MAKE),
            )
            # The name is taken from here on, so the first step counts as started from here on.
            started = ev.StepStarted(
                step=0, name=first.name, title=first.title, attempt=0, deadline_s=first.deadline_s
            )
            name = Resource(kind="name", id=spec.name)
            tx.append(op, asking.stamped(asked, request), op=op)
            tx.append(vm, ev.VmReserved(spec=spec, host=socket.gethostname()), op=op)
            tx.append(vm, ev.VmDesired(state="running" if start else "stopped"), op=op)
            tx.append(op, started, op=op)
            tx.append(op, ev.ResourceIntended(resource=name, vm=vm, step=first.name), op=op)
        return {"op": op, "vm": vm, "name": spec.name, "spec": msgspec.to_builtins(spec)}

    def _spec(self, request: p.VmCreate) -> tuple[VmSpec, str | None]:
        """Resolve what is asked for; also what its image is pulled by, if it was asked for so."""
        default = sizes(self.config)
        taken = {vm.spec.name for vm in queries.vms(self.log)}
        image, reference = self._shelf.image_asked(request.image or self.config.image)
        spec = VmSpec(
            name=check_vm_name(request.name) if request.name is not None else random_name(taken),
            image=image,
            kernel=check_artifact_name(request.kernel or self._shelf.kernel_of(image), "kernel"),
            vcpu=default.vcpu.value if request.vcpu is None else request.vcpu,
            memory_mib=default.memory_mib.value if request.memory_mib is None else request.memory_mib,
            disk_mib=default.disk_mib.value if request.disk_mib is None else request.disk_mib,
            nat=self.config.nat if request.nat is None else request.nat,
            ephemeral=request.ephemeral,
            network=request.network or self.config.network,
            root_disk=request.root_disk or self.config.root_disk,
        )
        limits.check(spec, capacity(self.config, self.dirs))
        if reference is None:
            self._shelf.show("image", spec.image)
        self._shelf.show("kernel", spec.kernel)
        snapshot.check_offered(spec, self._root)
        return spec, reference

    def _vm_change(self, request: p.ChangesVm) -> dict[str, Any]:
        vm = queries.find_vm(self.log, request.vm)
        return self._change(request.method, vm, request)

    def _change(self, kind: str, vm: Vm, request: p.ChangesVm | None = None) -> dict[str, Any]:
        joined = asking.under_way(self.log, kind, vm.id)
        if joined is not None:
            return asking.reply(self.log, joined)
        start = kind in ("vm.start", "vm.restart")
        asked = self._pipelines[kind].request(
            lane=vm.id,
            vm=vm.id,
            name=vm.spec.name,
            needs=_needs(vm.spec, make=False, start=start),
            leave_out=self._not_for(vm.spec, start=start),
        )
        wanted = (vm.id, ev.VmDesired(state=DESIRED[kind]))  # type: ignore[arg-type]
        op = self.log.request(asking.stamped(asked, request), wanted)
        return {"op": op, "vm": vm.id, "name": vm.spec.name}

    def _vm_set(self, request: p.VmSet) -> dict[str, Any]:
        """Ask for it to be something else; what cannot be is refused before anything is done."""
        vm = queries.find_vm(self.log, request.vm)
        changes = settings.wanted(vm, request, capacity(self.config, self.dirs))
        asked = self._pipelines["vm.set"].request(
            lane=vm.id,
            vm=vm.id,
            name=vm.spec.name,
            args=changes,
            needs=settings.needs(self.dirs.vm(vm.id), changes),
            leave_out=not_for(changes),
        )
        op = self.log.request(asking.stamped(asked, request))
        return {"op": op, "vm": vm.id, "name": vm.spec.name}

    def _not_for(self, spec: VmSpec, *, start: bool = False) -> frozenset[str]:
        """Give the names of the steps that an operation on such a VM has no use for."""
        left_out = network.not_for(spec, names_wanted=dns_wanted(self.config)) | snapshot.not_for(spec)
        if not start:
            return left_out
        return left_out | monitor.LEFT_OUT[monitor.choose(spec, self.config, self.dirs, self._root)]

    def _vm_delete(self, request: p.VmDelete) -> dict[str, Any]:
        """Delete a VM in any state: what is under way for it is cancelled and undone first."""
        return self.delete(queries.find_vm(self.log, request.vm), request)

    def delete(self, vm: Vm, request: p.VmDelete | None = None) -> dict[str, Any]:
        """Cancel what works on a VM and request its deletion; a deletion under way is joined."""
        for op in queries.ops(self.log, limit=100, vm=vm.id):
            if op.state != "ended" and op.kind != "vm.delete":
                self.log.cancel(op.id)
        return self._change("vm.delete", vm, request)

    def recover_lost(self) -> None:
        """Take back the VMs that are on the disk and of which the log has never heard."""
        for record in list(lost.find(self.log, self.dirs)):
            asked = lost.RECOVER.request(lane=record.vm, vm=record.vm, name=record.spec.name)
            runs = lost.is_running(record, self.dirs, self._root)
            reserved = ev.VmReserved(spec=record.spec, host=socket.gethostname())
            wanted = ev.VmDesired(state="running" if runs else "stopped")
            try:
                self.log.request(asked, (record.vm, reserved), (record.vm, wanted))
            except BangerError as error:  # its name is taken: it waits until that is free again
                logging.get(vm=record.vm).warning("cannot take back", error=error.message)

    def bury(self, vm: Vm) -> None:
        """Ask for the release of what a VM held whose VMM died by itself."""
        if queries.active_ops(self.log).get(vm.id) is None:
            leave_out = self._not_for(vm.spec)
            self.log.request(
                self._pipelines["vm.bury"].request(
                    lane=vm.id, vm=vm.id, name=vm.spec.name, leave_out=leave_out
                )
            )

    def _vm_show(self, request: p.VmShow) -> dict[str, Any]:
        vm = queries.find_vm(self.log, request.vm)
        paths = self.dirs.vm(vm.id)
        stuck = vm.id in queries.stuck_vms(self.log)
        shown = views.vm(vm, queries.active_ops(self.log).get(vm.id), stuck=stuck)
        return {
            "vm": shown
            | {
                "ready_seconds": vm.ready_seconds,
                "image_digest": vm.image_digest,
                "kernel_digest": vm.kernel_digest,
                "directory": str(paths.directory),
                "console": str(paths.console),
                "vmm": self._vmm(vm),
                **self.uses.shown(vm, self.config),
                **settings.shown(self.log, vm),
                "resources": [
                    {"kind": r.kind, "id": r.id, "state": r.state, "op": r.op}
                    for r in queries.resources(self.log, vm_id=vm.id)
                ],
                "history": [
                    {"op": op.id, "kind": op.kind, "fate": op.fate, "time_us": op.requested_us}
                    for op in reversed(queries.ops(self.log, limit=50, vm=vm.id))
                ],
            }
        }

    def _vmm(self, vm: Vm) -> str | None:
        """Tell which machine monitor runs a VM: the one in a jail, or the one without."""
        if vm.process is None:
            return None
        in_jail = any(held.kind == "jail" for held in queries.resources(self.log, vm_id=vm.id))
        return "firecracker" if in_jail else "qemu"

    def _vm_ssh(self, request: p.VmSsh) -> dict[str, Any]:
        target = self.target(request.vm)
        return {
            "argv": ssh.argv(target),
            "host": target.host,
            "port": target.port,
            "host_key": target.paths.known_hosts.read_text("ascii").split(" ", 1)[1].strip(),
        }

    def _vm_touch(self, request: p.VmTouch) -> dict[str, Any]:
        vm = queries.find_vm(self.log, request.vm)
        self.uses.touch(vm.id)
        return {"vm": vm.id, "name": vm.spec.name}

    def target(self, word: str, *, looking: bool = False) -> ssh.Target:
        """Say how to reach a running VM. It is being used then, unless someone is only `looking`.

        Raises NotFound, WrongState.
        """
        vm = queries.find_vm(self.log, word)
        if not looking:
            self.uses.touch(vm.id)
        if vm.state != "running" or vm.ssh_port is None or vm.process is None:
            active = queries.active_ops(self.log).get(vm.id)
            if active is not None:
                raise WrongState(
                    f"{vm.spec.name} is not running yet: {active.kind} is under way.",
                    hint=f"`banger ops follow {active.id}`",
                    op=active.id,
                )
            raise WrongState(f"{vm.spec.name} is not running.", hint=f"`banger vm start {vm.spec.name}`")
        if not proc.alive(vm.process):
            raise WrongState(
                f"The VMM of {vm.spec.name} has ended.", hint=f"`banger vm start {vm.spec.name}`"
            )
        return ssh.Target(
            vm=vm.id,
            host=vm.address or user.HOST_ADDRESS,
            port=vm.ssh_port,
            paths=self.dirs.vm(vm.id),
            key=self.dirs.user_key,
        )


def _needs(spec: VmSpec, *, make: bool, start: bool) -> Needs:
    """Say what must be free on the host before a VM is made, started, or both."""
    return Needs(
        memory_mib=spec.memory_mib if start else 0,
        vcpu=spec.vcpu if start else 0,
        disk_mib=FRESH_DISK_MIB if make else 0,
    )
