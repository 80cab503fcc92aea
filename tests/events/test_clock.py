"""The wall clock jumps between any two events: order, durations and ids do not care."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from banger import proc
from banger.events import queries, work
from banger.events import vocabulary as ev
from banger.events.log import EventLog
from banger.events.verify import verify_log
from banger.tasks.saga import Saga
from banger.testing.pipelines import FILES

HOUR_NS = 3600 * 10**9
JUMPS = {
    "an hour on, once": [0] * 5 + [HOUR_NS],
    "an hour back, once": [HOUR_NS] * 5 + [0],
    "ten years on": [0] * 5 + [87_600 * HOUR_NS],
    "to and fro at every event": [0, HOUR_NS, -HOUR_NS] * 50 + [0],
    "back at every event": [-n * HOUR_NS for n in range(200)],
    "stopped": [],
}


@pytest.fixture(params=list(JUMPS.values()), ids=list(JUMPS))
def jumping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wall clock that has another offset each time it is looked at; the last one stays."""
    real, start = time.time_ns, time.time_ns()
    offsets: Iterator[int] = itertools.chain(request.param, itertools.repeat((request.param or [0])[-1]))
    monkeypatch.setattr(time, "time_ns", lambda: (real() if request.param else start) + next(offsets))


def run(log: EventLog, directory: Path, **traps: str) -> str:
    """Run an operation in this process until it has ended; give its id."""
    directory.mkdir()
    args = {
        "directory": str(directory),
        "traps": {point.replace("_", "/"): do for point, do in traps.items()},
    }
    op = log.request(FILES.request(lane=directory.name, args=args))
    while queries.active_count(log):
        held = work.claim(log, proc.me())
        if held is None:
            time.sleep(0.01)  # until a step is due again
            continue
        world = SimpleNamespace(dirs=None, config=None)
        Saga(log, {FILES.kind: FILES}, world, held).advance()  # type: ignore[arg-type]
    return op


@pytest.mark.usefixtures("jumping")
def test_order_and_durations_stay_right(log: EventLog, tmp_path: Path) -> None:
    """Operations are listed in the order of the log, last no longer than they did, and keep their ids."""
    began = time.monotonic()
    done = [run(log, tmp_path / str(n)) for n in range(3)]
    undone = run(log, tmp_path / "undone", three_after="fail")
    spent = time.monotonic() - began
    listed = queries.ops(log, limit=-1)
    assert [op.id for op in listed] == [undone, *reversed(done)]
    assert [op.fate for op in listed] == ["undone", "done", "done", "done"]
    assert all(op.seconds is not None and 0 <= op.seconds <= spent for op in listed)
    for op in listed:
        steps = queries.whole_op(log, op.id).steps
        assert all(step.seconds is not None and 0 <= step.seconds <= spent for step in steps[:2])
    assert [row.seq for row in log.read()] == list(range(1, log.last_seq() + 1))
    assert len({op.id for op in listed}) == 4
    assert log.rebuild() == []
    assert verify_log(log.path).bad_seq is None


@pytest.mark.usefixtures("jumping")
def test_a_step_is_due_by_the_boot_clock(log: EventLog, tmp_path: Path) -> None:
    """A retry waits a tenth of a second, whatever the wall clock has done meanwhile."""
    began = time.monotonic()
    op = run(log, tmp_path / "again", two_half="retry")
    assert queries.whole_op(log, op).fate == "done"
    assert queries.whole_op(log, op).steps[1].attempts == 2
    assert time.monotonic() - began < 5


def test_what_was_due_before_a_reboot_is_due_now(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """The boot clock begins anew with the host; nothing waits for the old one to come again."""
    op = log.request(ev.OpRequested(kind="t", args={}, steps=("a",), titles=("a",), lane="l"))
    assert work.claim(log, proc.me()) is not None
    monkeypatch.setattr("banger.events.log.boot_us", lambda: 10**12)
    with log.transaction() as tx:
        failed = ev.StepFailed(step=0, name="a", error={}, retry_in_s=0.1)
        tx.append(op, failed, op=op)
    monkeypatch.setattr("banger.events.work.boot_us", lambda: 10**12 + 50_000)
    assert work.claim(log, proc.me()) is None, "it is not due yet"
    monkeypatch.setattr("banger.events.work.boot_us", lambda: 1000)
    held = work.claim(log, proc.me())
    assert held is not None
    assert held.op == op


def test_a_worker_of_another_boot_is_dead(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a reboot another process may have its pid and its start time; its claim is freed all the same."""
    op = log.request(ev.OpRequested(kind="t", args={}, steps=("a",), titles=("a",), lane="l"))
    assert work.claim(log, proc.me()) is not None
    assert work.reap(log) == []
    monkeypatch.setattr(proc, "boot_id", lambda: "00000000")
    assert work.reap(log) == [op]
