"""Run every benchmark, or those named: `python -m bench [queue] [peers] [log] …`."""

from __future__ import annotations

import sys

from bench import boots, command_line, idle, inside, log, peers, pull, queue, root, workspace
from bench.figures import OUTPUT, Figures

PARTS = {
    "queue": queue.measure,
    "peers": peers.measure,
    "log": log.measure,
    "idle": idle.measure,
    "command_line": command_line.measure,
    "boots": boots.measure,
    "pull": pull.measure,
    "root": root.measure,
    "inside": inside.measure,
    "workspace": workspace.measure,
}


def main() -> None:
    """Measure, print and write build/bench.json."""
    unknown = set(sys.argv[1:]) - set(PARTS)
    if unknown:
        sys.exit(f"There is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}.")
    figures = Figures()
    for name, measure in PARTS.items():
        if name in (sys.argv[1:] or PARTS):
            measure(figures)
    figures.write()
    print(f"written to {OUTPUT}")


main()
