"""The event log: what an append costs, how fast a fold is, how soon an observer knows."""

from __future__ import annotations

import socket
import time

from banger.events.fold import fold_op
from banger.events.log import EventLog
from banger.testing.home import Home
from banger.testing.pipelines import NOOP
from bench import grown
from bench.figures import Figures, median, percentile

APPENDS = 5_000
OPERATIONS = 200
FOLDS = 20
READS = 3
OBSERVED = 300


def measure(figures: Figures) -> None:
    """Append one event per transaction, also at millions; fold an operation; follow it at the daemon."""
    with Home(pipelines="banger.testing.pipelines") as home:
        assert home.banger("daemon", "start").returncode == 0
        log = EventLog(home.dirs.database, home.dirs.work_bell, home.dirs.event_bell, "bench")
        times = [grown.append(log, "bench-0", None) for _ in range(APPENDS)]
        figures.add("append p50", median(times) * 1e3, "ms")
        figures.add("append p99", percentile(times, 99) * 1e3, "ms")
        ops = _operations(log)
        note = f"{OPERATIONS} operations of 18 steps"
        figures.add("events folded per second", _fold(log, ops), "/s", note=note, at_least=500_000)
        figures.add("read, decoded and folded per second", _read_and_fold(log, ops), "/s", note=note)
        seen = _observe(home, log)
        figures.add("append to observer p50", median(seen) * 1e3, "ms")
        figures.add("append to observer p99", percentile(seen, 99) * 1e3, "ms", 5.0, "through the daemon")
        grown.measure(figures, log, ops[0])
        log.close()


def _operations(log: EventLog) -> list[str]:
    """Let the real workers run 18-step operations; give their ids."""
    ops = [log.request(NOOP.request(lane=f"fold-{lane}")) for lane in range(OPERATIONS)]
    while log.db.execute("SELECT 1 FROM work LIMIT 1").fetchone() is not None:
        time.sleep(0.001)
    return ops


def _fold(log: EventLog, ops: list[str]) -> float:
    """Fold each operation's events, which are decoded already; give events per second.

    Many operations, because one that is folded again and again stays in the CPU's cache: 1.4 times as fast.
    """
    streams = [log.read(stream=op) for op in ops]
    began, events = time.perf_counter(), 0
    for _ in range(FOLDS):
        for rows in streams:
            state = fold_op(rows)
            assert state is not None
            assert state.fate == "done"
            events += len(rows)
    return events / (time.perf_counter() - began)


def _read_and_fold(log: EventLog, ops: list[str]) -> float:
    """Read, decode and fold each operation's events; give events per second."""
    began, events = time.perf_counter(), 0
    for _ in range(READS):
        for op in ops:
            rows = log.read(stream=op)
            state = fold_op(rows)
            assert state is not None
            assert state.fate == "done"
            events += len(rows)
    return events / (time.perf_counter() - began)


def _observe(home: Home, log: EventLog) -> list[float]:
    """Time from before an append to its line on a client's socket."""
    seen = []
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(home.dirs.socket))
        client.sendall(b'{"method": "events.tail", "params": {"after": %d}}\n' % log.last_seq())
        lines = client.makefile("rb")
        for _ in range(OBSERVED):
            began = time.perf_counter()
            grown.append(log, "bench-1", None)
            lines.readline()
            seen.append(time.perf_counter() - began)
            time.sleep(0.002)  # paced, as events are; not a burst
    return seen
