"""Kill real workers at every point of every registered pipeline, recover, and ask the oracle."""

from __future__ import annotations

import functools
import gc
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from banger import log as logging
from banger.model import Value
from banger.tasks.pipeline import Pipeline, Step
from banger.tasks.registry import pipelines
from banger.testing import mortal
from banger.testing.child import Child
from banger.testing.lane import Case, Lane, Verdict
from banger.testing.mortal import Moment, Point, Trouble
from banger.testing.scenes import CREATE_ALL, IN_JAIL, ON_BRIDGE, ON_SNAPSHOT, SCENES

AROUND: tuple[Moment, ...] = ("intended", "acted", "recording", "recorded")
ASKING: tuple[Moment, ...] = ("requesting", "requested")
OTHERWISE = frozenset(("shut-down", "kill", "bury", "halt", "take-back"))
"""Steps that have root do something for a VM in a jail, and nothing for any other."""

EVERY = {IN_JAIL: 5, ON_SNAPSHOT: 4, "workspace.prepare": 7}
"""A launch is some 60 file operations; root is killed at each of its own calls in its own tests. Taking a
repository's state is a hundred, most of them the starts of git."""

MOST_INSIDE = 6
"""So many file operations of the recovering worker's first effect does a thorough plan interrupt."""


# -- the plan ------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A scene's operation: its kind, its steps, and which of them no scene before it came to."""

    scene: str
    kind: str
    steps: tuple[Step, ...]
    new: tuple[Step, ...]


def plan(lane: Lane, *, thorough: bool = False) -> list[Case]:
    """List the cases of every step of every pipeline: one death at each point, then two.

    A thorough plan has the second death at more points of the recovery. Raises LookupError for a
    pipeline without a scene, or a step that none of its scenes comes to.
    """
    cases = []
    for subject in [each for pipeline in lane.known.values() for each in _subjects(lane, pipeline)]:
        singles = [*_forward(lane, subject), *_turned_back(lane, subject)]
        cases += [*singles, *(again for case in singles for again in _doubles(case, thorough))]
        cases += [*_cancelled(lane, subject), *_rebooted(subject), *_asked(subject)]
    return [*cases, *_waited_for(lane)]


def _subjects(lane: Lane, pipeline: Pipeline) -> Iterator[Subject]:
    """Give a pipeline's scenes, which differ in the steps that their VMs have a use for."""
    if pipeline.kind not in SCENES:
        raise LookupError(f"{pipeline.kind} has no scene in banger.testing.scenes")
    left = {step.name for step in pipeline.steps}
    for kind_of_vm in ("", ON_BRIDGE, IN_JAIL, ON_SNAPSHOT):
        if (scene := pipeline.kind + kind_of_vm) in SCENES:
            pinned = lane.pinned(scene)
            steps = tuple(step for step in pipeline.steps if step.name in pinned)
            again = OTHERWISE if kind_of_vm == IN_JAIL else frozenset()
            new = tuple(step for step in steps if step.name in left | again)
            yield Subject(scene, pipeline.kind, steps, new)
            left -= pinned
    if left:
        raise LookupError(f"no scene of {pipeline.kind} comes to {', '.join(sorted(left))}")


def _forward(lane: Lane, subject: Subject) -> Iterator[Case]:
    """Die at each point of each step of an operation that goes well."""
    for step in subject.new:
        for death in _points(lane, subject.kind, step.name, None, scene=subject.scene):
            yield Case(scene=subject.scene, deaths=(death,))


def _turned_back(lane: Lane, subject: Subject) -> Iterator[Case]:
    """Fail at each step: around the turn, or where it gets stuck, and in each undo."""
    scene, kind, last = subject.scene, subject.kind, subject.steps[-1]
    for step in dict.fromkeys([*subject.new, last]):
        trouble = trouble_at(lane, scene, kind, step)
        for moment in AROUND:
            yield Case(
                scene=scene, deaths=(Point(moment=moment, kind=kind, step=step.name),), trouble=trouble
            )
        for undone in _undone_by(subject, step):
            for death in _points(lane, kind, undone.name, trouble, scene=scene, back=True):
                yield Case(scene=scene, deaths=(death,), trouble=trouble)


def _cancelled(lane: Lane, subject: Subject) -> Iterator[Case]:
    """Die in a step whose operation is being cancelled: what is half made is undone, not made first.

    A step without undo has had its effect by then or not.
    """
    scene, kind = subject.scene, subject.kind
    for step in subject.new:
        if step.undo is not None or (step is not subject.steps[-1] and not step.forward_only):
            trouble = Trouble(kind=kind, step=step.name, when="cancel")
            for death in _points(lane, kind, step.name, trouble, scene=scene):
                yield Case(scene=scene, deaths=(death,), trouble=trouble, open_ended=step.undo is None)


def _rebooted(subject: Subject) -> Iterator[Case]:
    """Reboot around each step; what an ended operation left running is buried.

    What root has made is gone then: an operation may go on without it, or find it missing and turn back.
    """
    for step in subject.new:
        for moment in AROUND:
            ended = step is subject.steps[-1] and moment == "recorded"
            death = Point(moment=moment, kind=subject.kind, step=step.name)
            either = ended or step.pool == "root"
            yield Case(scene=subject.scene, deaths=(death,), reboot=True, open_ended=either)


def _waited_for(lane: Lane) -> Iterator[Case]:
    """Make a VM whose image and kernel are made first: die while it waits for them, or they fail."""
    made = [(kind, step) for kind in ("image.build", "kernel.pull") for step in lane.known[kind].steps]
    acts = [("vm.create", "image"), ("vm.create", "kernel"), *((kind, step.name) for kind, step in made)]
    for kind, name in acts:
        for death in _points(lane, kind, name, None, scene=CREATE_ALL):
            yield Case(scene=CREATE_ALL, deaths=(death,))
    for kind, step in made:
        trouble = trouble_at(lane, kind, kind, step)
        for death in _points(lane, kind, step.name, trouble, scene=CREATE_ALL, back=True):
            yield Case(scene=CREATE_ALL, deaths=(death,), trouble=trouble)


def _asked(subject: Subject) -> Iterator[Case]:
    for moment in ASKING:
        yield Case(scene=subject.scene, deaths=(Point(moment=moment),))


def _undone_by(subject: Subject, failing: Step) -> list[Step]:
    """List the steps whose undo a failure is to show: its own, half done; all, where it is the last."""
    if failing is subject.steps[-1] and not failing.forward_only:
        return [step for step in subject.new if step.undo is not None]
    return [failing] if failing.undo is not None else []


def _points(
    lane: Lane, kind: str, step: str, trouble: Trouble | None, *, scene: str, back: bool = False
) -> Iterator[Point]:
    """List where an act can be interrupted: around it, and at each of its file operations."""
    act = mortal.name((kind, step, back))
    _, counts = lane.clean(scene, trouble)
    if act not in counts:
        raise LookupError(f"the scene of {scene} never comes to {act}")
    for moment in AROUND:
        yield Point(moment=moment, kind=kind, step=step, back=back)
    for nth in range(1, counts[act] + 1, EVERY.get(scene.removeprefix(kind) or scene, 1)):
        yield Point(moment="inside", kind=kind, step=step, back=back, nth=nth)


def trouble_at(lane: Lane, scene: str, kind: str, step: Step) -> Trouble:
    """Have a step fail where it leaves the most to undo and its outcome is still one."""
    if step.forward_only:
        return Trouble(kind=kind, step=step.name, when="after")
    if step.undo is None:
        return Trouble(kind=kind, step=step.name, when="before")
    count = lane.clean(scene, None)[1][mortal.name((kind, step.name, False))]
    return Trouble(kind=kind, step=step.name, when="inside", nth=count // 2 + 1)


def _doubles(case: Case, thorough: bool) -> Iterator[Case]:
    """Have the recovering worker die too: at its first effect, and right after its claim."""
    seconds = [Point(moment="intended")]
    if thorough or case.deaths[0].moment == "acted":
        seconds.append(Point(moment="claimed"))
    if thorough:
        seconds += [Point(moment=moment) for moment in AROUND[1:]]
        seconds += [Point(moment="inside", nth=nth) for nth in range(1, MOST_INSIDE + 1)]
    for second in seconds:
        yield Case(scene=case.scene, deaths=(case.deaths[0], second), trouble=case.trouble)


def covered(cases: list[Case]) -> set[tuple[str, str, bool, Moment]]:
    """Tell which moments of which acts a plan has, `claimed` by the second death of a case."""
    return {
        (death.kind, death.step, death.back, last.moment if last.moment == "claimed" else death.moment)
        for case in cases
        for death, last in [(case.deaths[0], case.deaths[-1])]
    }


def required(known: Mapping[str, Pipeline]) -> set[tuple[str, str, bool, Moment]]:
    """Tell which moments there must be: those around each step and each undo, and after its claim."""
    return {
        (kind, step.name, back, moment)
        for kind, pipeline in known.items()
        for step in pipeline.steps
        for back in ((False, True) if step.undo is not None else (False,))
        for moment in (*AROUND, "claimed")
    }


# -- all of it -----------------------------------------------------------------------------------


class Report(Value):
    """The outcome of a matrix."""

    cases: int
    kills: int
    seconds: float
    wrong: tuple[Verdict, ...]

    def __str__(self) -> str:
        return (
            f"crash matrix: {self.cases} cases, {self.kills} kills, {self.seconds:.0f} s,"
            f" {len(self.wrong)} differences"
        )


def run(cases: list[Case], lanes: int = 2) -> Report:
    """Run cases in lanes side by side, each in a process and on a host of its own."""
    began = time.monotonic()
    gc.collect()
    gc.freeze()  # what is forked shares its memory with us
    children = [Child(functools.partial(_in_lane, cases[number::lanes])) for number in range(lanes)]
    said = [child.ended() for child in children]
    gc.unfreeze()
    verdicts = [each for ending in said for each in msgspec.json.decode(ending.result(), type=list[Verdict])]
    return Report(
        cases=len(verdicts),
        kills=sum(verdict.kills for verdict in verdicts),
        seconds=round(time.monotonic() - began, 1),
        wrong=tuple(verdict for verdict in verdicts if verdict.differences),
    )


def _in_lane(cases: list[Case]) -> bytes:
    logging.setup("test", Path(os.devnull))
    with Lane(pipelines()) as lane:
        return msgspec.json.encode([lane.run(case) for case in cases])
