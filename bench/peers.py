"""A hundred operations at once: banger beside bare huey and DBOS, in one run.

Each round starts each of them afresh, in turns, so that a busy moment hits all alike. What the
three promise differs; the notes say how.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from banger import proc
from banger.events.log import EventLog
from banger.testing.home import Home
from banger.testing.pipelines import NOOP, NOOP_STEPS
from bench.figures import OUTPUT, Figures, median

OPERATIONS = 100
WARM = 8
WORKERS = 4
ROUNDS = 3
TIMEOUT_S = 120.0
LOCK = Path("requirements/peers.txt")
INSTALLED = OUTPUT.parent / "peers"
MARK = "BANGER_BENCH_PEER"
"""The environment variable by which every process of a peer is found again."""


class Contestant(NamedTuple):
    """One who runs the operations."""

    name: str
    run: Callable[[], float]
    """Start, warm up, run OPERATIONS of NOOP_STEPS at once, end; gives the seconds that they took."""
    note: str
    at_least: float | None = None
    """The least that banger's rate may be in terms of this one's."""


def measure(figures: Figures) -> None:
    """Run 100 concurrent 18-step no-op operations on each; print operations per second."""
    _install()
    rates: dict[str, list[float]] = {each.name: [] for each in (BANGER, *PEERS)}
    for _ in range(ROUNDS):
        for each in (BANGER, *PEERS):
            rates[each.name].append(OPERATIONS / each.run())
    rate = {name: median(found) for name, found in rates.items()}
    figures.add(f"{OPERATIONS} ops at once, banger", rate["banger"], "op/s", note=BANGER.note)
    for peer in PEERS:
        figures.add(f"{OPERATIONS} ops at once, {peer.name}", rate[peer.name], "op/s", note=peer.note)
        times = rate["banger"] / rate[peer.name]
        figures.add(f"banger / {peer.name}, op/s", times, "times", at_least=peer.at_least)


def _install() -> None:
    """Put the peers where only their own processes find them; nothing when they are there."""
    seal = INSTALLED / "lock"
    if seal.exists() and seal.read_bytes() == LOCK.read_bytes():
        return
    shutil.rmtree(INSTALLED, ignore_errors=True)
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "-qq",
            "--require-hashes",
            "--only-binary", ":all:",
            "--target", INSTALLED,
            "--requirement", LOCK,
        ],
        check=True,
        timeout=600,
    )  # fmt: skip
    shutil.copy(LOCK, seal)


def _ours() -> float:
    with Home(pipelines="banger.testing.pipelines") as home:
        home.configure(f"workers = {WORKERS}\n")
        assert home.banger("daemon", "start").returncode == 0
        log = EventLog(home.dirs.database, home.dirs.work_bell, home.dirs.event_bell, "bench")
        try:
            return [_together(log, count) for count in (WARM, OPERATIONS)][-1]
        finally:
            log.close()


def _together(log: EventLog, count: int) -> float:
    """Request that many operations, each on a lane of its own; give the seconds until all have ended."""
    began = time.monotonic()
    ops = {log.request(NOOP.request(lane=f"bench-{lane}")) for lane in range(count)}
    while log.db.execute("SELECT 1 FROM work LIMIT 1").fetchone() is not None:
        assert time.monotonic() - began < TIMEOUT_S
        time.sleep(0.001)
    done = {op for (op,) in log.db.execute("SELECT op FROM op WHERE fate = 'done'")}
    assert ops <= done
    return time.monotonic() - began


def _huey(fsync: str) -> float:
    consumer = [
        sys.executable, "-m", "huey.bin.huey_consumer", "bench.peer_huey.huey",
        "--worker-type", "process",
        "--workers", str(WORKERS),
        "--quiet",
    ]  # fmt: skip
    with _peer(PEER_FSYNC=fsync) as (directory, environ):
        # Nobody waits until it is up: the warm-up does.
        running = subprocess.Popen(
            consumer, cwd=directory, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            return _client("bench.peer_huey", directory, environ)
        finally:
            running.kill()
            running.wait()


def _dbos() -> float:
    with _peer(PYTHONPATH=str(INSTALLED.resolve())) as (directory, environ):
        return _client("bench.peer_dbos", directory, environ)


@contextlib.contextmanager
def _peer(**more: str) -> Iterator[tuple[Path, dict[str, str]]]:
    """Give a private directory and an environment; end all that was started with it, and remove it."""
    directory = Path(tempfile.mkdtemp(prefix="bg-peer-"))
    try:
        yield directory, {**os.environ, **more, MARK: str(directory)}
    finally:
        while found := proc.find_by_environ(MARK, str(directory)):
            for process in found:
                proc.kill(process)
        shutil.rmtree(directory)


def _client(module: str, directory: Path, environ: dict[str, str]) -> float:
    """Run a peer's `main` to its end; give the seconds that it printed."""
    words = [sys.executable, "-c", f"from {module} import main; main()"]
    counts = [str(WARM), str(OPERATIONS), str(NOOP_STEPS)]
    done = subprocess.run(
        [*words, *counts],
        cwd=directory,
        env=environ,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


BANGER = Contestant(
    "banger",
    _ours,
    "4 workers; each step on record, at-least-once; waits for the disk at request and end",
)
PEERS = (
    Contestant(
        "huey",
        lambda: _huey(""),
        "SqliteHuey as shipped, 4 processes; waits for the disk at each step; no record, at-most-once",
        at_least=1.0,
    ),
    Contestant(
        "huey without fsync",
        lambda: _huey("0"),
        "the same with fsync=False, which never waits: a power cut may corrupt its database",
    ),
    Contestant(
        "DBOS",
        _dbos,
        "on SQLite, its defaults; one process; a row a step, at-least-once",
        at_least=1.0,
    ),
)
