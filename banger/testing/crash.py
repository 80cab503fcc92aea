"""Every pipeline with traps: kill -9 at a chosen point of a chosen step, in the real workers.

Known to workers whose environment has `BANGER_PIPELINES=banger.testing.crash` and BANGER_TRAPS, a
directory. Traps are files in it, sprung in the order of their names, each once: the one that
springs is renamed first. Where no trap is meant for a step, the number of audit events that it
raised is written down, so that a test can choose the middle of it.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from banger.errors import ProgramFailed
from banger.model import Value
from banger.tasks.context import Ctx
from banger.tasks.pipeline import Pipeline, Step
from banger.tasks.registry import OWN

DIRECTORY = "BANGER_TRAPS"
Point = Literal["before", "inside", "after"]
Victim = Literal["worker", "daemon", "everyone", "nobody"]


class Trap(Value):
    """Kill `who` at a point of a step. `nth` counts audit events for `inside`; nobody: fail the step.

    `before` is after the intent is recorded and before the effect; `after` is before it is recorded.
    """

    kind: str
    step: str
    point: Point
    who: Victim
    back: bool = False
    nth: int = 1


class _Armed:
    """The trap that waits inside the step this worker is running, if any (audit hooks stay for good)."""

    count = 0
    trap: Trap | None = None
    ctx: Ctx | None = None
    hooked = False


def set_traps(directory: Path, *traps: Trap) -> None:
    """Set traps that spring one after another."""
    for number, trap in enumerate(traps):
        (directory / f"{number:03}.trap").write_bytes(msgspec.json.encode(trap))


def unsprung(directory: Path) -> list[Trap]:
    """List the traps that nobody has stepped on."""
    found = sorted(directory.glob("*.trap"))
    return [msgspec.json.decode(path.read_bytes(), type=Trap) for path in found]


def counted(directory: Path, kind: str, step: str, *, back: bool = False) -> int:
    """Tell how many audit events the step raised when nothing was in its way."""
    return int((directory / f"{kind}.{step}.{'undo' if back else 'run'}.count").read_text())


def _directory() -> Path:
    return Path(os.environ[DIRECTORY])


def _spring(ctx: Ctx, trap: Trap) -> None:
    """Spring the trap. A daemon's workers learn of its death from the kernel, by SIGTERM."""
    if trap.who == "nobody":
        raise ProgramFailed(f"trapped at {trap.step}")
    if trap.who in ("daemon", "everyone"):
        os.kill(int(ctx.dirs.daemon_lock.read_text()), signal.SIGKILL)
    if trap.who == "everyone":
        os.kill(os.getppid(), signal.SIGKILL)
    if trap.who == "daemon":
        signal.pause()
    os.kill(os.getpid(), signal.SIGKILL)


def _hook(event: str, _: Any) -> None:
    if _Armed.ctx is None or event.startswith(("object.", "sys.", "import", "gc.", "sqlite3.")):
        return
    _Armed.count += 1
    if _Armed.trap is not None and _Armed.count == _Armed.trap.nth:
        trap, _Armed.trap = _Armed.trap, None
        _spring(_Armed.ctx, trap)


def _trapped(kind: str, step: str, work: Callable[[Ctx], Any], back: bool, ctx: Ctx) -> Any:
    trap = _claim(kind, step, back)
    _Armed.trap = None
    if trap is not None and trap.point == "before":
        _spring(ctx, trap)
    if not _Armed.hooked:
        sys.addaudithook(_hook)
        _Armed.hooked = True
    _Armed.count, _Armed.trap, _Armed.ctx = 0, trap if trap and trap.point == "inside" else None, ctx
    try:
        facts = work(ctx)
    finally:
        _Armed.ctx = None
    if trap is None:
        name = f"{kind}.{step}.{'undo' if back else 'run'}.count"
        (_directory() / name).write_text(str(_Armed.count))
    elif trap.point == "after" or _Armed.trap is not None:
        # A step that is run again has less to do, and may end before its middle of last time.
        _spring(ctx, trap)
    return facts


def _claim(kind: str, step: str, back: bool) -> Trap | None:
    """Take the next trap if it is meant for this step; the rename makes sure it springs once."""
    for path in sorted(_directory().glob("*.trap"))[:1]:
        trap = msgspec.json.decode(path.read_bytes(), type=Trap)
        if (trap.kind, trap.step, trap.back) == (kind, step, back):
            path.rename(path.with_suffix(".sprung"))
            return trap
    return None


def _with_traps(kind: str, step: Step) -> Step:
    run = functools.partial(_trapped, kind, step.name, step.run, False)
    undo = None if step.undo is None else functools.partial(_trapped, kind, step.name, step.undo, True)
    return replace(step, run=run, undo=undo)


PIPELINES = tuple(
    Pipeline(pipeline.kind, tuple(_with_traps(pipeline.kind, step) for step in pipeline.steps))
    for pipeline in OWN
)
