"""How many refusals are written down: the rest is counted, so that nobody can fill root's disk with them."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

MOST_CALLERS = 256
"""Callers told apart at a time; an owner of a user namespace can be 65,536 uids at will."""
OTHERS = -1


class _Seen(NamedTuple):
    second: int
    written: int
    left_out: int


class Flood:
    """Lets a few refusals a second of each caller through, for any thread."""

    def __init__(self, per_s: int):
        self._per_s = per_s
        self._seen: dict[int, _Seen] = {}
        self._lock = threading.Lock()

    def lets_through(self, uid: int) -> bool:
        """Tell whether one more may be written down now; count it when not."""
        second = int(time.monotonic())
        with self._lock:
            who = uid if uid in self._seen or len(self._seen) < MOST_CALLERS else OTHERS
            seen = self._seen.get(who, _Seen(second, 0, 0))
            written = seen.written if seen.second == second else 0
            through = written < self._per_s
            self._seen[who] = _Seen(second, written + through, seen.left_out + (not through))
        return through

    def take(self) -> list[tuple[int, int]]:
        """Give the callers whose refusals of an earlier second were left out, with their number; once."""
        now = int(time.monotonic())
        with self._lock:
            over = {uid: seen for uid, seen in self._seen.items() if seen.second < now}
            for uid in over:
                del self._seen[uid]
        return [(uid, seen.left_out) for uid, seen in over.items() if seen.left_out]
