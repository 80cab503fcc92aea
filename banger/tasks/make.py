"""Make what a VM is made of: a name, a directory, keys, disks; nothing runs yet."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from banger.events import vocabulary as ev
from banger.guest import keys
from banger.images import seed, store
from banger.model import Resource
from banger.tasks import filesync, lost, snapshot, supply
from banger.tasks.context import Ctx
from banger.tasks.pipeline import Step


def _use_image(ctx: Ctx) -> dict[str, Any]:
    """Find the image by name when the VM is made, by digest ever after."""
    supply.foresee_kernel(ctx, ctx.vm.spec.kernel)
    return {"image_digest": supply.image(ctx, ctx.vm.spec.image).digest}


def _use_kernel(ctx: Ctx) -> dict[str, Any]:
    return {"kernel_digest": supply.kernel(ctx, ctx.vm.spec.kernel).digest}


def _directory(ctx: Ctx) -> list[Resource]:
    return [Resource(kind="directory", id=str(ctx.paths.directory))]


def _make_directory(ctx: Ctx) -> None:
    ctx.paths.directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def remove_directory(ctx: Ctx) -> None:
    """Make it so that the VM has no files."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(ctx.paths.directory)


def _make_keys(ctx: Ctx) -> None:
    """Make the guest's host key here, so that it is known before the first connection."""
    paths = ctx.paths
    pem = keys.make_key_file(paths.host_key)
    paths.known_hosts.write_text(keys.known_hosts_line(ctx.vm_id, pem) + "\n", "ascii")
    keys.make_key_file(ctx.dirs.user_key)


def forget_unfinished(path: Path) -> None:
    """Remove what dead attempts at this file left beside it: each wrote under a name of its own."""
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink(missing_ok=True)


def _disks(ctx: Ctx) -> list[Resource]:
    paths = ctx.paths
    disks = (paths.changes(ctx.vm.spec.root_disk), paths.work)
    return [Resource(kind="file", id=str(path)) for path in disks]


def _make_disks(ctx: Ctx) -> None:
    _forget_unfinished_disks(ctx)
    base = _make_changes(ctx)
    _make_work_disk(ctx)
    facts = ctx.facts
    digests = {"image_digest": facts["image_digest"], "kernel_digest": facts["kernel_digest"]}
    lost.write(ctx.paths, lost.Record(vm=ctx.vm_id, spec=ctx.vm.spec, base=base, **digests))
    ctx.emit(ctx.vm_id, ev.VmCreated(**digests))


def _make_changes(ctx: Ctx) -> str | None:
    """Make what the VM's changes of its image go to."""
    if ctx.vm.spec.root_disk == "snapshot":
        return snapshot.make_cow(ctx)
    ctx.world.disks.make(ctx.paths.overlay, ctx.config.overlay_mib, label="overlay")
    return None


def _make_work_disk(ctx: Ctx) -> None:
    """Make the disk for /root, with what the image has there."""
    path, size_mib = ctx.paths.work, ctx.vm.spec.disk_mib
    image = store.find(ctx.dirs.cache, "image", str(ctx.facts["image_digest"]))
    content = filesync.with_files(ctx, None if image is None else seed.path_of(image))
    if content is None:  # made by a banger that took none: the guest copies its image's at its first boot
        ctx.world.disks.make(path, size_mib, label="work")
    else:
        ctx.world.disks.make_home(path, size_mib, seed=content, below=seed.DIRECTORY)


def _forget_unfinished_disks(ctx: Ctx) -> None:
    for path in (ctx.paths.overlay, ctx.paths.work):
        forget_unfinished(path)


def _remove_disks(ctx: Ctx) -> None:
    _forget_unfinished_disks(ctx)
    forget_unfinished(ctx.paths.record)
    ctx.paths.record.unlink(missing_ok=True)
    for disk in (ctx.paths.overlay, ctx.paths.cow, ctx.paths.work):
        disk.unlink(missing_ok=True)


def _name(ctx: Ctx) -> list[Resource]:
    return [Resource(kind="name", id=ctx.vm.spec.name)]


def free_name(ctx: Ctx) -> None:
    """Record that the VM is no more; from then on its name may be taken."""
    ctx.emit(ctx.vm_id, ev.VmDeleted())


MAKE = (
    Step(
        name="name",
        title="reserve the name",
        run=lambda _: None,  # the request itself reserved it
        undo=free_name,
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
    snapshot.BASE,
    Step(
        name="directory",
        title="directory",
        run=_make_directory,
        undo=remove_directory,
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
