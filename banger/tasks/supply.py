"""The image and the kernel that a VM boots from: found, or made by an operation that it waits for."""

from __future__ import annotations

from banger.errors import NotFound
from banger.events import queries
from banger.events.log import EventLog
from banger.images import debian, local, store
from banger.images import kernel as kernels
from banger.model import Artifact
from banger.tasks.artifacts import BUILD_IMAGE, PULL_KERNEL
from banger.tasks.context import Ctx
from banger.tasks.pull import PULL_IMAGE


def foresee_kernel(ctx: Ctx, name: str) -> None:
    """Have the kernel fetched beside the image when both are missing."""
    if published(ctx, "kernel", name) is None:
        ctx.foresee(PULL_KERNEL, lane=f"kernel:{name}", args={"name": name})


def image(ctx: Ctx, name: str) -> Artifact:
    """Give the image of this name; wait for the operation that makes it when there is none."""
    reference = reference_of(ctx.log, name, ctx.args.get("reference"))
    pipeline, args = (PULL_IMAGE, {"reference": reference}) if reference else (BUILD_IMAGE, {})
    return ctx.require(
        lambda: published(ctx, "image", name),
        pipeline,
        lane=f"image:{name}",
        args={**args, "name": name, **named_kernel(ctx.log, name)},
        reason=f"the image {name} is {'pulled' if reference else 'built'}",
    )


def reference_of(log: EventLog, name: str, asked: str | None = None) -> str | None:
    """Tell what an image can be pulled by: as it was before, pinned, else as it is asked for now."""
    known = queries.artifact(log, "image", name)
    if known is None or "manifest" not in known.details:
        return asked
    repository = str(known.details["reference"]).partition("@")[0]
    return f"{repository}@{known.details['manifest']}"


def named_kernel(log: EventLog, image: str) -> dict[str, str]:
    """Give what an operation is to be asked with so that an image keeps the kernel named for its VMs."""
    known = queries.artifact(log, "image", image)
    named = known.details.get("kernel") if known else None
    return {"vm_kernel": str(named)} if named else {}


def kernel(ctx: Ctx, name: str) -> Artifact:
    """Give the kernel of this name; wait for the operation that fetches it when there is none."""
    return ctx.require(
        lambda: published(ctx, "kernel", name),
        PULL_KERNEL,
        lane=f"kernel:{name}",
        args={"name": name},
        reason=f"the kernel {name} is fetched",
    )


def in_cache(ctx: Ctx, kind: str) -> Artifact:
    """Give the image or kernel that a VM is made of. Raises NotFound, and InvalidImage when it changed."""
    digest = ctx.facts[f"{kind}_digest"]
    found = store.find(ctx.dirs.cache, kind, digest)
    if found is None:
        raise NotFound(f"The {kind} {digest[:12]} is no longer in the cache.")
    local.check(found)
    return found


def published(ctx: Ctx, kind: str, name: str) -> Artifact | None:
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
