"""The verb table: for each request its handler, and what it may bring along."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from banger.helper.requests import Ask

Facts = dict[str, Any]
"""What a handler answers: JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks, as the kernel says (SO_PEERCRED of socket(7)) at the moment of connect(2)."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request on its way through: who asks, for which step, and the descriptors that came with it.

    `give` collects descriptors for the answer; whoever sends it closes them.
    """

    caller: Caller
    op: str
    step: str
    epoch: int
    fds: tuple[int, ...] = ()
    give: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """How one kind of request is carried out.

    `run` gets the host, the ledger, the call and the request; it is "make it so", safe to repeat
    after a kill anywhere inside it. `fds` tells how many descriptors a request brings. A verb that
    only `reads` is answered without an audit line when it is allowed.
    """

    ask: type[Ask]
    run: Callable[..., Facts]
    fds: Callable[[Any], int] = lambda _: 0
    reads: bool = False
