"""Following an operation: from any cursor, across what it waits for, to its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from banger.events import vocabulary as ev
from banger.events.log import EventLog
from banger.events.vocabulary import Recorded
from banger.rpc.tail import Tail

PATIENCE_S = 5.0


def request(lane: str) -> ev.OpRequested:
    return ev.OpRequested(kind="t", args={}, steps=("one",), titles=("1",), lane=lane)


def followed(
    log: EventLog, op: str, after: int, meanwhile: Callable[[], None] = lambda: None
) -> list[Recorded]:
    """Follow to the end, with something happening once the follower waits."""

    async def follow() -> list[Recorded]:
        tail = Tail(log)
        dealing = asyncio.create_task(tail.run())
        seen: list[Recorded] = []

        async def collect() -> None:
            seen.extend([row async for row in tail.follow(op, after)])

        collecting = asyncio.create_task(collect())
        await asyncio.sleep(0)  # it has read the backlog
        meanwhile()
        await asyncio.wait_for(collecting, PATIENCE_S)
        dealing.cancel()
        return seen

    return asyncio.run(follow())


def end(log: EventLog, op: str) -> None:
    with log.transaction() as tx:
        tx.append(op, ev.OpEnded(fate="done"), op=op)


def test_every_cursor_gives_what_is_after_it(log: EventLog) -> None:
    """From 0, from the middle and from past the end: each later event once, then the end."""
    op = log.request(request("a"))
    with log.transaction() as tx:
        for _ in range(3):
            tx.append(op, ev.StepProgress(step=0, message="x"), op=op)
    end(log, op)
    for after in range(log.last_seq() + 2):
        rows = followed(log, op, after)
        assert [row.seq for row in rows] == list(range(after + 1, log.last_seq() + 1))


def test_a_client_that_comes_back_sees_what_its_operation_waits_for(log: EventLog) -> None:
    """Its cursor is after `op.parked`: the other operation's events are given all the same."""
    op, child = log.request(request("a")), log.request(request("b"))
    with log.transaction() as tx:
        tx.append(op, ev.OpParked(on=child, reason="x"), op=op)

    def go_on() -> None:
        with log.transaction() as tx:
            tx.append(child, ev.StepProgress(step=0, message="1"), op=child)
        end(log, child)
        end(log, op)

    rows = followed(log, op, log.last_seq(), go_on)
    assert [row.op for row in rows] == [child, child, op]


def test_a_late_follower_sees_all_in_the_order_of_the_log(log: EventLog) -> None:
    """All has ended already; the other operation's events are not lost behind the end."""
    op, child = log.request(request("a")), log.request(request("b"))
    with log.transaction() as tx:
        tx.append(op, ev.OpParked(on=child, reason="x"), op=op)
    end(log, child)
    end(log, op)
    rows = followed(log, op, 0)
    assert [row.op for row in rows] == [op, op, child, child, op]


def test_an_operation_that_was_reopened_is_followed_to_its_last_end(log: EventLog) -> None:
    """The first end is not the end."""
    op = log.request(request("a"))
    with log.transaction() as tx:
        tx.append(op, ev.OpEnded(fate="stuck", error={}), op=op)
        tx.append(op, ev.OpReopened(lane="a", epoch=1), op=op)
    end(log, op)
    assert ev.type_of(followed(log, op, 0)[-1].event) == "op.ended"
    assert followed(log, op, 0)[-1].seq == log.last_seq()


def test_nothing_is_missed_when_the_bell_is_lost(log: EventLog) -> None:
    """A look once a second finds what no ring told of."""
    op = log.request(request("a"))

    def in_silence() -> None:
        end(log, op)
        log.event_bell.drain()

    began = time.monotonic()
    assert len(followed(log, op, 0, in_silence)) == 2
    assert time.monotonic() - began < PATIENCE_S
