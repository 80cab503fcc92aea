"""Root's own queue: huey over SQLite, in root's directory. A message is a number, in JSON.

What a number stands for, its descriptors too, is in this process's memory. So a message that outlives
its process, or that someone slipped in, stands for nothing. What the helper owes after a death is in
`banger.helper.store`, not here.
"""

from __future__ import annotations

import sqlite3
import threading
import traceback
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import msgspec
from huey import Huey
from huey.constants import EmptyData
from huey.registry import Message
from huey.serializer import Serializer
from huey.storage import SqliteStorage

FALLBACK_LOOK_S = 1.0


class JsonSerializer(Serializer):  # type: ignore[misc]  # huey has no type hints
    """huey messages as JSON: huey's own way would run whatever is written into the queue."""

    def _serialize(self, data: Any) -> bytes:
        return msgspec.json.encode(tuple(data))

    def _deserialize(self, data: bytes) -> Any:
        return Message(*msgspec.json.decode(data, type=list))


class RootStorage(SqliteStorage):  # type: ignore[misc]  # huey has no type hints
    """huey's SQLite storage that wakes the worker at once, as both are threads of one process."""

    begin_sql = "begin immediate"  # huey's `exclusive` keeps readers out as well
    blocking = True

    def __init__(self, name: str, **more: Any):
        self._bell = threading.Event()
        super().__init__(name, fsync=True, **more)

    def enqueue(self, data: bytes, priority: float | None = None) -> None:
        """Write a message and ring."""
        super().enqueue(data, priority)
        self._bell.set()

    def dequeue(self) -> bytes | None:
        """Take the oldest message; wait at most FALLBACK_LOOK_S for one."""
        self._bell.clear()  # before the look: what is written after it rings again
        found: bytes | None = super().dequeue()
        if found is None and self._bell.wait(FALLBACK_LOOK_S):
            found = super().dequeue()
        return found

    def peek_many(self, keys: Any) -> dict[str, Any]:  # noqa: ARG002  huey's signature
        """Answer huey's look for a revocation: there are none."""
        return {}

    def pop_data(self, key: str) -> Any:  # noqa: ARG002  huey's signature
        """Answer huey's removal of a revocation: there are none."""
        return EmptyData

    def ring(self) -> None:
        """Wake the worker without a message."""
        self._bell.set()


class Queue:
    """Numbers on their way to `carry_out`, one after another."""

    def __init__(self, state: str, carry_out: Callable[[int], None]):
        self._huey = Huey(
            "root",
            results=False,
            serializer=JsonSerializer(),
            storage_class=RootStorage,
            filename=str(PurePosixPath(state, "queue.db")),
        )
        self._task = self._huey.task(name="carry-out")(carry_out)
        self._stopping = False

    def drop_all(self) -> None:
        """Forget what a process before this one has left."""
        self._huey.storage.flush_queue()

    def put(self, number: int) -> None:
        """Add a number."""
        self._huey.enqueue(self._task.s(number))

    def work(self) -> None:
        """Carry out numbers until `stop`."""
        while not self._stopping:
            task = self._take()
            if task is not None and not self._stopping:
                self._huey.execute(task)

    def stop(self) -> None:
        """Make `work` return after the number at hand."""
        self._stopping = True
        self._huey.storage.ring()

    def close(self) -> None:
        """Close the database."""
        self._huey.storage.close()

    def _take(self) -> Any:
        try:
            return self._huey.dequeue()
        except sqlite3.Error:
            raise
        except Exception:  # huey and msgspec have no common one for a message that is not ours
            traceback.print_exc()
            return None
