"""Delete VMs that are at rest: those that were shown to a person, if they are at rest still."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from banger.events import queries
from banger.rpc import protocol as p

if TYPE_CHECKING:
    from banger.rpc.service import Service

AT_REST = ("stopped", "failed")


def prune(service: Service, request: p.VmPrune) -> dict[str, Any]:
    """Ask for the deletion of those of these VMs that nothing has happened to since."""
    rows = {row["id"]: row for row in service.vm_views()}
    there = [rows[vm] for vm in dict.fromkeys(request.vms) if vm in rows]
    ops = [
        service.delete(queries.find_vm(service.log, row["id"])) for row in there if row["state"] in AT_REST
    ]
    left = [
        {"vm": row["id"], "name": row["name"], "state": row["state"]}
        for row in there
        if row["state"] not in AT_REST
    ]
    return {"ops": ops, "left": left}
