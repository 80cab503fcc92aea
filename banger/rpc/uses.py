"""When each VM was last used, as far as this daemon knows: it takes every VM for used when it starts.

Used are those that were asked for a way in (exec, ssh, cp, a workspace), or by name (touch). Looking
at one is no use of it. An event for each would fill the log; who restarts the daemon is using it.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import Any

from banger import config
from banger.config import Config
from banger.events import vocabulary as ev
from banger.events.fold import Vm
from banger.events.vocabulary import Recorded


class Uses:
    """Remembers the last use of each VM, and who only looks at one now."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._touched: dict[str, float] = {}
        self.looking: collections.Counter[str] = collections.Counter()

    def touch(self, vm: str) -> None:
        """Count from now."""
        self._touched[vm] = time.monotonic()

    def idle_s(self, vm: str) -> float:
        """Give for how many seconds a VM was not used."""
        return time.monotonic() - self._touched.get(vm, self._since)

    def heard(self, row: Recorded) -> None:
        """Follow the log: a VM that starts is used."""
        match row.event:
            case ev.VmStarted() | ev.VmReady():
                self.touch(row.stream)
            case ev.VmDeleted():
                self._touched.pop(row.stream, None)

    @contextlib.contextmanager
    def only_looked_at(self, vm: str) -> Iterator[None]:
        """Hold a connection to a VM, for the length of the block, that is no use of it."""
        self.looking[vm] += 1
        try:
            yield
        finally:
            self.looking[vm] -= 1

    def shown(self, vm: Vm, settings: Config) -> dict[str, Any]:
        """Show since when a VM is idle, and when it will be stopped for it, in seconds."""
        after_s = config.stale_after_s(settings)
        if vm.process is None:
            return {"idle_s": None, "auto_stop_in_s": None}
        idle_s = self.idle_s(vm.id)
        return {
            "idle_s": round(idle_s),
            "auto_stop_in_s": None if after_s is None else max(0, round(after_s - idle_s)),
        }
