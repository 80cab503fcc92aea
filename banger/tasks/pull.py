"""Images from registries: the layers are fetched by digest, then made into what VMs boot from."""

from __future__ import annotations

from typing import Any

import msgspec

from banger.events.vocabulary import Facts
from banger.images import store
from banger.images.remote.oci import Pulled, artifact_digest
from banger.model import Resource
from banger.tasks.artifacts import forget_unpublished, publish
from banger.tasks.context import Ctx
from banger.tasks.pipeline import Pipeline, Step

FETCH_S = 4 * 3600.0
MAKE_S = FETCH_S + 3600.0
"""What was pruned meanwhile is fetched again."""


def _fetch(ctx: Ctx) -> dict[str, Any]:
    found = ctx.world.puller.fetch(
        str(ctx.args["reference"]),
        ctx.dirs.blobs,
        limits=ctx.config.limits,
        progress=ctx.progress,
        cancelled=ctx.cancelled,
    )
    return {"pulled": msgspec.to_builtins(found, enc_hook=str)}


def _pulled(facts: Facts) -> Pulled:
    return msgspec.convert(facts["pulled"], Pulled, dec_hook=lambda kind, value: kind(value))


def _artifact(ctx: Ctx) -> list[Resource]:
    return [Resource(kind="artifact", id=f"image:{artifact_digest(_pulled(ctx.facts).digest)}")]


def _make(ctx: Ctx) -> dict[str, Any]:
    found, name = _pulled(ctx.facts), str(ctx.args["name"])
    digest = artifact_digest(found.digest)
    artifact = store.build(
        ctx.dirs.cache,
        "image",
        name,
        digest,
        lambda staging: ctx.world.puller.make(
            found,
            staging,
            name,
            blobs=ctx.dirs.blobs,
            limits=ctx.config.limits,
            progress=ctx.progress,
            cancelled=ctx.cancelled,
        ),
        ctx.cancelled,
    )
    publish(ctx, msgspec.structs.replace(artifact, name=name))
    return {"digest": digest}


PULL_IMAGE = Pipeline(
    "image.pull",
    (
        Step(
            name="fetch",
            title="fetch the layers",
            run=_fetch,
            why_no_undo="blobs are the cache's, by their digests; beginnings of them are gone on with",
            attempts=3,
            deadline_s=FETCH_S,
        ),
        Step(
            name="make",
            title="make the image",
            run=_make,
            undo=forget_unpublished,
            acquires=_artifact,
            deadline_s=MAKE_S,
        ),
    ),
)
PIPELINES = (PULL_IMAGE,)
