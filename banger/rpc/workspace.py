"""Repositories in VMs: bring one, and say how to read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from banger.config import Dirs
from banger.errors import WrongState
from banger.events import queries
from banger.events.fold import Vm
from banger.events.log import EventLog
from banger.guest import ssh
from banger.guest.words import Command
from banger.model import Workspace
from banger.rpc import asking
from banger.rpc import protocol as p
from banger.tasks.pipeline import Pipeline
from banger.workspace.command import command_in
from banger.workspace.repository import Wish

SLACK = 2
"""A patch may be larger than the disk it was made on: removed and added lines are both in it."""


class Workspaces:
    """The methods about workspaces. `target` says how to reach a VM that runs, or raises WrongState."""

    def __init__(
        self,
        log: EventLog,
        dirs: Dirs,
        pipelines: Mapping[str, Pipeline],
        target: Callable[[str], ssh.Target],
    ):
        self._log = log
        self._dirs = dirs
        self._pipelines = pipelines
        self._target = target
        self.answers: dict[type[p.Request], Callable[[Any], dict[str, Any]]] = {
            p.WorkspacePrepare: self._prepare,
            p.WorkspaceShow: self._show,
        }

    def _prepare(self, request: p.WorkspacePrepare) -> dict[str, Any]:
        vm = queries.find_vm(self._log, request.vm)
        wish = Wish(
            repository=request.repository,
            branch=request.branch,
            source=request.source,
            untracked=request.untracked,
        )
        args = msgspec.to_builtins(wish)
        joined = asking.under_way(self._log, request.method, vm.id)
        if joined is not None and queries.whole_op(self._log, joined).args == args:
            return asking.reply(self._log, joined)
        if vm.state != "running":
            raise WrongState(f"{vm.spec.name} is not running.", hint=f"`banger vm start {vm.spec.name}`")
        pipeline = self._pipelines[request.method]
        asked = pipeline.request(lane=vm.id, vm=vm.id, name=vm.spec.name, args=args)
        return {"op": self._log.request(asking.stamped(asked, request)), "vm": vm.id, "name": vm.spec.name}

    def _show(self, request: p.WorkspaceShow) -> dict[str, Any]:
        vm = queries.find_vm(self._log, request.vm)
        if vm.workspace is None:
            raise _none(vm)
        return {
            "workspace": msgspec.to_builtins(vm.workspace),
            "argv": ssh.argv(self._target(request.vm)),
            "base": str(self._dirs.vm(vm.id).workspace(vm.workspace.op)),
            "limit_mib": vm.spec.disk_mib * SLACK,
        }


def in_workspace(workspace: Workspace | None, command: Command) -> Command:
    """Give a command as it starts in the VM's workspace, unless it says itself where, or whose it is."""
    if workspace is None or command.directory is not None or command.user is not None:
        return command
    return msgspec.structs.replace(command, words=tuple(command_in(workspace, command.words)))


def _none(vm: Vm) -> WrongState:
    return WrongState(
        f"{vm.spec.name} has no workspace.", hint=f"`banger vm workspace prepare {vm.spec.name} REPO`"
    )
