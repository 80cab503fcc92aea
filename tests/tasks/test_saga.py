"""The saga engine in this process: every fate of a step, decided by the log alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from banger import proc
from banger.config import Config, Dirs
from banger.errors import BangerError, Fenced, GuestSilent, ProgramFailed
from banger.events import queries, work
from banger.events import vocabulary as ev
from banger.events.fold import Op, fold_op
from banger.events.log import EventLog
from banger.model import Artifact, Resource
from banger.tasks.context import Ctx, World
from banger.tasks.pipeline import Finish, Pipeline, Step
from banger.tasks.saga import CRASHES_ALLOWED, UNDO_ATTEMPTS, Saga
from banger.testing.pipelines import FILES, NOOP


class Driver:
    """Plays the worker: claims and advances in this process."""

    def __init__(self, log: EventLog, dirs: Dirs):
        self.log = log
        self.world = World(dirs, Config())
        self.pipelines: dict[str, Pipeline] = {FILES.kind: FILES, NOOP.kind: NOOP}

    def request(self, pipeline: Pipeline, **args: Any) -> str:
        self.pipelines[pipeline.kind] = pipeline
        return self.log.request(pipeline.request(lane="lane", args=args))

    def turn(self) -> str | None:
        """Advance one operation once."""
        held = work.claim(self.log, proc.me())
        if held is None:
            return None
        Saga(self.log, self.pipelines, self.world, held).advance()
        return held.op

    def until_quiet(self, op: str) -> Op:
        """Advance until this operation has ended; due times are taken as come."""
        for _ in range(50):
            state = self.op(op)
            if state.state == "ended":
                return state
            self.log.db.execute("UPDATE work SET due_us = 0")
            self.turn()
        raise AssertionError("it never ends")

    def op(self, op: str) -> Op:
        state = fold_op(self.log.read(stream=op))
        assert state is not None
        return state

    def types(self, op: str) -> list[str]:
        return [ev.type_of(row.event) for row in self.log.read(stream=op)]


@pytest.fixture
def driver(log: EventLog, dirs: Dirs) -> Driver:
    return Driver(log, dirs)


def step(
    name: str, run: Callable[[Ctx], Any], undo: Callable[[Ctx], None] | None = None, **more: Any
) -> Step:
    if undo is None:
        more.setdefault("why_no_undo", "nothing to undo in this test")
    return Step(name=name, title=name, run=run, undo=undo, **more)


def test_a_good_operation_is_recorded_before_and_after_each_step(driver: Driver, short_path: Path) -> None:
    """Each step is started, with its intended resource, before it is done; at the end all is held."""
    op = driver.request(FILES, directory=str(short_path))
    driver.turn()
    one = ["step.started", "resource.intended", "step.done", "resource.held"]
    assert driver.types(op) == ["op.requested", "op.claimed", *one * 3, "op.ended"]
    state = driver.op(op)
    assert state.fate == "done"
    assert {key: value[1] for key, value in state.resources.items()} == {
        f"file:{short_path / name}": "held" for name in ("one", "two", "three")
    }
    assert (short_path / "two").read_text() == "half whole"
    assert queries.active_count(driver.log) == 0


def test_a_step_that_fails_half_way_is_undone_too(driver: Driver, short_path: Path) -> None:
    """Undo counts what was started: the failing step's own half-made file is gone as well."""
    op = driver.request(FILES, directory=str(short_path), traps={"two/half": "fail"})
    driver.turn()
    state = driver.op(op)
    assert state.fate == "undone"
    assert state.error is not None
    assert state.error["message"] == "told to fail at two/half"
    assert [s.state for s in state.steps] == ["undone", "undone", "pending"]
    assert not list(short_path.glob("[a-z]*o*"))
    assert queries.resources(driver.log) == []
    undone = [row.event.name for row in driver.log.read(stream=op) if isinstance(row.event, ev.UndoDone)]
    assert undone == ["two", "one"], "last started is undone first"


def test_a_retryable_failure_is_tried_again_later(driver: Driver, short_path: Path) -> None:
    """The worker is given up between the attempts, and the operation ends well."""
    op = driver.request(FILES, directory=str(short_path), traps={"one/half": "retry"})
    driver.turn()
    assert driver.op(op).state == "running"
    assert queries.running_workers(driver.log) == {}
    assert work.claim(driver.log, proc.me()) is None, "it is not due yet"
    assert driver.until_quiet(op).fate == "done"
    assert driver.op(op).steps[0].attempts == 2


def test_attempts_are_bounded(driver: Driver) -> None:
    """A step that never succeeds is tried as often as it says, then undone."""
    tries: list[int] = []

    def run(ctx: Ctx) -> None:
        tries.append(ctx.attempt)
        raise GuestSilent

    op = driver.request(Pipeline("t", (step("s", run, attempts=3),)))
    assert driver.until_quiet(op).fate == "undone"
    assert tries == [1, 2, 3]


def test_an_interrupted_step_is_run_again(driver: Driver, short_path: Path) -> None:
    """A worker that died inside a step leaves it started; the next one runs it again."""
    op = driver.request(FILES, directory=str(short_path))
    held = work.claim(driver.log, proc.me())
    assert held is not None
    Saga(driver.log, driver.pipelines, driver.world, held)._record()
    with driver.log.transaction() as tx:
        tx.append(op, ev.OpInterrupted(epoch=held.epoch, reason="test"), op=op)
    state = driver.until_quiet(op)
    assert state.fate == "done"
    assert [s.attempts for s in state.steps] == [2, 1, 1]


def test_a_step_that_kills_its_workers_is_given_up(driver: Driver) -> None:
    """After CRASHES_ALLOWED starts without an end the step is undone, not tried for ever."""
    undone: list[str] = []
    pipeline = Pipeline("t", (step("s", lambda _: None, lambda _: undone.append("s")),))
    op = driver.request(pipeline)
    for _ in range(CRASHES_ALLOWED):
        held = work.claim(driver.log, proc.me())
        assert held is not None
        Saga(driver.log, driver.pipelines, driver.world, held)._record()
        with driver.log.transaction() as tx:
            tx.append(op, ev.OpInterrupted(epoch=held.epoch, reason="test"), op=op)
    state = driver.until_quiet(op)
    assert state.fate == "undone"
    assert state.error is not None
    assert "ended its worker 3 times" in state.error["message"]
    assert undone == ["s"]


def test_a_stopping_worker_does_not_count_as_a_crash(driver: Driver) -> None:
    """Giving an operation back any number of times never turns it back."""
    op = driver.request(Pipeline("t", (step("s", lambda _: None),)))
    for _ in range(CRASHES_ALLOWED + 2):
        held = work.claim(driver.log, proc.me())
        assert held is not None
        saga = Saga(driver.log, driver.pipelines, driver.world, held)
        saga._record()
        saga.release()
    assert driver.until_quiet(op).fate == "done"


def test_an_undo_that_fails_is_tried_again_then_stuck(driver: Driver) -> None:
    """Undo errors are joined to the first error; what is not undone stays in the ledger."""
    file = Resource(kind="file", id="/nowhere")

    def fail(_: Ctx) -> None:
        raise ProgramFailed("first")

    def undo(_: Ctx) -> None:
        raise ProgramFailed("second")

    op = driver.request(Pipeline("t", (step("s", fail, undo, acquires=lambda _: [file]),)))
    state = driver.until_quiet(op)
    assert state.fate == "stuck"
    assert state.steps[0].undo_attempts == UNDO_ATTEMPTS
    assert state.error is not None
    assert state.error["message"] == "first"
    assert set(state.error["undo_errors"]) == {"second"}
    assert [r.id for r in queries.resources(driver.log)] == ["/nowhere"]
    assert queries.active_count(driver.log) == 0, "a stuck operation does not block its lane"


def test_past_the_point_of_no_return_a_failure_sticks(driver: Driver) -> None:
    """A forward-only step that fails for good is stuck, not undone: nothing pretends to go back."""

    def fail(_: Ctx) -> None:
        raise ProgramFailed("no")

    first = step("a", lambda _: None, lambda _: pytest.fail("undone"))
    op = driver.request(Pipeline("t", (first, step("b", fail, forward_only=True))))
    state = driver.until_quiet(op)
    assert state.fate == "stuck"
    assert state.steps[0].state == "done"


def test_cancel_before_the_first_claim_undoes_nothing(driver: Driver, short_path: Path) -> None:
    """A cancelled operation that never ran ends at once, even behind another one of its lane."""
    first = driver.request(FILES, directory=str(short_path))
    second = driver.request(FILES, directory=str(short_path))
    assert driver.log.cancel(second)
    blocking = work.claim(driver.log, proc.me())
    assert blocking is not None
    assert blocking.op == first
    assert driver.turn() == second
    assert driver.op(second).fate == "cancelled"
    assert "step.started" not in driver.types(second)
    assert not driver.log.cancel(second), "it has ended"


def test_cancel_between_steps_undoes_what_was_done(driver: Driver) -> None:
    """A cancel seen after a step turns the operation back."""
    seen: list[str] = []

    def run(ctx: Ctx) -> None:
        seen.append("run")
        ctx.log.cancel(ctx.op.id)

    steps = (step("a", run, lambda _: seen.append("undo")), step("b", lambda _: pytest.fail("ran")))
    op = driver.request(Pipeline("t", steps))
    assert driver.until_quiet(op).fate == "cancelled"
    assert seen == ["run", "undo"]


def test_finish_ends_an_operation_early(driver: Driver) -> None:
    """A step may find that all is done already."""

    def finish(_: Ctx) -> None:
        raise Finish

    op = driver.request(Pipeline("t", (step("a", finish), step("b", lambda _: pytest.fail("ran")))))
    assert driver.until_quiet(op).fate == "done"


def test_an_unexpected_exception_undoes_the_operation(driver: Driver) -> None:
    """A bug in a step ends its operation with the exception's name, and nothing else."""
    op = driver.request(Pipeline("t", (step("a", lambda _: 1 / 0),)))
    state = driver.until_quiet(op)
    assert state.fate == "undone"
    assert state.error is not None
    assert state.error["message"].startswith("ZeroDivisionError")


def test_an_unknown_step_or_kind_does_not_crash_the_worker(driver: Driver) -> None:
    """An operation from another version ends with a sentence."""
    op = driver.log.request(
        ev.OpRequested(kind="of.the.future", args={}, steps=("warp",), titles=("warp",), lane="l")
    )
    state = driver.until_quiet(op)
    assert state.fate == "undone"
    assert state.error is not None
    assert "no step 'warp'" in state.error["message"]


def test_a_worker_that_lost_its_claim_stops_quietly(driver: Driver) -> None:
    """A fenced-off worker records nothing more and raises nothing."""

    def lose(ctx: Ctx) -> None:
        with ctx.log.transaction() as tx:
            tx.append(ctx.op.id, ev.OpInterrupted(epoch=1, reason="test"), op=ctx.op.id)
        assert work.claim(ctx.log, proc.me()) is not None

    op = driver.request(Pipeline("t", (step("a", lose),)))
    driver.turn()
    assert "step.done" not in driver.types(op)
    with pytest.raises(Fenced), driver.log.transaction() as tx:
        work.guard(tx, work.Claim(op, 1))


def test_two_who_need_the_same_share_one_operation(driver: Driver, short_path: Path) -> None:
    """Both parents park on one child, hold no worker meanwhile, and go on when it has ended."""
    made: list[str] = []
    child = Pipeline("child", (step("make", lambda _: made.append("x")),))
    driver.pipelines["child"] = child

    def find() -> Artifact | None:
        return cast("Artifact", object()) if made else None

    def need(ctx: Ctx) -> None:
        ctx.require(find, child, lane="child:x", args={"name": "x"}, reason="it is made")

    parent = Pipeline("parent", (step("need", need),))
    driver.pipelines["parent"] = parent
    ops = [driver.log.request(parent.request(lane=lane)) for lane in ("p1", "p2")]
    driver.turn()
    driver.turn()
    parked = [driver.op(op) for op in ops]
    assert parked[0].parked_on == parked[1].parked_on
    assert queries.running_workers(driver.log) == {}
    assert [driver.until_quiet(op).fate for op in ops] == ["done", "done"]
    assert made == ["x"]


def test_a_failed_child_fails_its_parent_with_the_childs_error(driver: Driver) -> None:
    """The parent does not ask for ever, and its error is the child's own."""

    def fail(_: Ctx) -> None:
        raise ProgramFailed("mmdebstrap: no network")

    child = Pipeline("child", (step("make", fail),))
    driver.pipelines["child"] = child

    def need(ctx: Ctx) -> None:
        ctx.require(lambda: None, child, lane="c", args={}, reason="it is made")

    op = driver.request(Pipeline("parent", (step("need", need),)))
    state = driver.until_quiet(op)
    assert state.fate == "undone"
    assert state.error is not None
    assert state.error["message"] == "mmdebstrap: no network"
    assert state.error["op"] == state.last_child


def test_an_eighteen_step_operation_ends_well(driver: Driver) -> None:
    """The benchmark's pipeline does what it says."""
    op = driver.request(NOOP)
    driver.turn()
    assert driver.op(op).fate == "done"


def test_a_step_without_undo_says_why() -> None:
    """A pipeline cannot be declared with a step that neither undoes nor explains."""
    with pytest.raises(TypeError):
        Step(name="x", title="x", run=lambda _: None)
    with pytest.raises(TypeError):
        Step(name="x", title="x", run=lambda _: None, why_no_undo="no", acquires=lambda _: [])


def test_errors_keep_their_code_on_the_wire() -> None:
    """A BangerError survives to_dict and from_dict with class, message and hint."""
    from banger.errors import DiskFull, from_dict

    again = from_dict(DiskFull(hint="h", op="op-1").to_dict())
    assert type(again) is DiskFull
    assert (again.hint, again.op) == ("h", "op-1")
    assert type(from_dict({"code": "of-the-future", "message": "m"})) is BangerError


def test_a_stuck_operation_goes_on_from_where_it_stuck(driver: Driver) -> None:
    """Reopened, a forward-only operation runs the step it stuck at, and none that is finished."""
    ran: list[str] = []

    def sometimes(_: Ctx) -> None:
        ran.append("b")
        if len(ran) < 3:
            raise ProgramFailed("not yet")

    first = step("a", lambda _: ran.append("a"), forward_only=True)
    op = driver.request(Pipeline("t", (first, step("b", sometimes, forward_only=True))))
    stuck = driver.until_quiet(op)
    assert stuck.fate == "stuck"
    with driver.log.transaction() as tx:
        tx.append(op, ev.OpReopened(lane=stuck.lane, epoch=stuck.epoch), op=op)
    done = driver.until_quiet(op)
    assert (done.fate, done.error) == ("done", None)
    assert done.epoch > stuck.epoch, "a worker from before stays fenced off"
    assert ran == ["a", "b", "b"]
    assert driver.log.rebuild() == []


def test_a_stuck_undo_goes_on_undoing(driver: Driver) -> None:
    """Reopened backwards, the undo has all its attempts again, and the first error is kept."""
    fails = [True]

    def fail(_: Ctx) -> None:
        raise ProgramFailed("first")

    def undo(_: Ctx) -> None:
        if fails[0]:
            raise ProgramFailed("second")

    op = driver.request(Pipeline("t", (step("s", fail, undo),)))
    stuck = driver.until_quiet(op)
    assert stuck.fate == "stuck"
    fails[0] = False
    with driver.log.transaction() as tx:
        tx.append(op, ev.OpReopened(lane=stuck.lane, epoch=stuck.epoch, back=True), op=op)
    undone = driver.until_quiet(op)
    assert undone.fate == "undone"
    assert undone.error is not None
    assert undone.error["message"] == "first"
    assert driver.log.rebuild() == []


def test_whatever_acquires_raises_is_counted(driver: Driver) -> None:
    """A bug in what a step acquires ends its operation, not its workers one after another."""

    def wrong(_: Ctx) -> list[Resource]:
        raise KeyError("a recipe of another version")

    op = driver.request(Pipeline("t", (step("a", lambda _: None, lambda _: None, acquires=wrong),)))
    driver.turn()
    state = driver.op(op)
    assert state.fate == "undone"
    assert state.error is not None
    assert "recipe of another version" in state.error["message"]


def test_a_claim_given_back_at_once_takes_back_no_attempt(driver: Driver, short_path: Path) -> None:
    """A worker that stops between its claim and its first step has not tried anything."""
    op = driver.request(FILES, directory=str(short_path), traps={"one/half": "retry"})
    driver.turn()
    driver.log.db.execute("UPDATE work SET due_us = 0")
    held = work.claim(driver.log, proc.me())
    assert held is not None
    Saga(driver.log, driver.pipelines, driver.world, held).release()
    assert driver.op(op).steps[0].attempts == 1
