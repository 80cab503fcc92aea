"""What banger costs when it does nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

from banger.model import Process
from banger.testing.home import Home
from bench.figures import Figures

SETTLE_S = 2.0
WATCHED_S = 15.0


def measure(figures: Figures) -> None:
    """CPU time and proportional memory of daemon, supervisor and workers together."""
    with Home() as home:
        assert home.banger("daemon", "start").returncode == 0
        time.sleep(SETTLE_S)
        processes = home.processes()
        before = sum(map(_cpu_s, processes))
        time.sleep(WATCHED_S)
        spent = sum(map(_cpu_s, processes)) - before
        figures.add("idle CPU, daemon and workers", spent / WATCHED_S * 100, "%", 1.0, "of one core")
        figures.add("idle memory, daemon and workers", sum(map(_pss_mib, processes)), "MiB", 120.0, "PSS")


def _cpu_s(process: Process) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _pss_mib(process: Process) -> float:
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
