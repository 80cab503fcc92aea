"""A DBOS workflow on SQLite, with its defaults. Runs where DBOS is on the path: see `bench.peers`.

Runs in a directory of its own: DBOS keeps its database in the current one.
"""

from __future__ import annotations

import sys
import time

from dbos import DBOS


def _noop() -> None:
    pass


step = DBOS.step(name="step")(_noop)


def _operation(steps: int) -> None:
    for _ in range(steps):
        step()


operation = DBOS.workflow(name="operation")(_operation)


def run(count: int, steps: int) -> float:
    """Start that many workflows at once, in the background; give the seconds until all have ended."""
    began = time.monotonic()
    for started in [DBOS.start_workflow(operation, steps) for _ in range(count)]:
        started.get_result()
    return time.monotonic() - began


def main() -> None:
    """Print the seconds that the last of the runs named took: `… 8 100 18` warms up with 8."""
    *counts, steps = map(int, sys.argv[1:])
    DBOS(config={"name": "peer"})
    DBOS.launch()
    taken = [run(count, steps) for count in counts]
    DBOS.destroy()
    print(taken[-1])
