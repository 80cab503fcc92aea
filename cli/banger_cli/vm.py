"""`banger vm`: the life of a VM, seen from outside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import click

from banger import layout
from banger.errors import BangerError
from banger_cli import wire
from banger_cli import workspace as workspaces
from banger_cli.commands import Branch, Leaf, interrupt_option, key_option, op_line, wait_options
from banger_cli.follow import wait
from banger_cli.interrupt import Detached, Interruption
from banger_cli.output import Out
from banger_cli.spec import Creates, name, size, spec_line, spec_options

Json = dict[str, Any]

branch = Branch(
    "vm",
    {
        "run": "run:run",
        "create": "vm:create",
        "exec": "inside:exec_",
        "jobs": "jobs:jobs",
        "attach": "jobs:attach",
        "wait": "jobs:wait",
        "kill-job": "jobs:kill_job",
        "cp": "copy:cp",
        "ssh": "inside:ssh",
        "list": "vm:list_",
        "show": "vm:show",
        "logs": "inside:logs",
        "ping": "looking:ping",
        "health": "looking:health",
        "ports": "looking:ports",
        "stats": "looking:stats",
        "history": "past:history",
        "why": "past:why",
        "start": "vm:start",
        "stop": "vm:stop",
        "restart": "vm:restart",
        "kill": "vm:kill",
        "delete": "vm:delete",
        "set": "vm:set_",
        "workspace": "workspace:branch",
        "touch": "looking:touch",
        "prune": "prune:prune",
    },
    aliases={"ps": "list", "ls": "list", "rm": "delete"},
    help="Make virtual machines, go inside, throw them away.",
    epilog="""\
Examples:
  banger vm run --rm -- uname -a      one command in a fresh machine
  banger vm create web --wait         a machine that stays
  banger vm exec web -- make test     a command in it
  banger vm delete web                without a trace""",
)


@click.command("create", cls=Creates, epilog="""\
Examples:
  banger vm create web --wait
  banger vm create big --vcpu 4 --memory 4G --disk-size 20G --nat --wait
  for i in 1 2 3; do banger vm create web-$i; done; banger ops list

Next: banger vm ssh web""")  # fmt: skip
@click.argument("positional", metavar="[NAME]", required=False, type=name)
@spec_options
@click.option("--no-start", is_flag=True, help="Make its disks only.")
@click.option("--wait", "waits", is_flag=True, help="Show the stages and wait until it is ready.")
@interrupt_option
@key_option
@click.pass_obj
def create(
    out: Out,
    /,
    positional: str | None,
    no_start: bool,
    waits: bool,
    on_interrupt: str | None,
    **spec: Any,
) -> None:
    """Create a VM and start it.

    Prints what it is made of and the operation's id at once, and returns while the work goes on.
    """
    spec["name"] = _one_name(positional, spec["name"])
    reply = wire.call("vm.create", start=not no_start, ephemeral=False, **spec)
    out.lines([spec_line(reply["spec"]), op_line(reply)])
    if waits:
        result = wait(reply["op"], out, Interruption.of(out.screen, on_interrupt, reply))
        reply |= {"fate": result["fate"], "seconds": result["seconds"]}
        out.lines([f"{'created' if no_start else 'ready'} in {layout.seconds(result['seconds'])}"])
    if out.as_json:
        out.document(reply)


def _one_name(positional: str | None, option: str | None) -> str | None:
    if positional and option and positional != option:
        raise click.UsageError(
            f"Two names are given: {positional} and {option}.", click.get_current_context()
        )
    return positional or option


_AT_REST = ("stopped", "failed")


@click.command("list", cls=Leaf, epilog="""\
Examples:
  banger ps                           those that run, or are on their way
  banger ps -a                        all of them
  banger vm delete $(banger ps -aq)   away with all""")  # fmt: skip
@click.option("-a", "--all", "everything", is_flag=True, help="Stopped and failed ones too.")
@click.option("-q", "--quiet", is_flag=True, help="Names only.")
@click.option(
    "--at", "moment", metavar="TIME", help="As they were then: 2026-01-31T12:00, or 90s, 15m, 2h ago."
)
@click.pass_obj
def list_(out: Out, everything: bool, quiet: bool, moment: str | None) -> None:
    """List the VMs. It never waits for a sick one."""
    if moment is not None:
        from banger_cli import past

        past.list_at(out, moment, everything=everything)
        return
    if not (quiet or out.as_json):
        with wire.connect() as daemon:
            out.lines(daemon.text("vm.table", all=everything).splitlines())
        return
    vms = [vm for vm in wire.call("vm.list")["vms"] if everything or vm["state"] not in _AT_REST]
    out.show({"vms": vms}, [vm["name"] for vm in vms])


@click.command("show", cls=Leaf, epilog="""\
Examples:
  banger vm show web
  banger vm show web --json""")  # fmt: skip
@click.argument("vm", metavar="NAME")
@click.pass_obj
def show(out: Out, vm: str) -> None:
    """Show all about a VM, what it holds and what was done to it."""
    found = wire.call("vm.show", vm=vm)["vm"]
    out.show({"vm": found}, _story(found))


def _story(vm: Json) -> Iterator[str]:
    asked = "" if vm["desired"] == vm["state"] else f" (asked for: {vm['desired']})"
    yield from layout.pairs(
        [
            ("name", vm["name"]),
            ("id", vm["id"]),
            ("state", vm["state"] + asked),
            ("reason", vm["reason"]),
            ("at work", vm["op"]),
            ("image", vm["image"]),
            ("kernel", vm["kernel"]),
            ("vcpu", _asked_for(vm, "vcpu")),
            ("memory", _asked_for(vm, "memory_mib", "MiB")),
            ("disk", f"{vm['disk_mib']}MiB"),
            ("root disk", vm["root_disk"]),
            ("network", vm["network"]),
            ("nat", _asked_for(vm, "nat")),
            ("address", vm["address"]),
            ("ephemeral", "yes, it goes with the command that made it" if vm["ephemeral"] else None),
            *workspaces.story(vm["workspace"]),
            ("created", layout.moment(vm["created_us"])),
            ("started", layout.moment(vm["started_us"])),
            ("ssh port", vm["ssh_port"]),
            ("pid", vm["pid"]),
            ("vmm", vm.get("vmm")),
            ("accelerator", vm.get("accelerator")),
            ("idle", _idle(vm)),
            ("console", vm.get("console")),
        ]
    )
    if vm["resources"]:
        rows = [(each["kind"], each["id"], each["state"], each["op"]) for each in vm["resources"]]
        yield from ("", *layout.table(("RESOURCE", "ID", "STATE", "OP"), rows))
    if vm["history"]:
        history = [
            (layout.moment(each["time_us"]), each["op"], each["kind"], each["fate"]) for each in vm["history"]
        ]
        yield from ("", *layout.table(("WHEN", "OP", "KIND", "FATE"), history))


def _asked_for(vm: Json, key: str, unit: str = "") -> str:
    """Show a setting; while the VM runs with another, both."""
    now = vm.get("runs_with", {}).get(key)
    asked = _worded(vm[key]) + unit
    return asked if now is None else f"{_worded(now)}{unit} (asked for: {asked}, from its next start)"


def _worded(value: int | bool) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _idle(vm: Json) -> str | None:
    if vm.get("auto_stop_in_s") is None:
        return None
    idle, left = layout.seconds(vm["idle_s"]), layout.seconds(vm["auto_stop_in_s"])
    return f"for {idle}; stopped in {left} if nobody uses it"


class Ends(NamedTuple):
    """How the end of an operation on a VM is told: it was done, or there was nothing to do."""

    done: str
    needless: str


def _verb(word: str, sentence: str, ends: Ends) -> click.Command:
    """Make the command for an operation on VMs that exist."""

    @click.command(word, cls=Leaf, help=sentence, epilog=f"Examples:\n  banger vm {word} web")
    @click.argument("vms", metavar="NAME...", nargs=-1, required=True)
    @wait_options
    @key_option
    @click.pass_obj
    def verb(out: Out, vms: tuple[str, ...], waits: bool, on_interrupt: str | None, key: str | None) -> int:
        if key is not None and len(vms) > 1:
            raise click.UsageError("A key belongs to one request.", click.get_current_context())
        ask = functools.partial(wire.call, f"vm.{word}", key=key)
        return _on_each(out, vms, ask, ends if waits else None, on_interrupt)

    return verb


def _on_each(
    out: Out,
    vms: tuple[str, ...],
    ask: Callable[..., Json],
    ends: Ends | None,
    on_interrupt: str | None,
) -> int:
    """Ask for all first, so that they go on side by side, then wait for each in turn.

    One name fails as any command does; of several, each tells its own end and the first error
    decides the exit code. Ctrl-C detaches from all, or cancels all that have not ended.
    """
    asked = [_attempt(functools.partial(ask, vm=vm)) for vm in vms]
    interruption = Interruption.of(out.screen, on_interrupt, *(one for one in asked if isinstance(one, dict)))
    results = [_finish(out, one, ends, interruption) for one in asked]
    failures = [one for one in results if isinstance(one, BangerError)]
    if len(vms) == 1 and failures:
        raise failures[0]
    for failure in failures:
        if not out.as_json:
            out.warn(failure)
    if out.as_json:
        ops = [{"error": one.to_dict()} if isinstance(one, BangerError) else one for one in results]
        out.document(ops[0] if len(vms) == 1 else {"ops": ops})
    return failures[0].exit_code if failures else 0


def _attempt(act: functools.partial[Json]) -> Json | BangerError:
    try:
        return act()
    except Detached:
        raise
    except BangerError as error:
        return error


def _finish(
    out: Out, asked: Json | BangerError, ends: Ends | None, interruption: Interruption
) -> Json | BangerError:
    if isinstance(asked, BangerError):
        return asked
    if ends is None:
        out.lines([f"{asked['name']}: {asked['op']}"])
        return asked
    result = _attempt(functools.partial(wait, asked["op"], out, interruption))
    if isinstance(result, BangerError):
        return result
    out.lines([f"{asked['name']} {_told(result, ends)}"])
    return {**asked, "fate": result["fate"], "seconds": result["seconds"]}


def _told(result: Json, ends: Ends) -> str:
    return ends.needless if "needless" in result else f"{ends.done} in {layout.seconds(result['seconds'])}"


start = _verb(
    "start",
    "Start VMs that are stopped. One that runs already is left alone.",
    Ends("is ready", "runs already"),
)
stop = _verb(
    "stop",
    "Stop VMs: gracefully, then with the power button, then at once.",
    Ends("has stopped", "is stopped already"),
)
restart = _verb(
    "restart", "Stop VMs gracefully and start them again.", Ends("is ready again", "runs already")
)
kill = _verb(
    "kill", "Stop VMs at once; what the guest has not written is lost.", Ends("is off", "is off already")
)
delete = _verb(
    "delete", "Delete VMs, whatever state they are in, without a trace.", Ends("is gone", "is gone already")
)


@click.command("set", cls=Leaf, epilog="""\
Examples:
  banger vm set web --vcpu 4 --memory 4G   from its next start: banger vm restart web
  banger vm set web --disk-size 40G        of a stopped one; disks grow only
  banger vm set web --nat                  let it reach the world, from now on
  banger vm set web --no-nat --wait        cut it off; connections that stand go, too""")  # fmt: skip
@click.argument("vm", metavar="NAME")
@click.option("--vcpu", type=click.IntRange(1), help="Virtual CPUs.")
@click.option("--memory", "memory_mib", type=size, help="RAM: 512M, 2G (MiB by default).")
@click.option("--disk-size", "disk_mib", type=size, help="Size of the disk at /root.")
@click.option("--nat/--no-nat", default=None, help="Let it reach the network, or not.")
@wait_options
@key_option
@click.pass_obj
def set_(
    out: Out, /, vm: str, waits: bool, on_interrupt: str | None, key: str | None, **changes: int | bool | None
) -> int:
    """Change what a VM is asked to be.

    CPUs and memory change at its next start, NAT at once for one on a bridge, the disk while it is stopped.
    """
    if all(value is None for value in changes.values()):
        raise click.UsageError(
            "Say what to change: --vcpu, --memory, --disk-size, --nat or --no-nat.",
            click.get_current_context(),
        )
    ask = functools.partial(wire.call, "vm.set", key=key, **changes)
    nat = "has NAT now" if changes["nat"] else "is cut off now"
    ends = Ends("is changed" if changes["nat"] is None else nat, "is so already")
    return _on_each(out, (vm,), ask, ends if waits else None, on_interrupt)
