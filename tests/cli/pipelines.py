"""An operation that a test holds and lets go, for real daemons with `BANGER_PIPELINES=tests.cli.pipelines`.

Files in its directory steer it: `fail` makes it fail, `go` ends its waiting, `hold` stops its undo.
"""

from __future__ import annotations

import time
from pathlib import Path

from banger.errors import Cancelled, ProgramFailed
from banger.model import Resource
from banger.tasks.context import Ctx
from banger.tasks.pipeline import Pipeline, Step

LOOK_S = 0.02


def _place(ctx: Ctx, name: str) -> Path:
    return Path(str(ctx.args["directory"]), name)


def _make(ctx: Ctx) -> None:
    _place(ctx, "made").touch()


def _unmake(ctx: Ctx) -> None:
    while _place(ctx, "hold").exists():
        time.sleep(LOOK_S)
    _place(ctx, "made").unlink(missing_ok=True)


def _hang(ctx: Ctx) -> None:
    if _place(ctx, "fail").exists():
        raise ProgramFailed("told to fail")
    while not _place(ctx, "go").exists():
        if ctx.cancelled():
            raise Cancelled
        time.sleep(LOOK_S)


PATIENT = Pipeline(
    "test.patient",
    (
        Step(
            name="make",
            title="make",
            run=_make,
            undo=_unmake,
            acquires=lambda ctx: [Resource(kind="file", id=str(_place(ctx, "made")))],
        ),
        Step(name="hang", title="hang", run=_hang, why_no_undo="it makes nothing"),
    ),
)

PIPELINES = (PATIENT,)
