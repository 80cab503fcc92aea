"""The event log: what an append costs, how fast a fold is, how soon an observer knows."""

from __future__ import annotations

import socket
import time

from banger.events import vocabulary as ev
from banger.events.fold import fold_op
from banger.events.log import EventLog
from banger.testing.home import Home
from banger.testing.pipelines import NOOP
from bench.figures import Figures, median, percentile

APPENDS = 5_000
FOLDS = 500
OBSERVED = 300


def measure(figures: Figures) -> None:
    """Append one event per transaction; fold an operation; follow an operation through the daemon."""
    with Home(pipelines="banger.testing.pipelines") as home:
        assert home.banger("daemon", "start").returncode == 0
        log = EventLog(home.dirs.database, home.dirs.work_bell, home.dirs.event_bell, "bench")
        times = [_append(log, "bench-0") for _ in range(APPENDS)]
        figures.add("append p50", median(times) * 1e3, "ms")
        figures.add("append p99", percentile(times, 99) * 1e3, "ms")
        figures.add("events of an operation folded per second", _fold(log), "/s", note="decoding included")
        seen = _observe(home, log)
        figures.add("append to observer p50", median(seen) * 1e3, "ms")
        figures.add("append to observer p99", percentile(seen, 99) * 1e3, "ms", 5.0, "through the daemon")
        log.close()


def _fold(log: EventLog) -> float:
    """Read and fold the events of an 18-step operation, again and again; give events per second."""
    op = log.request(NOOP.request(lane="fold"))
    while log.db.execute("SELECT 1 FROM op WHERE op = ? AND state = 'ended'", (op,)).fetchone() is None:
        time.sleep(0.001)
    began, events = time.perf_counter(), 0
    for _ in range(FOLDS):
        rows = log.read(stream=op)
        state = fold_op(rows)
        assert state is not None
        assert state.fate == "done"
        events += len(rows)
    return events / (time.perf_counter() - began)


def _append(log: EventLog, stream: str) -> float:
    began = time.perf_counter()
    with log.transaction() as tx:
        tx.append(stream, ev.StepProgress(step=0, message="bench"), op=None)
    return time.perf_counter() - began


def _observe(home: Home, log: EventLog) -> list[float]:
    """Time from before an append to its line on a client's socket."""
    seen = []
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(home.dirs.socket))
        client.sendall(b'{"method": "events.tail", "params": {"after": %d}}\n' % log.last_seq())
        lines = client.makefile("rb")
        for _ in range(OBSERVED):
            began = time.perf_counter()
            _append(log, "bench-1")
            lines.readline()
            seen.append(time.perf_counter() - began)
            time.sleep(0.002)  # paced, as events are; not a burst
    return seen
