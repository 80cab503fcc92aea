"""Images and kernels: made once, by one operation, for everyone who waits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from banger.errors import Busy, NotFound
from banger.events import queries
from banger.events import vocabulary as ev
from banger.events.log import EventLog
from banger.images import debian, store
from banger.images import kernel as kernels
from banger.model import Artifact, Resource
from banger.tasks.context import Ctx, Maker
from banger.tasks.pipeline import Pipeline, Step

BUILD_S = 1200.0
R = TypeVar("R")


def _name(ctx: Ctx) -> str:
    return str(ctx.args["name"])


def _recipe(recipes: Mapping[str, R], ctx: Ctx) -> R:
    """Find the recipe of what is to be made. Raises NotFound."""
    recipe = recipes.get(_name(ctx))
    if recipe is None:
        raise NotFound(
            f"{_name(ctx)} is not in the cache any more, and there is no recipe to make it again.",
            hint="Register, import or pull it again.",
        )
    return recipe


def _build_image(ctx: Ctx) -> None:
    recipe = _recipe(debian.RECIPES, ctx)
    _build(ctx, ctx.world.images, recipe)


def _pull_kernel(ctx: Ctx) -> None:
    recipe = _recipe(kernels.RECIPES, ctx)
    _build(ctx, ctx.world.kernels, recipe)


def _build(ctx: Ctx, maker: Maker[R], recipe: R) -> None:
    publish(ctx, maker.build(recipe, ctx.dirs.cache, progress=ctx.progress, cancelled=ctx.cancelled))


def publish(ctx: Ctx, artifact: Artifact) -> None:
    """Record that an artifact is in the cache, under its name; an image also with its VMs' kernel, if named.

    The kernel is no part of the artifact: images of one digest may have different ones.
    """
    kernel = ctx.args.get("vm_kernel")
    published = ev.ArtifactPublished(
        kind=artifact.kind,
        name=artifact.name,
        digest=artifact.digest,
        size_bytes=artifact.size_bytes,
        details=msgspec.to_builtins(artifact.details) | ({"kernel": kernel} if kernel else {}),
    )
    ctx.emit(f"{artifact.kind}-{artifact.name}", published)


def deletable(log: EventLog, kind: str, name: str) -> str:
    """Give the digest of an image or kernel that no VM uses. Raises NotFound, Busy."""
    known = queries.artifact(log, kind, name)
    if known is None:
        raise NotFound(f"There is no {kind} named {name!r}.", hint=f"`banger {kind} list` shows them.")
    users = [
        vm.spec.name
        for vm in queries.vms(log)
        if known.digest in (vm.image_digest, vm.kernel_digest)
        or (vm.image_digest is None and name == getattr(vm.spec, kind))
    ]
    if users:
        raise Busy(
            f"The {kind} {name} is used by {', '.join(users)}.",
            hint=f"`banger vm delete {' '.join(users)}`",
        )
    return known.digest


def _delete(ctx: Ctx) -> None:
    kind, name = str(ctx.args["kind"]), _name(ctx)
    digest = deletable(ctx.log, kind, name)  # it may have come into use since it was asked for
    store.delete(ctx.dirs.cache, kind, digest)
    deleted = ev.ArtifactDeleted(kind=ctx.args["kind"], name=name, digest=digest)
    ctx.emit(f"{kind}-{name}", deleted)


def _artifact_resource(ctx: Ctx) -> list[Resource]:
    if ctx.op.kind == BUILD_IMAGE.kind:
        return [Resource(kind="artifact", id=f"image:{_recipe(debian.RECIPES, ctx).digest}")]
    return [Resource(kind="artifact", id=f"kernel:{_recipe(kernels.RECIPES, ctx).digest}")]


def forget_unpublished(ctx: Ctx) -> None:
    """Sweep what a dead builder left; what was published whole stays in the cache."""
    store.sweep(ctx.dirs.cache)


def _released(ctx: Ctx) -> list[Resource]:
    return [
        Resource(kind="artifact", id=f"{event.kind}:{event.digest}")
        for _, event in ctx.emitted
        if isinstance(event, ev.ArtifactDeleted)
    ]


BUILD_IMAGE = Pipeline(
    "image.build",
    (
        Step(
            name="build",
            title="build the image",
            run=_build_image,
            undo=forget_unpublished,
            acquires=_artifact_resource,
            deadline_s=BUILD_S,
        ),
    ),
)
PULL_KERNEL = Pipeline(
    "kernel.pull",
    (
        Step(
            name="pull",
            title="fetch the kernel",
            run=_pull_kernel,
            undo=forget_unpublished,
            acquires=_artifact_resource,
            deadline_s=BUILD_S,
        ),
    ),
)


def _delete_pipeline(kind: str) -> Pipeline:
    step = Step(
        name="delete",
        title=f"delete the {kind}",
        run=_delete,
        why_no_undo="it is built again when it is next needed",
        releases=_released,
    )
    return Pipeline(f"{kind}.delete", (step,))


PIPELINES = (BUILD_IMAGE, PULL_KERNEL, _delete_pipeline("image"), _delete_pipeline("kernel"))
