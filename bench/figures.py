"""A figure: name, value, unit, target; printed, and written to build/bench.json."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OUTPUT = Path("build/bench.json")


class Figures:
    """Collects figures, printing each as it comes."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []

    def add(
        self,
        name: str,
        value: float,
        unit: str,
        target: float | None = None,
        note: str = "",
        *,
        at_least: float | None = None,
    ) -> None:
        """Print one figure; `target` is the most it may be, `at_least` the least; neither: informative."""
        aims = [f"at most {target:g} {unit}"] if target is not None else []
        aims += [f"at least {at_least:g} {unit}"] if at_least is not None else []
        met = (target is None or value <= target) and (at_least is None or value >= at_least)
        verdict = ("  ok" if met else "  MISSED") if aims else ""
        line = f"{name:<44} {value:>10.3f} {unit:<6} {', '.join(aims):<18}{verdict}  {note}"
        print(line.rstrip(), flush=True)
        figure = {"name": name, "value": value, "unit": unit, "target": target, "at_least": at_least}
        self.all.append({**figure, "note": note})

    def skip(self, name: str, why: str) -> None:
        """Say that a figure could not be measured here."""
        print(f"{name:<44} not measured: {why}", flush=True)
        self.all.append({"name": name, "value": None, "note": why})

    def write(self) -> None:
        """Write what was measured as JSON."""
        OUTPUT.parent.mkdir(exist_ok=True)
        machine = {"python": platform.python_version(), "kernel": platform.release()}
        OUTPUT.write_text(json.dumps({"machine": machine, "figures": self.all}, indent=2) + "\n")


def percentile(values: Sequence[float], percent: int) -> float:
    """Give a percentile of a sample."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


median = statistics.median
