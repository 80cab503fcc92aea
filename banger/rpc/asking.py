"""Ask for an operation once: a request that is repeated follows the operation it asked for first.

One repeated with its idempotency key does so for ever, also when that operation has ended. One
without a key does so while the newest operation of its lane is the same.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import msgspec

from banger.errors import InvalidRequest
from banger.events import queries
from banger.events import vocabulary as ev
from banger.events.log import EventLog
from banger.rpc import protocol as p

_KEY = re.compile(r"[!-~]{1,128}", re.ASCII)


def repeated(log: EventLog, request: p.Request) -> dict[str, Any] | None:
    """Answer a request whose idempotency key was used before; None when it has no such key.

    Raises InvalidRequest when the key is not one, or came with another request.
    """
    key = getattr(request, "key", None)
    if key is None:
        return None
    if not _KEY.fullmatch(key):
        raise InvalidRequest("An idempotency key has 1 to 128 printable ASCII characters, without spaces.")
    known = queries.op_by_key(log, key)
    if known is None:
        return None
    op, asked = known
    if asked != digest(request):
        raise InvalidRequest(
            f"The idempotency key {key!r} was used for another request.",
            hint=f"`banger ops show {op}` shows it. Another request needs another key.",
            op=op,
        )
    return reply(log, op)


def stamped(asked: ev.OpRequested, request: p.Request | None) -> ev.OpRequested:
    """Give what is asked for with the key of the request that asks, if it has one."""
    key = getattr(request, "key", None)
    if request is None or key is None:
        return asked
    return msgspec.structs.replace(asked, key=key, asked=digest(request))


def digest(request: p.Request) -> str:
    """Tell requests apart: what was asked, without the key."""
    bare = msgspec.structs.replace(request, key=None)
    return hashlib.sha256(request.method.encode() + b"\0" + msgspec.json.encode(bare)).hexdigest()[:32]


def under_way(log: EventLog, kind: str, lane: str) -> str | None:
    """Find the operation that does this already: the newest of the lane, if it is of this kind."""
    last = queries.last_in_lane(log, lane)
    return last.id if last is not None and last.kind == kind else None


def reply(log: EventLog, op_id: str) -> dict[str, Any]:
    """Answer with an operation that was asked for before."""
    op = queries.whole_op(log, op_id)
    answer: dict[str, Any] = {"op": op.id, "joined": True}
    answer |= {key: value for key, value in (("vm", op.vm), ("name", op.name)) if value is not None}
    if op.kind == "vm.create":
        answer["spec"] = msgspec.to_builtins(queries.spec_asked(log, op.id))
    return answer
