"""Images and kernels from files of the user's and from bundles; and the cache, emptied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from banger.errors import NotFound
from banger.events import queries
from banger.images import store
from banger.model import Artifact, Resource
from banger.tasks.artifacts import forget_unpublished, publish
from banger.tasks.context import Ctx
from banger.tasks.pipeline import Pipeline, Step

MAKE_S = 2 * 3600.0


def _name(ctx: Ctx) -> str:
    return str(ctx.args["name"])


def _intending(ctx: Ctx, kind: str) -> Callable[[str], None]:
    """Record the artifact before it is made: its digest is known only when its files were read."""
    return lambda digest: ctx.intend(Resource(kind="artifact", id=f"{kind}:{digest}"))


def _file(ctx: Ctx, key: str) -> Path | None:
    given = ctx.args.get(key)
    return None if given is None else Path(given)


def _register(ctx: Ctx) -> Artifact:
    from banger.images import local  # late: most workers never need what it needs

    return local.register(
        Path(ctx.args["file"]),
        _name(ctx),
        ctx.dirs.cache,
        take_seed=ctx.world.take_seed,
        announce=_intending(ctx, "image"),
        cancelled=ctx.cancelled,
    )


def _promote(ctx: Ctx) -> Artifact:
    from banger.images import local

    known = queries.artifact(ctx.log, "image", _name(ctx))
    found = None if known is None else store.find(ctx.dirs.cache, "image", known.digest)
    if found is None:
        raise NotFound(f"The image {_name(ctx)} is not in the cache.", hint="`banger image list` shows them.")
    return local.promote(
        found,
        ctx.dirs.cache,
        take_seed=ctx.world.take_seed,
        announce=_intending(ctx, "image"),
        progress=ctx.progress,
        cancelled=ctx.cancelled,
    )


def _import_kernel(ctx: Ctx) -> Artifact:
    from banger.images import local

    return local.import_kernel(
        Path(ctx.args["kernel"]),
        _name(ctx),
        ctx.dirs.cache,
        initrd=_file(ctx, "initrd"),
        modules=_file(ctx, "modules"),
        announce=_intending(ctx, "kernel"),
        progress=ctx.progress,
        cancelled=ctx.cancelled,
    )


def _install(ctx: Ctx) -> Artifact:
    from banger.images import bundle

    kind: Literal["image", "kernel"] = "image" if ctx.op.kind == "image.install" else "kernel"
    wanted = msgspec.convert(ctx.args["bundle"], bundle.Bundle)
    _intending(ctx, kind)(wanted.digest(kind, _name(ctx)))
    return bundle.install(
        wanted,
        kind,
        _name(ctx),
        ctx.dirs.cache,
        limits=bundle.Limits.of(ctx.config.limits),
        take_seed=ctx.world.take_seed,
        progress=ctx.progress,
        cancelled=ctx.cancelled,
    )


def _prune(ctx: Ctx) -> dict[str, Any]:
    """Empty the cache of what neither a name nor a VM of this log stands for."""
    from banger.images import cache

    names = [each.digest for kind in ("image", "kernel") for each in queries.artifacts(ctx.log, kind)]
    vms = [digest for vm in queries.vms(ctx.log) for digest in (vm.image_digest, vm.kernel_digest) if digest]
    pruned = cache.prune(ctx.dirs.cache, frozenset([*names, *vms]), dry_run=bool(ctx.args["dry_run"]))
    return {"pruned": msgspec.to_builtins(pruned)}


def _pruned(ctx: Ctx) -> list[Resource]:
    """List what the ledger has and the cache has not any more."""
    held = [id_.partition(":") for id_ in queries.resource_ids(ctx.log, "artifact")]
    gone = [(kind, digest) for kind, _, digest in held if store.find(ctx.dirs.cache, kind, digest) is None]
    return [Resource(kind="artifact", id=f"{kind}:{digest}") for kind, digest in gone]


def _pipeline(kind: str, title: str, make: Callable[[Ctx], Artifact]) -> Pipeline:
    """Make a pipeline of one step, which publishes what it makes; the store has it whole or not at all."""
    step = Step(
        name="make",
        title=title,
        run=lambda ctx: publish(ctx, make(ctx)),
        undo=forget_unpublished,
        deadline_s=MAKE_S,
    )
    return Pipeline(kind, (step,))


PIPELINES = (
    _pipeline("image.register", "register the file", _register),
    _pipeline("image.promote", "copy the file", _promote),
    _pipeline("image.install", "fetch and unpack the bundle", _install),
    _pipeline("kernel.install", "fetch and unpack the bundle", _install),
    _pipeline("kernel.import", "take the files over", _import_kernel),
    Pipeline(
        "cache.prune",
        (
            Step(
                name="prune",
                title="remove what is not used",
                run=_prune,
                why_no_undo="what is in the cache is made or fetched again when it is needed",
                forward_only=True,
                releases=_pruned,
            ),
        ),
    ),
)
