"""Pipelines without a guest, for benchmarks and crash tests of the real workers.

They are known to workers whose environment has `BANGER_PIPELINES=banger.testing.pipelines`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from banger.errors import GuestSilent, ProgramFailed
from banger.model import Resource
from banger.tasks.context import Ctx
from banger.tasks.pipeline import Pipeline, Step

NOOP_STEPS = 18


def _noop(_: Ctx) -> None:
    pass


NOOP = Pipeline(
    "test.noop",
    tuple(Step(name=f"step-{n:02}", title=f"step {n}", run=_noop, undo=_noop) for n in range(NOOP_STEPS)),
)


def _file(name: str) -> Callable[[Ctx], Path]:
    return lambda ctx: Path(str(ctx.args["directory"]), name)


def _trip(ctx: Ctx, point: str) -> None:
    """Do what the operation was asked to do at this point: hang, fail, dawdle or crash its worker.

    Each trap springs once: the file that marks it is made first.
    """
    trap = ctx.args.get("traps", {}).get(point)
    if trap is None:
        return
    mark = Path(str(ctx.args["directory"]), f".sprung-{point.replace('/', '-')}")
    if mark.exists() and not ctx.args.get("always"):
        return
    mark.touch()
    match trap:
        case "crash":
            os._exit(9)
        case "fail":
            raise ProgramFailed(f"told to fail at {point}")
        case "retry":
            raise GuestSilent(f"told to fail once at {point}")
        case "hang":
            while not ctx.cancelled():
                time.sleep(0.02)
            raise ProgramFailed("was told to stop hanging")
        case "slow":
            time.sleep(1.5)
        case "freeze":
            time.sleep(3600)


def _step(name: str, **more: Any) -> Step:
    """Make a step that acquires one file, in two writes, with a trap at each boundary."""
    path = _file(name)

    def run(ctx: Ctx) -> dict[str, Any]:
        _trip(ctx, f"{name}/before")
        with path(ctx).open("w") as file:
            file.write("half ")
            file.flush()
            _trip(ctx, f"{name}/half")
            file.write("whole")
        _trip(ctx, f"{name}/after")
        return {name: str(path(ctx))}

    def undo(ctx: Ctx) -> None:
        _trip(ctx, f"{name}/undo-before")
        with contextlib.suppress(FileNotFoundError):
            path(ctx).unlink()
        _trip(ctx, f"{name}/undo-after")

    return Step(
        name=name,
        title=f"make {name}",
        run=run,
        undo=undo,
        acquires=lambda ctx: [Resource(kind="file", id=str(path(ctx)))],
        attempts=2,
        **more,
    )


FILES = Pipeline("test.files", (_step("one"), _step("two"), _step("three", deadline_s=1.5)))
"""Makes three files; `args.traps` maps a point such as `two/half` to crash, fail, retry, hang or freeze."""

PIPELINES = (NOOP, FILES)
