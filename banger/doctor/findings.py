"""What a look at the host gives."""

from __future__ import annotations

from typing import Literal

from banger import config
from banger.model import Value

Status = Literal["pass", "warn", "fail"]


class Check(Value):
    """What was looked at, how it is, what was found, and what to do about it."""

    name: str
    status: Status
    detail: str
    hint: str | None = None


class Host(Value):
    """Whose host is examined."""

    dirs: config.Dirs
    config: config.Config


def judge(name: str, good: bool, detail: str, hint: str | None, *, otherwise: Status = "warn") -> Check:
    """Give a check that passes, without its hint, or is what it is `otherwise`."""
    return Check(name=name, status="pass" if good else otherwise, detail=detail, hint=None if good else hint)
