"""What a command costs before it does anything."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from banger.testing.home import Home
from bench.figures import Figures, median

ROUNDS = 40


def measure(figures: Figures) -> None:
    """Time `banger ps`, `banger --help` and `banger vm list --json` against `python -c pass`."""
    banger = str(Path(sys.executable).with_name("banger"))
    with Home() as home:
        assert home.banger("daemon", "start").returncode == 0
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "banger ps": [banger, "ps"],
            "banger --help": [banger, "--help"],
            "banger vm list --json": [banger, "vm", "list", "--json"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(ROUNDS):  # in turns, so that a busy moment hits all alike
            for name, words in commands.items():
                times[name].append(_wall(words, home.environ))
    bare = median(times.pop("python -c pass"))
    figures.add("python -c pass", bare * 1e3, "ms")
    for name, taken in times.items():
        figures.add(name, median(taken) * 1e3, "ms")
        target = 3.0 if name == "banger ps" else None
        figures.add(f"{name} / python -c pass", median(taken) / bare, "times", target)


def _wall(words: list[str], environ: dict[str, str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(
        words, env=environ, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, check=False
    )
    taken = time.perf_counter() - began
    assert done.returncode == 0, (words, os.strerror(done.returncode))
    return taken
