"""Ask root's pool for the effect of a step: under the operation's id, step and epoch."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from banger.helper import client
from banger.helper.client import Answer
from banger.helper.requests import Ask, AuditOf, Hello, Listing, Request
from banger.model import Process, Value

NOBODY = "op-0"
"""The operation of a question that belongs to none."""


class Made(Value):
    """One thing that root says is on the host, made for this owner; for a jail, what was started in it."""

    kind: str
    id: str
    vm: str
    op: str
    process: Process | None = None
    address: str | None = None


class Root(Protocol):
    """How root is asked: a pool behind a socket, or a record of one."""

    def ask(self, request: Request, fds: Sequence[int] = ()) -> Answer:
        """Have a request carried out.

        Raises HelperDown when nobody can tell what became of it, Refused, or what went wrong.
        """


class Pool:
    """Root's pool behind its socket."""

    def __init__(self, socket: Path):
        self._socket = socket

    def ask(self, request: Request, fds: Sequence[int] = ()) -> Answer:
        """Have a request carried out; see `Root.ask`."""
        return client.ask(self._socket, request, fds)


def hello(root: Root) -> dict[str, Any]:
    """Ask what root offers here."""
    return root.ask(_question(Hello())).facts


def made(root: Root) -> Iterable[Made]:
    """List what root has made for this owner and finds on the host."""
    listed = root.ask(_question(Listing())).facts["found"]
    return [_made(each) for each in listed]


def _made(each: dict[str, str]) -> Made:
    process = None
    if "pid" in each:
        process = Process(pid=int(each["pid"]), start_ticks=int(each["start_ticks"]), boot_id=each["boot_id"])
    return Made(
        kind=each["kind"],
        id=each["id"],
        vm=each["vm"],
        op=each["op"],
        process=process,
        address=each.get("address"),
    )


def audit_of(root: Root, op: str) -> list[dict[str, Any]]:
    """Give root's audit lines of an operation, the oldest first."""
    lines: list[dict[str, Any]] = root.ask(_question(AuditOf(of=op))).facts["lines"]
    return lines


def _question(ask: Ask) -> Request:
    key = f"question/{secrets.token_hex(12)}"
    return Request(op=NOBODY, step="question", epoch=1, key=key, ask=ask)  # type: ignore[arg-type]  # AnyAsk is all of them
