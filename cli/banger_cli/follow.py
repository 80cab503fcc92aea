"""Wait for an operation: show its stages, survive the daemon's death, leave on Ctrl-C."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from banger.errors import BangerError, Cancelled, OperationFailed, Stuck, from_dict
from banger_cli import wire
from banger_cli.output import Out
from banger_cli.screen import Screen
from banger_cli.stages import Stages

Json = dict[str, Any]
MAX_LOST = 3


class Detached(BangerError):
    """Detached; the operation goes on."""

    code: ClassVar[str] = "detached"
    exit_code: ClassVar[int] = 130

    def __init__(self, op: str):
        super().__init__(
            hint=f"`banger ops follow {op}` shows it, `banger ops cancel {op}` undoes it.", op=op
        )


def events(op: str, *, idle: Callable[[], None] | None = None, after: int = 0) -> Iterator[Json]:
    """Give each event line of an operation once, in order, and at last the line with its result.

    A lost connection is made again, and the daemon started again, from the last event seen.
    Raises ConnectionLost when that brings nothing new three times in a row.
    """
    lost = 0
    while True:
        try:
            with wire.connect() as daemon:
                for line in daemon.stream("ops.follow", idle=idle, op=op, after=after):
                    yield line
                    if "result" in line:
                        return
                    after, lost = line["event"]["seq"], 0
        except wire.ConnectionLost:
            lost += 1
            if lost == MAX_LOST:
                raise


def follow(op: str, screen: Screen | None = None, *, after: int = 0) -> Json:
    """Wait until an operation has ended, its stages on a screen; give its result, whatever its fate.

    Raises Detached on Ctrl-C: the operation itself goes on.
    """
    stages = Stages(op, screen or Screen(io.StringIO()))
    result: Json = {}
    try:
        for line in events(op, idle=stages.tick, after=after):
            if "event" in line:
                stages.feed(line["event"])
            result = line.get("result", result)
    except KeyboardInterrupt:
        raise Detached(op) from None
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
        hint = hint or f"`banger ops show {op}` tells which step could not be undone."
        raise Stuck(told.get("message"), hint=hint, op=op)
    error = from_dict({**told, "op": op})
    if result["fate"] == "cancelled" and not told:
        error = Cancelled(op=op)
    if error.exit_code == BangerError.exit_code:
        error = OperationFailed(told.get("message"), hint=hint, op=op)
    raise error


def wait(op: str, out: Out) -> Json:
    """Show an operation's stages until it is done, and give its result; raises as `settle` does."""
    return settle(follow(op, out.screen))
