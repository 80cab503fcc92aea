"""Bring a repository into a VM that runs: take what it is at, send it, and record that it is there."""

from __future__ import annotations

import contextlib
import shutil
from typing import Any

import msgspec

from banger.errors import BangerError, OperationFailed, WrongState
from banger.events import vocabulary as ev
from banger.guest import ssh
from banger.model import Workspace
from banger.network import user
from banger.tasks.context import Ctx
from banger.tasks.pipeline import Pipeline, Step
from banger.workspace import guest, parcel, repository
from banger.workspace.parcel import Base
from banger.workspace.repository import Listing, Repository, Wish

PACK_S = 600.0


def _pack(ctx: Ctx) -> dict[str, Any]:
    """Take the repository's state into the VM's directory; refuse before anything is sent."""
    wish = msgspec.convert(ctx.args, type=Wish)
    found = repository.find(wish)
    listed = repository.listing(found, wish)
    place = guest.place_of(repository.guest_name(found), ctx.op.id)
    seen = ctx.world.workspaces.look(_target(ctx), place)
    made = _take(ctx, found, wish, git=seen.git)
    _check_room(listed, sum(file.stat().st_size for file in _parcel_files(ctx)), seen)
    workspace = _workspace(found, listed, wish, place, made, git=seen.git)
    return {"workspace": msgspec.to_builtins(workspace)}


def _take(ctx: Ctx, found: Repository, wish: Wish, *, git: bool) -> str:
    base = Base(directory=ctx.paths.workspace(ctx.op.id))
    shutil.rmtree(base.directory, ignore_errors=True)
    commit = parcel.take(found, wish, base.directory)
    ctx.paths.parcel(ctx.op.id).mkdir()
    if git:
        parcel.pack(found, base, commit, ctx.paths.parcel(ctx.op.id))
    else:
        parcel.spread(base, commit, ctx.paths.parcel(ctx.op.id))
    return commit


def _parcel_files(ctx: Ctx) -> list[Any]:
    return [
        path for path in ctx.paths.parcel(ctx.op.id).rglob("*") if path.is_file() and not path.is_symlink()
    ]


def _check_room(listed: Listing, parcel_bytes: int, seen: guest.Seen) -> None:
    """Refuse what cannot fit; what is nearly so finds out in the guest."""
    needed_kib = (listed.size_bytes * seen.git + parcel_bytes) >> 10
    if needed_kib > seen.free_kib:
        raise OperationFailed(
            f"The workspace takes {needed_kib >> 10} MiB, and the guest has {seen.free_kib >> 10} MiB left.",
            hint="Remove something at /root in the guest, or make a VM with a larger --disk-size.",
        )


def _workspace(
    found: Repository, listed: Listing, wish: Wish, place: guest.Place, commit: str, *, git: bool
) -> Workspace:
    return Workspace(
        repository=str(found.root),
        path=place.path,
        commit=commit,
        stamp=repository.stamp(found, wish),
        op=place.op,
        files=len(listed.files),
        size_bytes=listed.size_bytes,
        head=found.head,
        branch=wish.branch,
        source=wish.source,
        untracked=wish.untracked,
        git=git,
        mise=listed.mise,
    )


def _remove(ctx: Ctx) -> None:
    shutil.rmtree(ctx.paths.workspace(ctx.op.id), ignore_errors=True)


def _send(ctx: Ctx) -> None:
    ctx.progress("sending")
    ctx.world.workspaces.send(_target(ctx), _place(ctx), ctx.paths.parcel(ctx.op.id), ctx.cancelled)


def _withdraw(ctx: Ctx) -> None:
    """Give the guest back what it had, if it can be asked; if not, its mark says that it has another one."""
    if "workspace" in ctx.facts:
        with contextlib.suppress(BangerError):
            ctx.world.workspaces.withdraw(_target(ctx), _place(ctx))


def _record(ctx: Ctx) -> None:
    """Record the workspace, and let go of what only the way there needed."""
    shutil.rmtree(ctx.paths.parcel(ctx.op.id), ignore_errors=True)
    for older in ctx.paths.workspaces():
        if older != ctx.paths.workspace(ctx.op.id):
            shutil.rmtree(older, ignore_errors=True)
    ctx.emit(ctx.vm_id, ev.WorkspacePrepared(workspace=_made(ctx)))


def _made(ctx: Ctx) -> Workspace:
    return msgspec.convert(ctx.facts["workspace"], type=Workspace)


def _place(ctx: Ctx) -> guest.Place:
    return guest.Place(path=_made(ctx).path, op=ctx.op.id)


def _target(ctx: Ctx) -> ssh.Target:
    vm = ctx.vm
    if vm.state != "running" or vm.ssh_port is None:
        raise WrongState(f"{vm.spec.name} is not running.", hint=f"`banger vm start {vm.spec.name}`")
    return ssh.Target(
        vm=vm.id,
        host=vm.address or user.HOST_ADDRESS,
        port=vm.ssh_port,
        paths=ctx.paths,
        key=ctx.dirs.user_key,
    )


PIPELINES = (
    Pipeline(
        "workspace.prepare",
        (
            Step(name="pack", title="take its state", run=_pack, undo=_remove, deadline_s=PACK_S),
            Step(
                name="send",
                title="send it to the guest",
                run=_send,
                undo=_withdraw,
                deadline_s=guest.SEND_S + 60,
            ),
            Step(
                name="record",
                title="the guest has it",
                run=_record,
                why_no_undo="it is the end: nothing comes after it that could fail",
            ),
        ),
    ),
)
