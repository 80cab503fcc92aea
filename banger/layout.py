"""How tables, sizes and times look, on both sides of the socket."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

MINUTE, HOUR, DAY = 60, 3600, 86400


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Align cells in columns as wide as their widest; None is shown as `-`."""
    lines = [list(header), *(["-" if cell is None else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def pairs(values: Iterable[tuple[str, object]]) -> list[str]:
    """Align `key: value` lines; a value of None is left out."""
    known = [(f"{key}:", value) for key, value in values if value is not None]
    width = max((len(key) for key, _ in known), default=0)
    return [f"{key.ljust(width)}  {value}" for key, value in known]


def seconds(value: float) -> str:
    """Show a duration: `0.02s`, `12.3s`, `2m03s`."""
    if value < 9.995:
        return f"{value:.2f}s"
    if value < MINUTE - 0.05:
        return f"{value:.1f}s"
    minutes, rest = divmod(round(value), MINUTE)
    return f"{minutes}m{rest:02d}s"


def ago(time_us: int | None) -> str | None:
    """Show how long ago a moment was (µs since the epoch): `5s`, `3m`, `2h`, `4d`."""
    if time_us is None:
        return None
    age = max(0, int(time.time() - time_us / 1e6))
    for unit, letter in ((DAY, "d"), (HOUR, "h"), (MINUTE, "m")):
        if age >= unit:
            return f"{age // unit}{letter}"
    return f"{age}s"


def moment(time_us: int | None) -> str | None:
    """Show a moment (µs since the epoch) in local time."""
    if time_us is None:
        return None
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_us / 1e6))


def size(size_bytes: int) -> str:
    """Show a size in MiB or GiB."""
    mib = size_bytes / (1 << 20)
    return f"{mib / 1024:.1f}GiB" if mib >= 1024 else f"{mib:.0f}MiB"
