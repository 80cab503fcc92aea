"""Declare an operation: a pipeline is a visible tuple of steps, each with its undo beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from banger.errors import BangerError
from banger.events import fold
from banger.events.fold import Op
from banger.events.vocabulary import OpRequested
from banger.model import Needs, Resource

if TYPE_CHECKING:
    from banger.tasks.context import Ctx

Run = Callable[["Ctx"], dict[str, Any] | None]
Undo = Callable[["Ctx"], None]
Resources = Callable[["Ctx"], Iterable[Resource]]


def _nothing(_: Ctx) -> Iterable[Resource]:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One named step.

    `run` is "make it so": safe to repeat after a crash anywhere inside it. `undo` is "make it not
    so": succeeds when there is nothing to undo, and needs no result of `run`. A step that
    acquires something says what before it acts (`acquires`); what it gives back is in `releases`.
    A step without `undo` says why. After a `forward_only` step there is no way back: if it fails
    for good the operation is stuck rather than undone. A step of the `root` pool has its effect
    made by root's workers, at the request of the owner's.
    """

    name: str
    title: str
    run: Run
    undo: Undo | None = None
    why_no_undo: str = ""
    forward_only: bool = False
    acquires: Resources = _nothing
    releases: Resources = _nothing
    attempts: int = 1
    deadline_s: float = 60.0
    pool: Literal["owner", "root"] = "owner"

    def __post_init__(self) -> None:
        if self.undo is None and not self.why_no_undo:
            raise TypeError(f"step {self.name} has no undo and does not say why")
        if self.undo is None and self.acquires is not _nothing and not self.forward_only:
            raise TypeError(f"step {self.name} acquires something and cannot undo it")


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A kind of operation: its name and its steps, in order."""

    kind: str
    steps: tuple[Step, ...]

    def step(self, name: str) -> Step:
        """Find a step by the name that an operation pinned when it was requested."""
        for step in self.steps:
            if step.name == name:
                return step
        raise BangerError(f"This version of banger has no step {name!r} in {self.kind}.")

    def no_return(self, op: Op) -> fold.Step | None:
        """Give the step without a way back that an operation has come to, if it has."""
        one_way = {step.name for step in self.steps if step.forward_only}
        return next((step for step in op.steps if step.touched and step.name in one_way), None)

    def request(
        self,
        *,
        lane: str,
        args: dict[str, Any] | None = None,
        vm: str | None = None,
        name: str | None = None,
        needs: Needs | None = None,
        leave_out: frozenset[str] = frozenset(),
    ) -> OpRequested:
        """Make the event that asks for this operation and pins its steps."""
        steps = [step for step in self.steps if step.name not in leave_out]
        return OpRequested(
            kind=self.kind,
            args=args or {},
            steps=tuple(step.name for step in steps),
            titles=tuple(step.title for step in steps),
            lane=lane,
            vm=vm,
            name=name,
            needs=needs,
        )


class Finish(Exception):
    """The operation's aim is reached already: the steps that are left are not needed."""


class Park(Exception):
    """The step needs what another operation makes: join or request it, and wait without a worker."""

    def __init__(self, request: OpRequested, reason: str):
        self.request = request
        self.reason = reason
        super().__init__(reason)
