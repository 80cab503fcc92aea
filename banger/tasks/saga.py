"""Drive one operation: fold its events, do the one next thing, append, and again.

A step is recorded as *started*, with the resources it is about to acquire, before it acts, and as
*done* with its facts after. Undo counts what was started, not what was done, so a half-made effect
is undone too. Every append checks that this worker still has the operation. The end of one step
and the start of the next are one transaction.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import structlog

from banger import log as logging
from banger.errors import BangerError, Cancelled, Fenced, from_os_error
from banger.events import queries, work
from banger.events import vocabulary as ev
from banger.events.fold import fold_on
from banger.events.log import EventLog, Tx
from banger.model import Resource
from banger.tasks.context import Ctx, World
from banger.tasks.pipeline import Finish, Park, Pipeline, Step

CRASHES_ALLOWED = 3
"""So often may a step be started without an end before it is taken for the cause."""

UNDO_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Turn:
    """The one next thing to do: run a step, or undo it."""

    index: int
    step: Step
    back: bool


def backoff_s(attempt: int) -> float:
    """Wait longer after each failure: 0.1, 0.2, 0.4 … at most 10 seconds."""
    return float(min(10.0, 0.1 * 2 ** (attempt - 1)))


class Saga:
    """One operation in the hands of the worker that claimed it."""

    def __init__(self, log: EventLog, pipelines: Mapping[str, Pipeline], world: World, claim: work.Claim):
        self.op = queries.whole_op(log, claim.op)
        self._log = log
        self._pipelines = pipelines
        self._world = world
        self._claim = claim
        self._say = logging.get(op=claim.op, kind=self.op.kind)

    def advance(self) -> None:
        """Go on until the operation ends, parks or waits for another attempt.

        Returns quietly when another worker has taken over.
        """
        with structlog.contextvars.bound_contextvars(op=self.op.id):
            try:
                turn = self._record()
                while turn is not None:
                    turn = self._undo(turn) if turn.back else self._run(turn)
            except Fenced:
                self._say.warning("fenced", epoch=self._claim.epoch)

    def release(self) -> None:
        """Give the operation back because this worker is asked to stop; it goes on elsewhere."""
        with contextlib.suppress(Fenced), self._log.transaction() as tx:
            work.guard(tx, self._claim)
            stopped = ev.OpInterrupted(epoch=self._claim.epoch, reason="the worker stops", graceful=True)
            tx.append(self.op.id, stopped, op=self.op.id)

    # -- deciding ----------------------------------------------------------------------------

    def _decide(self, tx: Tx, *, cancel: bool) -> Turn | None:
        """Append the start of the next thing to do and return it; None when there is none."""
        if not self.op.undoing:
            index = self.op.next_step()
            if index is None:
                self._append(tx, ev.OpEnded(fate="done"))
                return None
            if cancel and not self._past_return():
                self._append(tx, ev.OpUndoing(error=Cancelled().to_dict()))
            else:
                turn = self._start(tx, index)
                if turn is not None:
                    return turn
        return None if self.op.state == "ended" else self._start_undo(tx)

    def _start(self, tx: Tx, index: int) -> Turn | None:
        """Start a step; None when the operation was turned back or parked as stuck instead."""
        state = self.op.steps[index]
        try:
            step = self._pipeline().step(state.name)
            if state.state == "started" and state.attempts >= CRASHES_ALLOWED:
                raise BangerError(f"The step {state.name!r} ended its worker {state.attempts} times.")
        except BangerError as error:
            self._give_up(tx, error)
            return None
        self._append(
            tx,
            ev.StepStarted(
                step=index,
                name=state.name,
                title=state.title,
                attempt=state.attempts + 1,
                deadline_s=step.deadline_s,
            ),
        )
        try:
            wanted = list(step.acquires(self._ctx(index)))
        except Exception as unexpected:
            failure = self._as_banger(unexpected)
            self._append(tx, ev.StepFailed(step=index, name=state.name, error=failure.to_dict()))
            self._give_up(tx, failure)
            return None
        for resource in wanted:
            self._append(tx, ev.ResourceIntended(resource=resource, vm=self.op.vm, step=state.name))
        return Turn(index, step, back=False)

    def _start_undo(self, tx: Tx) -> Turn | None:
        while (index := self.op.next_undo()) is not None:
            state = self.op.steps[index]
            try:
                step = self._pipeline().step(state.name)
            except BangerError as error:
                self._append(tx, ev.UndoFailed(step=index, name=state.name, error=error.to_dict()))
                self._stuck(tx)
                return None
            if step.undo is None:
                self._append(tx, ev.UndoDone(step=index, name=state.name, seconds=0.0))
                continue
            if state.undo_attempts >= UNDO_ATTEMPTS:
                self._stuck(tx)
                return None
            attempt = state.undo_attempts + 1
            self._append(
                tx,
                ev.UndoStarted(step=index, name=state.name, attempt=attempt, deadline_s=step.deadline_s),
            )
            return Turn(index, step, back=True)
        cancelled = (self.op.error or {}).get("code") == Cancelled.code
        self._append(tx, ev.OpEnded(fate="cancelled" if cancelled else "undone", error=self.op.error))
        return None

    def _give_up(self, tx: Tx, error: BangerError) -> None:
        """After the last attempt at a step: turn back, or stick where there is no way back."""
        self._append(tx, ev.OpUndoing(error=error.to_dict()))
        if self._past_return():
            self._stuck(tx)

    def _stuck(self, tx: Tx) -> None:
        """End the operation as stuck; what failed on the way back is joined to the first error."""
        error = dict(self.op.error or {})
        if self.op.undo_errors:
            error["undo_errors"] = [e.get("message") for e in self.op.undo_errors[-UNDO_ATTEMPTS:]]
        self._append(tx, ev.OpEnded(fate="stuck", error=error))

    def _past_return(self) -> bool:
        """Tell whether a step without a way back has been started."""
        return self._pipeline().no_return(self.op) is not None

    # -- doing -------------------------------------------------------------------------------

    def _run(self, turn: Turn) -> Turn | None:
        ctx = self._ctx(turn.index)
        began = time.monotonic()
        last = False
        try:
            facts = turn.step.run(ctx) or {}
        except Finish:
            facts, last = {}, True
        except Park as park:
            return self._park(park)
        except Exception as error:
            return self._failed(turn, self._as_banger(error))
        done = ev.StepDone(
            step=turn.index,
            name=turn.step.name,
            seconds=round(time.monotonic() - began, 6),
            facts=facts,
            last=last,
        )
        ends = last or turn.index == len(self.op.steps) - 1
        return self._record(done, *self._settle(turn, ctx, finished=last), emitted=ctx.emitted, durable=ends)

    def _settle(self, turn: Turn, ctx: Ctx, *, finished: bool) -> list[ev.Event]:
        """Tell what a done step now holds and what it has given back: nothing if it found all done."""
        name, vm = turn.step.name, self.op.vm
        held: list[ev.Event] = [
            ev.ResourceHeld(resource=resource, vm=vm, step=name)
            for resource, state, step in self.op.resources.values()
            if step == name and state == "intended"
        ]
        if finished:
            return held
        return held + [
            ev.ResourceReleased(resource=resource, vm=vm, step=name) for resource in turn.step.releases(ctx)
        ]

    def _undo(self, turn: Turn) -> Turn | None:
        assert turn.step.undo is not None
        ctx = self._ctx(turn.index)
        began = time.monotonic()
        try:
            turn.step.undo(ctx)
        except Exception as error:
            attempt = self.op.steps[turn.index].undo_attempts
            failed = ev.UndoFailed(
                step=turn.index,
                name=turn.step.name,
                error=self._as_banger(error).to_dict(),
                retry_in_s=backoff_s(attempt) if attempt < UNDO_ATTEMPTS else None,
            )
            return self._record(failed, release=failed.retry_in_s is not None, durable=True)
        undone = ev.UndoDone(step=turn.index, name=turn.step.name, seconds=round(time.monotonic() - began, 6))
        released = [
            ev.ResourceReleased(resource=resource, vm=self.op.vm, step=step)
            for resource, step in self._open_resources(turn.step.name)
        ]
        return self._record(undone, *released, emitted=ctx.emitted, durable=True)

    def _failed(self, turn: Turn, error: BangerError) -> Turn | None:
        again = error.retry and self.op.steps[turn.index].attempts < turn.step.attempts
        retry_in_s = backoff_s(self.op.steps[turn.index].attempts) if again else None
        failed = ev.StepFailed(
            step=turn.index, name=turn.step.name, error=error.to_dict(), retry_in_s=retry_in_s
        )
        self._say.warning("step failed", step=turn.step.name, error=error.message, retry_in_s=retry_in_s)
        return self._record(failed, release=again, give_up=None if again else error, durable=not again)

    def _park(self, park: Park) -> Turn | None:
        """Wait for another operation, which is requested unless one like it is on its way."""
        with self._log.transaction(durable=True) as tx:
            if work.guard(tx, self._claim):
                return self._decide(tx, cancel=True)
            child = queries.active_op(self._log, park.request.kind, park.request.lane)
            if child is None:
                child = tx.mint("op")
                tx.append(child, msgspec.structs.replace(park.request, parent=self.op.id), op=child)
            self._append(tx, ev.OpParked(on=child, reason=park.reason))
            return None

    def _as_banger(self, error: Exception) -> BangerError:
        if isinstance(error, BangerError):
            return error
        self._say.error("unexpected", exc_info=error)
        if isinstance(error, OSError):
            return from_os_error(error)
        return BangerError(f"{type(error).__name__}: {error}", hint="The daemon's log has the whole story.")

    # -- recording ---------------------------------------------------------------------------

    def _record(
        self,
        *events: ev.Event,
        emitted: list[tuple[str, ev.Event]] | None = None,
        release: bool = False,
        give_up: BangerError | None = None,
        durable: bool = False,
    ) -> Turn | None:
        """Append in one transaction what happened and what comes next; return the latter."""
        with self._log.transaction(durable=durable) as tx:
            cancel = work.guard(tx, self._claim)
            for event in events:
                self._append(tx, event)
            for stream, event in emitted or ():
                tx.append(stream, event, op=self.op.id)
            if release:
                return None
            if give_up is not None:
                self._give_up(tx, give_up)
                if self.op.state == "ended":
                    return None
            return self._decide(tx, cancel=cancel)

    def _append(self, tx: Tx, event: ev.Event) -> None:
        fold_on(self.op, tx.append(self.op.id, event, op=self.op.id))

    def _open_resources(self, step: str) -> list[tuple[Resource, str]]:
        return [(r, s) for r, state, s in self.op.resources.values() if s == step and state != "released"]

    def _ctx(self, index: int) -> Ctx:
        return Ctx(self._log, self._world, self._claim, self.op, index)

    def _pipeline(self) -> Pipeline:
        return self._pipelines.get(self.op.kind, Pipeline(self.op.kind, ()))
