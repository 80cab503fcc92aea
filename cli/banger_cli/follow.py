"""Wait for an operation: show its stages, survive the daemon's death, do on Ctrl-C what is wanted."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from banger.errors import BangerError, Cancelled, OperationFailed, Stuck, from_dict
from banger_cli import wire
from banger_cli.interrupt import DETACH, Interruption, uncut
from banger_cli.output import Out
from banger_cli.screen import Screen
from banger_cli.stages import Stages

Json = dict[str, Any]
MAX_LOST = 3
SERVED_S = 0.5


class Cursor:
    """How far a follower has come, so that asking again loses and repeats nothing.

    An operation that is waited for may have begun before: what it did until then comes late, with
    smaller numbers. From there on everything is asked for again, and what was seen is passed over.
    """

    def __init__(self, after: int = 0):
        self._start = self.last = after
        self._seen: set[int] = set()
        self._joined = False

    @property
    def after(self) -> int:
        """The event after which to ask."""
        return self._start if self._joined else self.last

    def has(self, event: Json) -> bool:
        """Tell whether an event was seen."""
        return event["seq"] in self._seen

    def move(self, event: Json) -> None:
        """Note that an event was seen."""
        self._seen.add(event["seq"])
        self.last = max(self.last, event["seq"])
        self._joined = self._joined or event["type"] == "op.parked"


def events(op: str, *, after: int = 0) -> Iterator[Json]:
    """Give each event line of an operation once, in order, and at last the line with its result.

    A lost connection is made again, and the daemon started again, from the last event seen; that
    is said on standard error. Raises ConnectionLost when it is lost at once, three times in a row.
    """
    cursor = Cursor(after)
    for line in _lines(op, cursor, lost=_say_lost):
        if "event" in line:
            cursor.move(line["event"])
        yield line


def _lines(
    op: str, cursor: Cursor, *, lost: Callable[[int], None], idle: Callable[[], None] | None = None
) -> Generator[Json, None, None]:
    """Give what the cursor has not seen; whoever takes a line moves it."""
    losses = pid = gone = 0
    began = 0.0
    while True:
        try:
            with wire.connect() as daemon:
                pid, began = daemon.daemon_pid(), time.monotonic()
                for line in daemon.stream("ops.follow", idle=idle, op=op, after=cursor.after):
                    if "result" in line:
                        yield line
                        return
                    if not cursor.has(line["event"]):
                        yield line
                        losses = 0
        except wire.ConnectionLost:
            # A daemon that has served for a while was ended by somebody; one that has not may be ill.
            losses = 1 if time.monotonic() - began > SERVED_S else losses + 1
            if losses == MAX_LOST:
                raise
            if pid != gone:  # one that is dying may be reached, and lost, once more
                gone = pid
                lost(cursor.last)


def _say_lost(seq: int) -> None:
    Screen().line(f"banger: the daemon went away; following on after event {seq}")


def follow(
    op: str, screen: Screen | None = None, *, after: int = 0, interruption: Interruption | None = None
) -> Json:
    """Wait until an operation has ended, its stages on a screen; give its result, whatever its fate.

    The result has `needless` when all was so already. Ctrl-C leaves it alone, which raises Detached,
    unless `interruption` says otherwise.
    """
    screen = screen or Screen(io.StringIO())
    interruption = interruption or Interruption(screen, DETACH, op)
    stages, cursor = Stages(op, screen), Cursor(after)
    while True:
        try:
            result = _watch(op, stages, cursor)
            break
        except KeyboardInterrupt:
            interruption.meet(op, undoing=stages.turned_back)
    if interruption.cancelled and result["fate"] == "done":
        screen.line(f"{op} was done before it could be cancelled.")
    return {**result, "needless": True} if stages.needless else result


def _watch(op: str, stages: Stages, cursor: Cursor) -> Json:
    """Draw what the cursor has not seen up to the end; KeyboardInterrupt never cuts an event in two."""

    def lost(seq: int) -> None:
        stages.close()
        _say_lost(seq)

    result: Json = {}
    try:
        with contextlib.closing(_lines(op, cursor, lost=lost, idle=stages.tick)) as lines:
            for line in lines:
                if "event" in line:
                    with uncut():
                        stages.feed(line["event"])
                        cursor.move(line["event"])
                result = line.get("result", result)
    finally:
        stages.close()
    return result


def settle(result: Json) -> Json:
    """Give an ended operation's result back if it is done, else raise what became of it.

    Raises Stuck, Cancelled, or the step's own error; one that says nothing to scripts becomes
    OperationFailed.
    """
    if result["fate"] == "done":
        return result
    told = result.get("error") or {}
    hint, op = told.get("hint"), result["op"]
    if result["fate"] == "stuck":
        # Why it turned back is not why it is stuck, and its hint is not the way out.
        why = (told.get("undo_errors") or [told.get("message")])[-1]
        hint = f"`banger ops show {op}` tells more; then `banger ops retry {op}`, `retry-undo` or `abandon`."
        raise Stuck(f"Stuck: {why}" if why else None, hint=hint, op=op)
    if result["fate"] == "cancelled":
        raise Cancelled("The operation was cancelled and undone.", op=op)
    error = from_dict({**told, "op": op})
    if error.exit_code == BangerError.exit_code:
        error = OperationFailed(told.get("message"), hint=hint, op=op)
    raise error


def wait(op: str, out: Out, interruption: Interruption | None = None) -> Json:
    """Show an operation's stages until it is done, and give its result.

    Raises as `settle` and `follow` do.
    """
    return settle(follow(op, out.screen, interruption=interruption))
