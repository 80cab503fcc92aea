"""`banger vm prune`: delete the VMs that are at rest."""

from __future__ import annotations

import sys
from typing import Any

import click

from banger import layout
from banger.errors import BangerError
from banger_cli import wire
from banger_cli.commands import Leaf
from banger_cli.follow import wait
from banger_cli.interrupt import Interruption
from banger_cli.output import Out

Json = dict[str, Any]
AT_REST = ("stopped", "failed")


@click.command("prune", cls=Leaf, epilog="""\
Examples:
  banger vm prune                     shows them, asks, deletes them
  banger vm prune --dry-run
  banger vm prune -f                  without a question, as in a script""")  # fmt: skip
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only show which they are.")
@click.pass_obj
def prune(out: Out, force: bool, dry_run: bool) -> int:
    """Delete all VMs that are stopped or failed, with their disks."""
    vms = [vm for vm in wire.call("vm.list")["vms"] if vm["state"] in AT_REST]
    out.lines(_table(vms) if vms else ["No VM is stopped or failed."])
    if dry_run or not vms:
        return _told(out, {"vms": vms, "ops": [], "left": []})
    if not force and not _agreed(len(vms)):
        out.lines(["Nothing was deleted."])
        return 0
    reply = wire.call("vm.prune", vms=[vm["id"] for vm in vms])
    for one in reply["left"]:
        out.note(f"{one['name']} is {one['state']} by now: it was left alone.")
    return _told(out, {"vms": vms, **reply, **_finish(out, reply["ops"])})


def _table(vms: list[Json]) -> list[str]:
    rows = [(vm["name"], vm["state"], vm["image"], layout.ago(vm["created_us"]), vm["reason"]) for vm in vms]
    return layout.table(("NAME", "STATE", "IMAGE", "AGE", "REASON"), rows)


def _agreed(count: int) -> bool:
    """Ask a person; whoever is no person has to say so beforehand."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise click.UsageError("There is nobody to ask: -f deletes them.", click.get_current_context())
    what = "this VM and its disks" if count == 1 else f"these {count} VMs and their disks"
    return click.confirm(f"Delete {what}?", err=True)


def _finish(out: Out, ops: list[Json]) -> Json:
    """Wait for each deletion; they go on side by side."""
    interruption = Interruption.of(out.screen, None, *ops)
    ended = []
    failed = None
    for op in ops:
        try:
            result = wait(op["op"], out, interruption)
            ended.append({**op, "fate": result["fate"]})
            out.lines([f"{op['name']} is gone"])
        except BangerError as error:
            failed = failed or error
            ended.append({**op, "error": error.to_dict()})
            if not out.as_json:
                out.warn(error)
    return {"ops": ended, "exit": failed.exit_code if failed else 0}


def _told(out: Out, document: Json) -> int:
    code: int = document.pop("exit", 0)
    if out.as_json:
        out.document(document)
    return code
