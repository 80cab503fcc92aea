"""A VM's root disk where the host joins an image and the VM's changes of it: a dm-snapshot, which root makes.

Both files are opened here, and root gets the descriptors. docs/decisions/0021-root-disks.md tells what speaks
for this kind of disk and against it.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from banger.errors import HelperDown, HostLacks, NotFound, WrongState
from banger.helper import names
from banger.helper.requests import SnapshotEnsure, SnapshotRemove
from banger.images import whole
from banger.model import Resource, VmSpec
from banger.storage import ext4
from banger.tasks import lost, network, root, supply
from banger.tasks.artifacts import BUILD_S, forget_unpublished
from banger.tasks.context import Ctx
from banger.tasks.pipeline import Step
from banger.tasks.root import Root

CHUNK = 4096
LISTED = 256
"""Chunks that one chunk of the list names: 16 bytes each (kernel: dm-snap-persistent.c, disk_exception)."""

_HEAD = struct.Struct("<II")  # magic, valid (dm-snap-persistent.c, disk_header)
_MAGIC = 0x70416E53
_HINT = 'Leave out `--root-disk snapshot`, or set root_disk = "overlay" in config.toml.'


def check_offered(spec: VmSpec, asked: Root) -> None:
    """Raise HostLacks when a VM is to have a root disk of this kind and this host cannot make one."""
    if spec.root_disk == "overlay":
        return
    try:
        offered = root.hello(asked)["device_mapper"]
    except HelperDown:
        raise HostLacks("Root makes dm-snapshots, and root's helper is not there.", hint=_HINT) from None
    if not offered:
        raise HostLacks("This host's kernel has no device-mapper that makes snapshots.", hint=_HINT)


def cow_bytes(base_bytes: int) -> int:
    """Give the size of a file that has room for every chunk of a base, for the lists of them and a header.

    One that becomes full is lost whole (docs/decisions/0021-root-disks.md).
    """
    chunks = -(-base_bytes // CHUNK)
    return (chunks + chunks // LISTED + 3) * CHUNK


def make_cow(ctx: Ctx) -> str:
    """Make the file for a VM's changes, sparse; give the uuid of the base that they will be changes of."""
    base = _base(ctx)
    with ctx.paths.cow.open("ab") as cow:
        ctx.paths.cow.chmod(0o600)
        cow.truncate(cow_bytes(base.stat().st_size))
    return ext4.uuid(base)


def loss(ctx: Ctx) -> str:
    """Tell, as the end of a sentence, that a VM's root disk is lost; empty when it is not."""
    is_lost = ctx.vm.spec.root_disk == "snapshot" and _head(ctx.paths.cow) == (_MAGIC, 0)
    return "its root disk was full, and what was changed on it is lost" if is_lost else ""


def check_whole(ctx: Ctx) -> None:
    """Raise WrongState when a VM's root disk is lost."""
    if loss(ctx):
        name = ctx.vm.spec.name
        raise WrongState(f"{name} cannot be started: {loss(ctx)}.", hint=f"`banger vm delete {name}`")


def _head(cow: Path) -> tuple[int, ...]:
    """Read what the kernel has written of a snapshot: zeros before the first start."""
    with contextlib.suppress(FileNotFoundError), cow.open("rb") as file:
        return _HEAD.unpack(file.read(_HEAD.size).ljust(_HEAD.size, b"\0"))
    return 0, 0


def _base(ctx: Ctx) -> Path:
    image = supply.in_cache(ctx, "image")
    found = whole.path_of(image)
    if found is None:
        raise NotFound(
            f"The image {image.name} is in the cache, but not as ext4 any more.",
            hint=f"`banger vm delete {ctx.vm.spec.name}`",
        )
    return found


def _complete_image(ctx: Ctx) -> None:
    image = supply.in_cache(ctx, "image")
    least_mib, write = ctx.config.overlay_mib, ctx.world.write_whole
    whole.make(image, least_mib=least_mib, write=write, cancelled=ctx.cancelled)


def _snapshot(ctx: Ctx) -> list[Resource]:
    return [Resource(kind="snapshot", id=names.device(os.getuid(), ctx.vm_id))]


def _make(ctx: Ctx) -> dict[str, Any]:
    """Have the disk made, and check it if it was used before, while nobody uses it."""
    base, cow = _base(ctx), ctx.paths.cow
    _check_same(ctx, base)
    was_used = _head(cow) != (0, 0)
    with _opened(base, cow) as fds:
        device: str = ctx.ask_root(SnapshotEnsure(vm=ctx.vm_id), fds)["device"]
    if was_used and not ctx.vmm.find(ctx.vm_id) and ctx.world.disks.check(Path(device)):
        return {"root_disk": device, "mended": [*ctx.facts.get("mended", []), cow.name]}
    return {"root_disk": device}


def _check_same(ctx: Ctx, base: Path) -> None:
    """Raise WrongState when the base was made anew: changes by block fit one making of it only."""
    record = lost.read(ctx.paths)
    if record is None or record.base != ext4.uuid(base):
        name = ctx.vm.spec.name
        raise WrongState(
            f"The image of {name} was made anew, and what {name} has changed does not fit it.",
            hint=f"`banger vm delete {name}`",
        )


@contextlib.contextmanager
def _opened(base: Path, cow: Path) -> Iterator[tuple[int, int]]:
    """Open both files as root wants them."""
    with base.open("rb") as reads, cow.open("r+b") as changes:
        yield reads.fileno(), changes.fileno()


def _remove(ctx: Ctx) -> None:
    ctx.ask_root(SnapshotRemove(vm=ctx.vm_id))


def _release(ctx: Ctx) -> None:
    if _held(ctx):
        _remove(ctx)


def _held(ctx: Ctx) -> list[Resource]:
    return ctx.held("snapshot")


BASE = Step(
    name="base",
    title="image as ext4",
    run=_complete_image,
    undo=forget_unpublished,
    deadline_s=BUILD_S,
)
SNAPSHOT = Step(
    name="snapshot",
    title="root disk",
    run=_make,
    undo=_remove,
    acquires=_snapshot,
    attempts=network.ROOT_ATTEMPTS,
    deadline_s=ext4.CHECK_TIMEOUT_S,
    pool="root",
)
RELEASE = Step(
    name="root-disk",
    title="release its root disk",
    run=_release,
    why_no_undo="its VMM is gone already",
    forward_only=True,
    releases=_held,
    attempts=network.ROOT_ATTEMPTS,
    pool="root",
)
# What it gives back is its own from the start, so that turning back gives back the rest.
RELEASE_ON_THE_WAY = replace(RELEASE, forward_only=False, acquires=_held, undo=_release, why_no_undo="")

ONLY = frozenset(step.name for step in (BASE, SNAPSHOT, RELEASE))


def not_for(spec: VmSpec) -> frozenset[str]:
    """Give the names of the steps that a VM with this root disk has no use for."""
    return ONLY if spec.root_disk == "overlay" else frozenset()
