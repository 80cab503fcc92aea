"""huey's queue as a projection of the event log.

huey ships a queue that deletes a row before it runs the task: a killed worker loses it. Here
`dequeue` is an append (`op.claimed`) that takes a row of the work table, and the row stays until
`op.ended` is appended: at-least-once, with fenced results. The message is made from the row and
carries an id and an epoch, in JSON; nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from huey import Huey
from huey.constants import EmptyData
from huey.registry import Message
from huey.serializer import Serializer
from huey.storage import BaseStorage

from banger.config import Capacity
from banger.events import work
from banger.events.log import EventLog
from banger.model import Process

FALLBACK_LOOK_S = 1.0


class JsonSerializer(Serializer):  # type: ignore[misc]  # huey has no type hints
    """huey messages as JSON, whoever reads the queue."""

    def _serialize(self, data: Any) -> bytes:
        return msgspec.json.encode(tuple(data))

    def _deserialize(self, data: bytes) -> Any:
        return Message(*msgspec.json.decode(data, type=list))


class LogStorage(BaseStorage):  # type: ignore[misc]  # huey has no type hints
    """The part of huey's storage that banger uses: a blocking queue of operations.

    Results, schedules, locks and key-value data are not kept here: they are events.
    """

    blocking = True

    def __init__(self, name: str, *, log: EventLog, worker: Process, capacity: Capacity, **_: Any):
        super().__init__(name)
        self._log = log
        self._worker = worker
        self._capacity = capacity
        self.message: Callable[[work.Claim], bytes] = lambda _: b""

    def enqueue(self, data: bytes, priority: float | None = None) -> None:  # noqa: ARG002  huey's signature
        """Wake a worker: the row is there already, by the append of `op.requested`."""
        work.nudge(self._log)

    def dequeue(self) -> bytes | None:
        """Claim the next operation and make its message; wait at most FALLBACK_LOOK_S for one."""
        work.let_go(self._log, self._worker)
        held = work.claim(self._log, self._worker, self._capacity)
        if held is None and self._log.work_bell.wait(FALLBACK_LOOK_S):
            held = work.claim(self._log, self._worker, self._capacity)
        if held is None:
            return None
        if work.more(self._log, self._capacity):
            work.nudge(self._log)  # one ring wakes one worker: pass it on
        return self.message(held)

    def queue_size(self) -> int:
        """Count the operations that have not ended."""
        return int(self._log.db.execute("SELECT count(*) FROM work").fetchone()[0])

    def peek_data(self, key: str) -> Any:  # noqa: ARG002  huey's signature
        """Answer huey's look for a revocation: there are none, cancelling is an event."""
        return EmptyData

    pop_data = peek_data


def connect(log: EventLog, worker: Process, capacity: Capacity, advance: Callable[[str, int], None]) -> Huey:
    """Make one worker's huey, whose only task advances one operation under one claim."""
    huey = Huey(
        "banger",
        results=False,
        serializer=JsonSerializer(),
        storage_class=LogStorage,
        log=log,
        worker=worker,
        capacity=capacity,
    )
    task = huey.task(name="advance")(advance)
    huey.storage.message = lambda held: huey.serialize_task(task.s(held.op, held.epoch))
    return huey
