"""Bare huey, as its documentation has it: the module that its consumer and its client both import.

Runs in a directory of its own: `SqliteHuey()` keeps huey.db in the current one.
"""

from __future__ import annotations

import os
import sys
import time

from huey import SqliteHuey

# huey's default leaves SQLite's own: every commit waits for the disk. "0" is its other setting.
FSYNC = {"0": False}.get(os.environ.get("PEER_FSYNC", ""))
TIMEOUT_S = 60.0

huey = SqliteHuey(fsync=FSYNC)


def _noop() -> None:
    pass


step = huey.task(name="step")(_noop)
end = huey.task(name="end")(time.monotonic)  # CLOCK_MONOTONIC: one clock for all processes


def run(count: int, steps: int) -> float:
    """Enqueue that many chains at once; give the seconds until the last one's last step ran."""
    began = time.monotonic()
    chains = [huey.enqueue(_chain(steps)) for _ in range(count)]
    ended: float = max(list(chain)[-1].get(blocking=True, timeout=TIMEOUT_S) for chain in chains)
    return ended - began


def _chain(steps: int) -> object:
    first = step.s()
    for _ in range(steps - 2):
        first.then(step)
    return first.then(end)


def main() -> None:
    """Print the seconds that the last of the runs named took: `… 8 100 18` warms up with 8."""
    *counts, steps = map(int, sys.argv[1:])
    print([run(count, steps) for count in counts][-1])
