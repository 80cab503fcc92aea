"""The queue and the log: an 18-step operation through the real workers."""

from __future__ import annotations

import select
import time

from banger.events.log import EventLog
from banger.testing.home import Home
from banger.testing.pipelines import NOOP
from bench.figures import Figures, median, percentile

ROUNDS = 200
WARM = 20


def measure(figures: Figures) -> None:
    """Submit 18-step no-op operations one after another; measure request to end."""
    with Home(pipelines="banger.testing.pipelines") as home:
        assert home.banger("daemon", "start").returncode == 0
        log = EventLog(home.dirs.database, home.dirs.work_bell, home.path / "own.fifo", "bench")
        times = [_one(log) for _ in range(WARM + ROUNDS)][WARM:]
        log.close()
        figures.add("18-step no-op op p50", median(times) * 1e3, "ms", 5.0, "request to end, real workers")
        figures.add("18-step no-op op p99", percentile(times, 99) * 1e3, "ms")


def _one(log: EventLog) -> float:
    began = time.perf_counter()
    op = log.request(NOOP.request(lane=f"bench-{time.monotonic_ns()}"))
    while True:
        ended = log.db.execute("SELECT 1 FROM op WHERE op = ? AND state = 'ended'", (op,)).fetchone()
        if ended is not None:
            return time.perf_counter() - began
        # The measuring process has no bell of its own in the daemon: a fine-grained look.
        select.select([], [], [], 0.0001)
