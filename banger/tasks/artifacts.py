"""Images and kernels: made once, by one operation, for everyone who waits."""

from __future__ import annotations

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


def foresee_kernel(ctx: Ctx, name: str) -> None:
    """Have the kernel fetched beside the image when both are missing."""
    if _published(ctx, "kernel", name) is None:
        ctx.foresee(PULL_KERNEL, lane=f"kernel:{name}", args={"name": name})


def image(ctx: Ctx, name: str) -> Artifact:
    """Give the image of this name; wait for the operation that builds it when there is none."""
    return ctx.require(
        lambda: _published(ctx, "image", name),
        BUILD_IMAGE,
        lane=f"image:{name}",
        args={"name": name},
        reason=f"the image {name} is built",
    )


def kernel(ctx: Ctx, name: str) -> Artifact:
    """Give the kernel of this name; wait for the operation that fetches it when there is none."""
    return ctx.require(
        lambda: _published(ctx, "kernel", name),
        PULL_KERNEL,
        lane=f"kernel:{name}",
        args={"name": name},
        reason=f"the kernel {name} is fetched",
    )


def _published(ctx: Ctx, kind: str, name: str) -> Artifact | None:
    """Find an artifact by its name in the log and its digest in the cache.

    A local recipe that changed with this version of banger (or a cache that was emptied) is made
    again.
    """
    known = queries.artifact(ctx.log, kind, name)
    recipes = debian.RECIPES if kind == "image" else kernels.RECIPES
    recipe = recipes.get(name)
    if known is None or (recipe is not None and recipe.digest != known.digest):
        return None
    return store.find(ctx.dirs.cache, kind, known.digest)


def _name(ctx: Ctx) -> str:
    return str(ctx.args["name"])


def _build_image(ctx: Ctx) -> None:
    recipe = debian.RECIPES[_name(ctx)]
    _publish(ctx, ctx.world.images, recipe)


def _pull_kernel(ctx: Ctx) -> None:
    recipe = kernels.RECIPES[_name(ctx)]
    _publish(ctx, ctx.world.kernels, recipe)


def _publish(ctx: Ctx, maker: Maker[R], recipe: R) -> None:
    artifact = maker.build(recipe, ctx.dirs.cache, progress=ctx.progress, cancelled=ctx.cancelled)
    published = ev.ArtifactPublished(
        kind=artifact.kind,
        name=artifact.name,
        digest=artifact.digest,
        size_bytes=artifact.size_bytes,
        details=msgspec.to_builtins(artifact.details),
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
    kind, recipes = (
        ("image", debian.RECIPES) if ctx.op.kind == BUILD_IMAGE.kind else ("kernel", kernels.RECIPES)
    )
    return [Resource(kind="artifact", id=f"{kind}:{recipes[_name(ctx)].digest}")]


def _forget_unpublished(ctx: Ctx) -> None:
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
            undo=_forget_unpublished,
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
            undo=_forget_unpublished,
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
