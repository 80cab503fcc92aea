"""What was: `vm history`, `vm why`, `vm list --at`."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import click

from banger import layout
from banger_cli import wire
from banger_cli.commands import Leaf
from banger_cli.output import Out

Json = dict[str, Any]

_UNITS = {"s": 1, "m": layout.MINUTE, "h": layout.HOUR, "d": layout.DAY}


def moment_us(text: str) -> int:
    """Read a moment: ISO 8601 (local time unless it has a zone), or how long ago, such as `15m`.

    Gives microseconds since the epoch; raises click.BadParameter.
    """
    if ago := re.fullmatch(r"(\d+)([smhd])(?: ago)?", text, re.ASCII):
        return int((time.time() - int(ago[1]) * _UNITS[ago[2]]) * 1e6)
    try:
        return int(datetime.fromisoformat(text).timestamp() * 1e6)
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is no moment; give 2026-01-31T12:00, or 90s, 15m, 2h, 3d for so long ago."
        ) from None


def list_at(out: Out, text: str, *, everything: bool) -> None:
    """Show the VMs there were at a moment."""
    vms = wire.call("vm.list-at", time_us=moment_us(text))["vms"]
    shown = [vm for vm in vms if everything or vm["state"] != "stopped"]
    rows = [(vm["name"], vm["state"], vm["image"], vm["vcpu"], vm["id"]) for vm in shown]
    out.show({"vms": shown}, layout.table(("NAME", "STATE", "IMAGE", "CPU", "ID"), rows))


@click.command("history", cls=Leaf, epilog="Examples:\n  banger vm history web")
@click.argument("vm", metavar="NAME")
@click.pass_obj
def history(out: Out, vm: str) -> None:
    """Tell what was done to a VM, the oldest first; also when gone."""
    reply = wire.call("vm.history", vm=vm)
    rows = [
        (
            layout.moment(op["requested_us"]),
            op["id"],
            op["kind"],
            op["fate"] or op["state"],
            None if op["seconds"] is None else layout.seconds(op["seconds"]),
            (op["error"] or {}).get("message", ""),
        )
        for op in reply["ops"]
    ]
    out.show(reply, layout.table(("WHEN", "OP", "KIND", "FATE", "TOOK", "ERROR"), rows))


@click.command("why", cls=Leaf, epilog="Examples:\n  banger vm why web")
@click.argument("vm", metavar="NAME")
@click.pass_obj
def why(out: Out, vm: str) -> None:
    """Tell the last failure of a VM as a story; also when it is gone."""
    reply = wire.call("vm.why", vm=vm)
    out.show(reply, _story(reply))


def _story(reply: Json) -> Iterator[str]:
    op = reply["op"]
    if op is None:
        yield f"No operation has failed for {reply['name']}."
        if reply["reason"]:
            yield f"It is {reply['state']}: {reply['reason']}"
        return
    error = op["error"]
    yield f"{layout.moment(op['requested_us'])}: {op['kind']} was asked for {reply['name']} ({op['id']})."
    for step in op["steps"]:
        if step["attempts"]:
            took = "" if step["seconds"] is None else f" in {layout.seconds(step['seconds'])}"
            tries = "" if step["attempts"] == 1 else f", tried {step['attempts']} times"
            said = f": {step['error']['message']}" if step["error"] else ""
            yield f"  {step['title']}{took}{tries}{said}"
    yield f"It ended {op['fate']}: {error['message']}"
    if error.get("hint"):
        yield f"What to do: {error['hint']}"
    undone = [step["title"] for step in op["steps"] if step["undone"]]
    if undone:
        yield f"Undone again: {', '.join(reversed(undone))}."
    left = [f"{r['kind']} {r['id']}" for r in op["resources"] if r["state"] != "released"]
    if left and op["fate"] != "done":
        yield f"Still there: {', '.join(left)}."
