"""`banger doctor`: is this host fit, and what to do if not. Needs no daemon."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import click

from banger.errors import HostLacks, InvalidRequest
from banger_cli.commands import Leaf
from banger_cli.output import Out

Json = dict[str, Any]
_MARKS = {"pass": "✓", "warn": "!", "fail": "✗"}


@click.command("doctor", cls=Leaf, epilog="""\
Examples:
  banger doctor
  banger doctor --json | jq '.checks[] | select(.status != "pass")'""")  # fmt: skip
@click.pass_obj
def doctor(out: Out) -> int:
    """Check this host, and say what to do about what it lacks. Exits with 8 when a check fails."""
    checks = [
        {"name": each.name, "status": each.status, "detail": each.detail, "hint": each.hint}
        for each in _examine()
    ]
    failed = sum(each["status"] == "fail" for each in checks)
    out.show({"checks": checks, "ok": not failed}, _story(checks, failed))
    return HostLacks.exit_code if failed else 0


def _examine() -> Iterable[Any]:
    from banger import config
    from banger.doctor import examine

    dirs = config.find_dirs()
    try:
        settings = config.load(dirs)
    except InvalidRequest:
        settings = config.Config()  # what is wrong with the file is one of the findings
    return examine(dirs, settings)


def _story(checks: list[Json], failed: int) -> Iterator[str]:
    yield from marked(checks)
    yield ""
    yield f"{failed} of {len(checks)} checks failed." if failed else "This host is fit."


def marked(checks: list[Json]) -> Iterator[str]:
    """Lay out checks, each with what to do about it unless it passed."""
    width = max((len(each["name"]) for each in checks), default=0)
    for each in checks:
        yield f"{_MARKS[each['status']]} {each['name'].ljust(width)}  {each['detail']}"
        if each["hint"] and each["status"] != "pass":
            yield f"  {' ' * width}  → {each['hint']}"
