"""Look at operations, stop them, try them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from banger.config import Dirs
from banger.errors import BangerError, NotFound, WrongState
from banger.events import queries
from banger.events import vocabulary as ev
from banger.events.fold import Op
from banger.events.log import EventLog
from banger.rpc import protocol as p
from banger.rpc import views
from banger.tasks.audit import SWEEP, audit
from banger.tasks.pipeline import Pipeline
from banger.tasks.root import Root, audit_of


class Operations:
    """The methods about operations. `create` asks for a VM by its whole specification."""

    def __init__(
        self,
        log: EventLog,
        dirs: Dirs,
        pipelines: Mapping[str, Pipeline],
        create: Callable[..., dict[str, Any]],
        root: Root,
    ):
        self._log = log
        self._root = root
        self._pipelines = pipelines
        self._create = create
        self.answers: dict[type[p.Request], Callable[[Any], dict[str, Any]]] = {
            p.OpsList: self._list,
            p.OpsShow: self._show,
            p.OpsCancel: self._cancel,
            p.OpsRetry: self._retry,
            p.OpsRetryUndo: self._retry_undo,
            p.OpsAbandon: self._abandon,
            p.OpsAudit: lambda _: msgspec.to_builtins(audit(log, dirs, root)),
            p.OpsSweep: lambda _: {"op": log.request(SWEEP.request(lane="host"))},
        }

    def _list(self, request: p.OpsList) -> dict[str, Any]:
        vm = None
        if request.vm is not None:
            vm = next((v.id for v in queries.vms(self._log) if request.vm in (v.id, v.spec.name)), request.vm)
        return {"ops": [views.op_summary(op) for op in queries.ops(self._log, limit=request.limit, vm=vm)]}

    def _show(self, request: p.OpsShow) -> dict[str, Any]:
        summary = queries.find_op(self._log, request.op)
        ahead = queries.ahead_of(self._log, summary.id)
        op = queries.whole_op(self._log, summary.id)
        return {"op": views.op(summary, op, ahead) | {"root": self._by_root(op)}}

    def _by_root(self, op: Op) -> list[dict[str, Any]] | None:
        """Give root's own account of an operation that asked for its help; None when it cannot tell."""
        known = self._pipelines.get(op.kind)
        asked = {step.name for step in known.steps if step.pool == "root"} if known else set()
        if not any(step.name in asked and step.attempts for step in op.steps):
            return []
        try:
            return audit_of(self._root, op.id)
        except BangerError:
            return None

    def _cancel(self, request: p.OpsCancel) -> dict[str, Any]:
        op = queries.find_op(self._log, request.op)
        if not self._log.cancel(op.id):
            raise WrongState(f"{op.id} has ended already ({op.fate}).", op=op.id)
        return {"op": op.id}

    def _retry(self, request: p.OpsRetry) -> dict[str, Any]:
        summary = queries.find_op(self._log, request.op)
        match summary.fate:
            case "stuck" | "abandoned":
                return {"op": self._reopen(queries.whole_op(self._log, summary.id), back=False)}
            case "undone" | "cancelled":
                return {"op": self._ask_anew(summary.id), "retries": summary.id}
            case fate:
                raise WrongState(f"{summary.id} {'goes on' if fate is None else 'is done'}.", op=summary.id)

    def _retry_undo(self, request: p.OpsRetryUndo) -> dict[str, Any]:
        op = self._stuck(request.op)
        passed = self._pipelines[op.kind].no_return(op)
        if passed is not None:
            raise WrongState(
                f"{op.id} cannot be undone: there is no way back after {passed.title!r}.",
                hint=f"`banger ops retry {op.id}` goes on with it.",
                op=op.id,
            )
        return {"op": self._reopen(op, back=True)}

    def _stuck(self, short: str) -> Op:
        summary = queries.find_op(self._log, short)
        if summary.fate not in ("stuck", "abandoned"):
            raise WrongState(f"{summary.id} is not stuck but {summary.fate or summary.state}.", op=summary.id)
        return queries.whole_op(self._log, summary.id)

    def _reopen(self, op: Op, *, back: bool) -> str:
        """Go on with a stuck operation, or on undoing it; finished steps are not done again."""
        with self._log.transaction(durable=True) as tx:
            reopened = ev.OpReopened(lane=op.lane, epoch=op.epoch, back=back)
            tx.append(op.id, reopened, op=op.id)
        return op.id

    def _ask_anew(self, op_id: str) -> str:
        """Ask again for what an operation that left nothing was asked for."""
        op = queries.whole_op(self._log, op_id)
        if op.kind == "vm.create":
            again = self._create(
                queries.spec_asked(self._log, op_id),
                start=bool(op.args.get("start", True)),
                reference=op.args.get("reference"),
            )
            return str(again["op"])
        if op.vm is not None and queries.vm(self._log, op.vm) is None:
            raise NotFound(f"The VM {op.name} is no more.", op=op_id)
        pipeline = self._pipelines[op.kind]
        had = {step.name for step in op.steps}
        asked_for = pipeline.request(
            lane=op.lane,
            args=op.args,
            vm=op.vm,
            name=op.name,
            needs=op.needs,
            leave_out=frozenset(step.name for step in pipeline.steps) - had,
        )
        return self._log.request(asked_for)

    def _abandon(self, request: p.OpsAbandon) -> dict[str, Any]:
        op = queries.find_op(self._log, request.op)
        if op.fate != "stuck":
            raise WrongState(f"{op.id} is not stuck but {op.fate or op.state}.", op=op.id)
        with self._log.transaction(durable=True) as tx:
            tx.append(op.id, ev.OpAbandoned(), op=op.id)
        return {"op": op.id}
