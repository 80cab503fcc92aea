"""Change what a VM is asked to be, and tell that from what it is."""

from __future__ import annotations

from typing import Any

import msgspec

from banger.config import Capacity, VmPaths
from banger.errors import InvalidRequest, WrongState
from banger.events import vocabulary as ev
from banger.events.fold import Vm
from banger.events.log import EventLog
from banger.model import Needs, VmSpec
from banger.rpc import limits
from banger.rpc import protocol as p

CHANGES = ("nat", "vcpu", "memory_mib", "disk_mib")


def wanted(vm: Vm, request: p.VmSet, most: Capacity) -> dict[str, Any]:
    """Give what is asked to change, if all of it can be. Raises InvalidRequest, WrongState."""
    given = {key: getattr(request, key) for key in CHANGES if getattr(request, key) is not None}
    if not given:
        raise InvalidRequest(
            "There is nothing to change.", hint="Give --vcpu, --memory, --disk-size, --nat or --no-nat."
        )
    if "nat" in given and vm.spec.network == "user" and vm.process is not None:
        raise WrongState(
            f"The network of {vm.spec.name} is QEMU's own, which is as it was started.",
            hint=f"`banger vm stop {vm.spec.name}` first, or make VMs with --network bridge.",
        )
    limits.check(msgspec.structs.replace(vm.spec, **given), most)
    if "disk_mib" in given:
        _check_disk(vm, given["disk_mib"])
    return given


def _check_disk(vm: Vm, disk_mib: int) -> None:
    if disk_mib < vm.spec.disk_mib:
        raise InvalidRequest(
            f"The disk of {vm.spec.name} has {vm.spec.disk_mib}MiB already: disks grow only.",
            hint="It is sparse: what is not written takes no space.",
        )
    if vm.process is not None:
        raise WrongState(
            f"The disk of {vm.spec.name} is in use.", hint=f"`banger vm stop {vm.spec.name}` first."
        )


def needs(paths: VmPaths, changes: dict[str, Any]) -> Needs | None:
    """Say what a change takes of the host: a disk grows in a copy."""
    if "disk_mib" not in changes or not paths.work.exists():
        return None
    return Needs(disk_mib=paths.work.stat().st_blocks * 512 >> 20)


def shown(log: EventLog, vm: Vm) -> dict[str, Any]:
    """Show what a VM runs with, where that is not what it is asked to be by now."""
    now = None if vm.process is None else _started_as(log, vm.id)
    if now is None:
        return {"runs_with": {}}
    return {
        "runs_with": {key: getattr(now, key) for key in CHANGES if getattr(now, key) != getattr(vm.spec, key)}
    }


def _started_as(log: EventLog, vm: str) -> VmSpec | None:
    """Give the specification that a VM had when it was last started; NAT of a bridge changes at once."""
    spec: VmSpec | None = None
    started: VmSpec | None = None
    for row in log.read(stream=vm):
        match row.event:
            case ev.VmReserved():
                spec = row.event.spec
            case ev.VmStarted():
                started = spec
            case ev.VmChanged():
                spec = row.event.spec
                if started is not None and spec.network == "bridge":
                    started = msgspec.structs.replace(started, nat=spec.nat)
    return started
