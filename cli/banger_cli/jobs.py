"""`vm exec -d` and what one does with a job: a command in a guest that outlives whoever began it."""

from __future__ import annotations

import base64
import binascii
import secrets
import shlex
import time
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

import click

from banger import layout
from banger.errors import BangerError, NotFound
from banger.guest.words import BUSYBOX, Command, as_bytes, check, script
from banger_cli import session, wire
from banger_cli.commands import Leaf
from banger_cli.inside import carried, execute
from banger_cli.output import Out

Json = dict[str, Any]
_NOT_THERE = 3
_LETTERS = "0123456789abcdefghjkmnpqrstvwxyz"  # none that looks like another
_MOST_LISTED = 4 << 20


class Job(NamedTuple):
    """One job as the guest tells of it; `exit` is None while it runs."""

    id: str
    pid: int
    since_s: int
    exit: int | None
    command: str


def begin(out: Out, vm: str, words: Sequence[str], start: Json) -> int:
    """Start a job and print its name; it starts as `vm exec` would start it."""
    command = Command(
        words=tuple(words),
        environ=tuple((name, value) for name, value in start["environ"] or ()),
        directory=start["directory"],
        user=start["user"],
    )
    check(command)
    job = "job-" + "".join(secrets.choice(_LETTERS) for _ in range(5))
    seconds = str(start["timeout_s"] or 0)
    stays = start["directory"] is None and start["user"] is None  # where `begin` is started: a workspace, say
    text = script(command, home=not stays)
    code, _ = _asked(vm, "begin", job, seconds, shlex.join(words), text)
    if code:
        raise BangerError(f"The job could not be started in {vm}.", hint="Is there room in its /run?")
    out.show({"job": job}, [job])
    return 0


def _asked(vm: str, *words: str) -> tuple[int, bytes]:
    """Have the guest do something about jobs; its exit code and output. Raises NotFound, BangerError."""
    said, errors = bytearray(), bytearray()
    with wire.connect() as daemon:
        daemon.request("vm.exec", vm=vm, tty=False, **carried(_program(*words)))
        code = session.Session(daemon, stdin=None, stdout=_bounded(said), stderr=_bounded(errors)).run()
    if code == _NOT_THERE:
        raise _no_job(vm, words[1])
    return code, bytes(said)


def _program(*words: str) -> list[str]:
    asset = resources.files("banger.guest").joinpath("assets", "job").read_text()
    return [BUSYBOX, "sh", "-c", asset, "job", *words]


def _bounded(to: bytearray) -> session.Sink:
    def take(data: bytes) -> None:
        to.extend(data)
        if len(to) > _MOST_LISTED:
            raise BangerError("The guest says more about its jobs than there can be to say.")

    return take


def _no_job(vm: str, job: str) -> NotFound:
    return NotFound(
        f"{vm} has no job {job!r}.", hint=f"`banger vm jobs {vm}` lists them; a boot forgets all."
    )


@click.command("jobs", cls=Leaf, epilog="""\
Examples:
  banger vm exec -d web -- make world
  banger vm jobs web""")  # fmt: skip
@click.argument("vm", metavar="NAME")
@click.pass_obj
def jobs(out: Out, vm: str) -> None:
    """List what was started in a VM with `vm exec -d`, since it booted."""
    _, said = _asked(vm, "list", "")
    now, *lines = said.decode("ascii", "replace").splitlines() or [""]
    behind_s = int(time.time()) - (int(now) if now.isdigit() else 0)
    found = [job for job in (_parsed(line, behind_s) for line in lines) if job is not None]
    rows = [
        (
            job.id,
            "running" if job.exit is None else f"exit {job.exit}",
            str(job.pid),
            layout.ago(job.since_s * 1_000_000),
            job.command,
        )
        for job in sorted(found, key=lambda job: job.since_s)
    ]
    out.show(
        {"jobs": [job._asdict() for job in found]},
        layout.table(("JOB", "STATE", "PID", "STARTED", "COMMAND"), rows),
    )


def _parsed(line: str, behind_s: int) -> Job | None:
    """Read a line of the guest's, who may say anything, and whose clock is so far behind ours."""
    try:
        job, pid, since, code, packed = line.split(" ")
        command = base64.b64decode(packed, validate=True).decode("utf-8", "replace")
        return Job(job, int(pid), int(since) + behind_s, None if code == "-" else int(code), command)
    except (ValueError, binascii.Error):
        return None


def _within(out: Out, vm: str, verb: str, job: str) -> int:
    if _unknown(vm, job):  # asked before: afterwards its exit code may be any
        raise _no_job(vm, job)
    return execute(out, vm, _program(verb, job), about={"job": job})


def _unknown(vm: str, job: str) -> bool:
    _, said = _asked(vm, "list", "")
    return all(line.split(b" ")[0] != as_bytes(job) for line in said.splitlines())


def show_log(out: Out, vm: str, job: str, *, follow: bool) -> int:
    """Print a job's log; go on until its end if asked to."""
    return _within(out, vm, "follow" if follow else "logs", job)


@click.command("attach", cls=Leaf, epilog="Examples:\n  banger vm attach web job-7k2mq")
@click.argument("vm", metavar="NAME")
@click.argument("job", metavar="JOB")
@click.pass_obj
def attach(out: Out, vm: str, job: str) -> int:
    """Show a job's log and what comes, to its end; its exit code is banger's. Ctrl-C leaves it alone."""
    return _within(out, vm, "attach", job)


@click.command("wait", cls=Leaf, epilog="Examples:\n  banger vm wait web job-7k2mq && echo well")
@click.argument("vm", metavar="NAME")
@click.argument("job", metavar="JOB")
@click.pass_obj
def wait(out: Out, vm: str, job: str) -> int:
    """Wait for a job's end; its exit code is banger's, 124 if it took longer than its --timeout."""
    return _within(out, vm, "wait", job)


@click.command("kill-job", cls=Leaf, epilog="Examples:\n  banger vm kill-job web job-7k2mq --signal INT")
@click.argument("vm", metavar="NAME")
@click.argument("job", metavar="JOB")
@click.option(
    "-s", "--signal", "name", default="TERM", show_default=True,
    type=click.Choice(["TERM", "KILL", "INT", "HUP", "QUIT", "USR1", "USR2"], case_sensitive=False),
)  # fmt: skip
@click.pass_obj
def kill_job(out: Out, vm: str, job: str, name: str) -> None:
    """Send a signal to a job and all that it has started; nothing happens to one that has ended."""
    _asked(vm, "kill", job, name)
    out.show({"job": job, "signal": name}, [f"{job} got SIG{name}"])
