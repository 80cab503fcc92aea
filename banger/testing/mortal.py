"""Die by SIGKILL at one chosen point of an operation, or turn back at one chosen step of it.

A fate is for one process that is forked for it and lives no longer: what it installs (an audit
hook) cannot be taken out again.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from banger.errors import ProgramFailed
from banger.events import vocabulary as ev
from banger.events.log import EventLog, Tx
from banger.model import Value
from banger.tasks.context import Ctx
from banger.tasks.pipeline import Pipeline, Step
from banger.testing.recording import HALF

Moment = Literal["intended", "inside", "acted", "recording", "recorded", "claimed", "requesting", "requested"]
"""Where a worker may die.

`intended`: the step's start is committed, its effect not begun. `inside`: before a file operation of
the effect. `acted`: the effect is done, nothing of it recorded. `recording`: its record is written
and not committed. `recorded`: it is committed, and nothing done after. `claimed`: the operation is
claimed and nothing more. `requesting`, `requested`: the same two for the request of an operation.
"""


class Point(Value):
    """One point of one step, run or undone; `nth` counts file operations for `inside`.

    Without a `step` it is the first such point that the process comes to.
    """

    moment: Moment
    kind: str = ""
    step: str = ""
    back: bool = False
    nth: int = 0


class Trouble(Value):
    """What turns an operation back at one step, whenever that is run.

    It fails before its effect, at its `nth` file operation, or after it; or the operation is
    cancelled when it begins.
    """

    kind: str
    step: str
    when: Literal["before", "inside", "after", "cancel"]
    nth: int = 0


Act = tuple[str, str, bool]
"""A pipeline's kind, a step's name, and whether it is undone."""


class Fate:
    """What is to happen to this process; counts the file operations below `home` of each act."""

    def __init__(self, home: Path, death: Point | None = None, trouble: Trouble | None = None):
        self.counts: dict[str, int] = {}
        self._home = str(home)
        self._death = death
        self._trouble = trouble
        self._count = -1
        self._act: Act | None = None
        self._acted: Act | None = None
        sys.addaudithook(self._heard)

    # -- inside a step -----------------------------------------------------------------------

    def pipelines(self, known: Mapping[str, Pipeline]) -> dict[str, Pipeline]:
        """Give the pipelines with this fate around each of their steps."""
        return {
            kind: Pipeline(kind, tuple(self._around(kind, step) for step in pipeline.steps))
            for kind, pipeline in known.items()
        }

    def _around(self, kind: str, step: Step) -> Step:
        run = functools.partial(self._do, step.run, (kind, step.name, False))
        undo = step.undo and functools.partial(self._do, step.undo, (kind, step.name, True))
        return replace(step, run=run, undo=undo)

    def _do(self, effect: Any, act: Act, ctx: Ctx) -> Any:
        self._die_at("intended", act)
        if self._has("cancel", act):
            ctx.log.cancel(ctx.op.id)
        self._act, self._count = act, 0
        try:
            self._fail("before", act)
            facts = effect(ctx)
            self._fail("inside", act)  # what is done again has less to do: its middle never came
            self._fail("after", act)
        finally:
            self.counts[name(act)] = self._count
            self._act, self._acted = None, act
            self._die_at("inside", act)
            self._die_at("acted", act)
        return facts

    def _heard(self, event: str, words: tuple[Any, ...]) -> None:
        if self._act is None or not self._is_ours(event, words):
            return
        self._count += 1
        self._die_at("inside", self._act, self._count)
        self._fail("inside", self._act, self._count)

    def _is_ours(self, event: str, words: tuple[Any, ...]) -> bool:
        """Tell a file operation on this host from Python's own; a path that is not whole is below ours."""
        if event not in ("open", HALF) and not event.startswith(("os.", "fcntl.", "socket.")):
            return False
        first = words[0] if words else None
        path = os.fsdecode(first) if isinstance(first, str | bytes | os.PathLike) else ""
        return not path.startswith("/") or path.startswith(self._home)

    # -- around a transaction ----------------------------------------------------------------

    def commits(self, tx: Tx) -> None:
        """Die before a commit, if that is the fate."""
        if any(isinstance(row.event, ev.OpRequested) for row in tx.recorded):
            self._die_at("requesting")
        if self._acted is not None:
            self._die_at("recording", self._acted)

    def committed(self, tx: Tx) -> None:
        """Die after a commit, if that is the fate."""
        if any(isinstance(row.event, ev.OpRequested) for row in tx.recorded):
            self._die_at("requested")
        if any(isinstance(row.event, ev.OpClaimed) for row in tx.recorded):
            self._die_at("claimed")
        if self._acted is not None:
            acted, self._acted = self._acted, None
            self._die_at("recorded", acted)

    # -- the end -----------------------------------------------------------------------------

    def _die_at(self, moment: Moment, act: Act = ("", "", False), nth: int | None = None) -> None:
        death = self._death
        if death is None or death.moment != moment or nth not in (None, death.nth):
            return
        if not death.step or (death.kind, death.step, death.back) == act:
            _die()

    def _fail(self, when: str, act: Act, nth: int | None = None) -> None:
        if self._has(when, act, nth):
            raise ProgramFailed(f"{act[1]} is fated to fail")

    def _has(self, when: str, act: Act, nth: int | None = None) -> bool:
        trouble = self._trouble
        if trouble is None or trouble.when != when or nth not in (None, trouble.nth):
            return False
        return (trouble.kind, trouble.step, False) == act


def name(act: Act) -> str:
    """Name an act, for example `vm.create/disks/undo`."""
    kind, step, back = act
    return f"{kind}/{step}/{'undo' if back else 'run'}"


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


class MortalLog(EventLog):
    """An event log that tells a fate of its commits."""

    fate: Fate | None = None

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[Tx]:
        """Append as an EventLog does; see `EventLog.transaction`."""
        with super().transaction(durable=durable) as tx:
            yield tx
            if self.fate is not None:
                self.fate.commits(tx)
        if self.fate is not None:
            self.fate.committed(tx)
