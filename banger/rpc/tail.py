"""Hand new events to whoever follows an operation, losing and repeating none."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator

from banger.events import vocabulary as ev
from banger.events.log import EventLog
from banger.events.vocabulary import Recorded

LOOK_S = 1.0
"""If a ring is lost, a look at the log finds what it would have told."""


class _Feed:
    """Events on their way to one follower, in the order of the log whenever they were found."""

    def __init__(self) -> None:
        self._queue: asyncio.PriorityQueue[tuple[int, int, Recorded]] = asyncio.PriorityQueue()
        self._arrivals = itertools.count()  # so that two copies of a row are never compared

    def put(self, row: Recorded) -> None:
        self._queue.put_nowait((row.seq, next(self._arrivals), row))

    async def get(self) -> Recorded:
        return (await self._queue.get())[2]


class Tail:
    """Reads the log's new events once and deals them out."""

    def __init__(self, log: EventLog):
        self._log = log
        self._seq = log.last_seq()
        self._followers: dict[str, set[_Feed]] = defaultdict(set)
        self.listeners: list[Callable[[Recorded], None]] = []

    async def run(self) -> None:
        """Deal out events for ever: when the bell rings, and once a second."""
        loop = asyncio.get_running_loop()
        rung = asyncio.Event()
        loop.add_reader(self._log.event_bell.fileno(), rung.set)
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(rung.wait(), LOOK_S)
                self._log.event_bell.drain()
                rung.clear()
                self.look()
        finally:
            loop.remove_reader(self._log.event_bell.fileno())

    def look(self) -> None:
        """Deal out what is new in the log."""
        for row in self._log.read(after=self._seq):
            self._seq = row.seq
            for feed in self._followers.get(row.op or "", ()):
                feed.put(row)
            for listener in self.listeners:
                listener(row)

    def _reopened(self, end: Recorded) -> bool:
        """Tell whether an operation went on after this end."""
        return bool(self._log.read(stream=end.stream, after=end.seq, kind="op.reopened", limit=1))

    @contextlib.contextmanager
    def _subscribed(self, op: str, feed: _Feed) -> Iterator[None]:
        self._followers[op].add(feed)
        try:
            yield
        finally:
            self._followers[op].discard(feed)
            if not self._followers[op]:
                del self._followers[op]

    async def everything(self, after: int) -> AsyncIterator[Recorded]:
        """Give every event with seq > `after`, for ever."""
        feed = _Feed()
        self.listeners.append(feed.put)
        try:
            for row in self._log.read(after=after):
                feed.put(row)
            while True:
                row = await feed.get()
                if row.seq > after:
                    after = row.seq
                    yield row
        finally:
            self.listeners.remove(feed.put)

    async def follow(self, op: str, after: int = 0) -> AsyncIterator[Recorded]:
        """Give the events of an operation with seq > `after` until it has ended.

        While it waits for another operation, that one's events are given too.
        """
        feed = _Feed()
        with contextlib.ExitStack() as subscriptions:
            subscriptions.enter_context(self._subscribed(op, feed))
            followed = {op: 0}  # also what is not given again tells of children and of the end
            for row in self._log.read(op=op):
                feed.put(row)
            while True:
                row = await feed.get()
                name = row.op or ""
                if row.seq <= followed[name]:
                    continue  # it was in the backlog already
                followed[name] = row.seq
                if row.seq > after:
                    yield row
                event = row.event
                if isinstance(event, ev.OpEnded) and name == op and not self._reopened(row):
                    return
                if isinstance(event, ev.OpParked) and event.on not in followed:
                    followed[event.on] = 0
                    subscriptions.enter_context(self._subscribed(event.on, feed))
                    for old in self._log.read(op=event.on):
                        feed.put(old)
