"""Answers about the past, from the log alone: events, histories, how things were at a moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from banger.errors import NotFound
from banger.events import queries
from banger.events.fold import Vm, apply_vm
from banger.events.log import EventLog
from banger.rpc import protocol as p
from banger.rpc import views


class Past:
    """The methods that only read the log."""

    def __init__(self, log: EventLog):
        self._log = log
        self.answers: dict[type[p.Request], Callable[[Any], dict[str, Any]]] = {
            p.EventsList: self._events,
            p.VmHistory: self._history,
            p.VmWhy: self._why,
            p.VmListAt: self._vms_at,
            p.StateRebuild: self._rebuild,
        }

    def _events(self, request: p.EventsList) -> dict[str, Any]:
        rows = self._log.read(
            after=request.after,
            op=None if request.op is None else queries.find_op(self._log, request.op).id,
            stream=None if request.vm is None else self._vm_ids(request.vm)[-1],
            kind=request.type,
            limit=request.limit,
            newest=request.newest,
        )
        return {"events": [views.event(row) for row in rows]}

    def _vm_ids(self, word: str) -> list[str]:
        """Give the ids of the VMs that had this name or id, the newest last. Raises NotFound."""
        found = queries.vm_ids(self._log, word)
        if not found:
            raise NotFound(f"There has never been a VM named {word!r}.", hint="`banger ops list` tells more.")
        return found

    def _history(self, request: p.VmHistory) -> dict[str, Any]:
        ids = self._vm_ids(request.vm)
        ops = [op for vm in ids for op in reversed(queries.ops(self._log, limit=-1, vm=vm))]
        return {"ops": [views.op_summary(op) for op in ops]}

    def _why(self, request: p.VmWhy) -> dict[str, Any]:
        """Give the last operation that did not end well, and what the VM's log says beside it."""
        vm_id = self._vm_ids(request.vm)[-1]
        ops = queries.ops(self._log, limit=-1, vm=vm_id)
        failed = next((op for op in ops if op.error is not None), None)
        vm = self._state(vm_id, self._log.last_seq())
        answer: dict[str, Any] = {
            "vm": vm_id,
            "name": request.vm,
            "state": vm.state if vm else None,
            "reason": vm.reason if vm else None,
            "op": None,
        }
        if failed is not None:
            answer["op"] = views.op(failed, queries.whole_op(self._log, failed.id))
        return answer

    def _vms_at(self, request: p.VmListAt) -> dict[str, Any]:
        seq = self._log.at(request.time_us)
        states = (self._state(vm, seq) for vm in queries.vm_ids(self._log))
        return {"vms": [views.vm(vm, None, then=True) for vm in states if vm and vm.state != "deleted"]}

    def _state(self, vm_id: str, seq: int) -> Vm | None:
        vm: Vm | None = None
        for row in self._log.read(stream=vm_id):
            if row.seq > seq:
                break
            vm = apply_vm(vm, row)
        return vm

    def _rebuild(self, _: p.StateRebuild) -> dict[str, Any]:
        began = time.monotonic()
        changed = self._log.rebuild()
        seconds = round(time.monotonic() - began, 3)
        return {"events": self._log.last_seq(), "changed": changed, "seconds": seconds}
