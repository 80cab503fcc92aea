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

    def add(self, name: str, value: float, unit: str, target: float | None = None, note: str = "") -> None:
        """Print one figure; `target` is the most it may be, None where it is only informative."""
        verdict = "" if target is None else ("  ok" if value <= target else "  MISSED")
        aim = "" if target is None else f"at most {target:g} {unit}"
        print(f"{name:<44} {value:>10.3f} {unit:<6} {aim:<18}{verdict}  {note}".rstrip(), flush=True)
        self.all.append({"name": name, "value": value, "unit": unit, "target": target, "note": note})

    def write(self) -> None:
        """Write what was measured as JSON."""
        OUTPUT.parent.mkdir(exist_ok=True)
        machine = {"python": platform.python_version(), "kernel": platform.release()}
        OUTPUT.write_text(json.dumps({"machine": machine, "figures": self.all}, indent=2) + "\n")


def percentile(values: Sequence[float], percent: int) -> float:
    """Give a percentile of a sample."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


median = statistics.median
