"""The real daemon and workers, with operations that need no guest."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from banger import proc
from banger.events import database, queries
from banger.events.fold import Op, fold_op
from banger.events.log import EventLog
from banger.model import Process
from banger.testing.home import Home
from banger.testing.pipelines import FILES, NOOP

STEPS = ("one", "two", "three")
POINTS = [f"{step}/{where}" for step in STEPS for where in ("before", "half", "after")]
UNDO_POINTS = [f"{step}/{where}" for step in STEPS for where in ("undo-before", "undo-after")]


class Pool:
    """A running daemon with its workers, and this test's own view of their log."""

    def __init__(self, home: Home, log: EventLog):
        self.home = home
        self.log = log
        self.lanes = 0

    def request(self, directory: Path, **args: Any) -> str:
        self.lanes += 1
        lane = f"lane-{self.lanes}"
        return self.log.request(FILES.request(lane=lane, args={"directory": str(directory), **args}))

    def end(self, op: str, timeout_s: float = 30.0) -> Op:
        """Wait for an operation's end: a look every few milliseconds, the daemon has the bell."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            row = queries.op(self.log, op)
            if row is not None and row.state == "ended":
                state = fold_op(self.log.read(stream=op))
                assert state is not None
                return state
            time.sleep(0.005)
        raise AssertionError(f"{op} has not ended")

    def until_sprung(self, directory: Path) -> None:
        """Wait until a worker is in a trap of this directory."""
        deadline = time.monotonic() + 10
        while not list(directory.glob(".sprung-*")):
            assert time.monotonic() < deadline, "nobody stepped on the trap"
            time.sleep(0.002)


def left(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if not path.name.startswith(".")}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Home(pipelines="banger.testing.pipelines") as home:
        home.configure("workers = 4\n")
        started = home.banger("daemon", "start")
        assert started.returncode == 0, started.stderr
        log = EventLog(home.dirs.database, home.dirs.work_bell, home.path / "own.fifo", "test")
        yield Pool(home, log)
        log.close()


@pytest.mark.parametrize("point", POINTS)
def test_a_worker_that_dies_anywhere_in_a_step_loses_nothing(pool: Pool, tmp_path: Path, point: str) -> None:
    """Another worker goes on under the same id, and the result is whole."""
    op = pool.end(pool.request(tmp_path, traps={point: "crash"}))
    assert op.fate == "done"
    assert op.epoch == 2
    assert {name: (tmp_path / name).read_text() for name in STEPS} == dict.fromkeys(STEPS, "half whole")


@pytest.mark.parametrize("point", UNDO_POINTS)
def test_a_worker_that_dies_anywhere_in_an_undo_leaves_nothing(
    pool: Pool, tmp_path: Path, point: str
) -> None:
    """The undo goes on in another worker, to nothing."""
    op = pool.end(pool.request(tmp_path, traps={"three/after": "fail", point: "crash"}))
    assert op.fate == "undone"
    assert op.epoch == 2
    assert left(tmp_path) == set()


def test_a_step_past_its_deadline_is_ended_and_given_up(pool: Pool, tmp_path: Path) -> None:
    """A frozen step does not hold its worker for ever; after three such starts it is undone."""
    op = pool.end(pool.request(tmp_path, traps={"three/half": "freeze"}, always=True))
    assert op.fate == "undone"
    assert op.steps[2].attempts == 3
    assert left(tmp_path) == set()


def test_one_bad_operation_does_not_stop_others(pool: Pool, tmp_path: Path) -> None:
    """While one keeps killing its workers, others end well."""
    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
    bad = pool.request(tmp_path / "bad", traps={"two/half": "crash"}, always=True)
    good = [pool.request(tmp_path / "good") for _ in range(5)]
    assert [pool.end(op).fate for op in good] == ["done"] * 5
    assert pool.end(bad).fate == "undone"
    assert left(tmp_path / "bad") == set()


def test_cancel_reaches_a_step_that_waits(pool: Pool, tmp_path: Path) -> None:
    """A waiting step is told, and what was made is undone."""
    op = pool.request(tmp_path, traps={"two/half": "hang"})
    pool.until_sprung(tmp_path)
    pool.log.cancel(op)
    state = pool.end(op)
    assert state.fate in ("cancelled", "undone")
    assert left(tmp_path) == set()


def test_kill_of_the_daemon_in_an_operation(pool: Pool, tmp_path: Path) -> None:
    """The next command starts a daemon, and the operation goes on under its id."""
    op = pool.request(tmp_path, traps={"two/half": "hang"})
    pool.until_sprung(tmp_path)
    daemon = pool.home.daemon()
    assert daemon is not None
    running = proc.identify(daemon)
    assert running is not None
    proc.kill(running)
    assert pool.home.banger("daemon", "start").returncode == 0
    assert pool.home.daemon() != daemon
    assert pool.end(op).fate == "done"


def test_supervisor_and_workers_end_with_their_daemon(pool: Pool) -> None:
    """The kernel tells them; none is left to work beside those of the next daemon."""
    before = pool.home.processes()
    daemon = next(p for p in before if p.pid == pool.home.daemon())
    proc.kill(daemon)
    gone: list[Process] = [process for process in before if proc.wait_gone(process, 10)]
    assert gone == before
    assert pool.home.banger("daemon", "start").returncode == 0


def test_a_lost_wake_up_costs_a_second_at_most(pool: Pool) -> None:
    """With the bell's byte taken away, the fallback look finds the work."""
    with pool.log.transaction() as tx:
        op = tx.mint("op")
        tx.append(op, NOOP.request(lane="silent"), op=op)
        tx.work_ready = False
    assert pool.end(op, timeout_s=5).fate == "done"


def test_the_daemon_is_the_only_one(pool: Pool) -> None:
    """A second daemon of the same owner ends with a sentence."""
    import subprocess
    import sys

    second = subprocess.run(
        [sys.executable, "-m", "banger.rpc.daemon"],
        env=pool.home.environ,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert second.returncode == 1
    assert "Another daemon of this user is running." in second.stderr


def test_an_undone_operation_is_asked_for_anew(pool: Pool, tmp_path: Path) -> None:
    """`ops retry` of one that was undone is another operation with the same request."""
    undone = pool.end(pool.request(tmp_path, traps={"three/after": "fail"}))
    assert undone.fate == "undone"
    reply = pool.home.json("ops", "retry", undone.id)
    assert reply["op"] != undone.id
    assert pool.end(reply["op"]).fate == "done"
    assert left(tmp_path) == set(STEPS)
    refused = pool.home.banger("ops", "retry", reply["op"])
    assert (refused.returncode, "is done" in refused.stderr) == (4, True)


def test_an_operation_goes_on_when_everything_but_the_log_is_deleted(pool: Pool, tmp_path: Path) -> None:
    """Queue, operations and ledger emptied under a worker at work: all of it comes back, and it ends well."""
    op = pool.request(tmp_path, traps={"two/half": "slow"})
    pool.until_sprung(tmp_path)
    vandal = sqlite3.connect(pool.log.path)
    with vandal:
        for table in database.WATCHED:
            vandal.execute(f"DELETE FROM {table}")
    vandal.close()
    assert pool.end(op).fate == "done"
    assert left(tmp_path) == set(STEPS)
    pool.log.mend()
    assert pool.log.rebuild() == []
