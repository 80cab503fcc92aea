"""`banger vm exec`, `ssh` and `logs`: being inside a guest, and listening at its door."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import click

from banger_cli import session, wire, workspace
from banger_cli.commands import Leaf, WithWords
from banger_cli.output import Out

Json = dict[str, Any]
_LONG = 64 << 10


@click.command("exec", cls=WithWords, epilog="""\
Examples:
  banger vm exec web -- make -j2 test
  banger vm exec web -- sh -c 'echo "$HOME"'  quoting is yours, word by word
  banger vm exec web -- htop                  a terminal if you are on one; -T: none
  banger vm exec -e CI=1 -w /srv -u www-data web -- ./check
  banger vm exec --timeout 90s web -- make test
  banger vm exec -d web -- ./serve            goes on without you: `banger vm jobs web`
  tar c . | banger vm exec web -- tar x       standard input goes too if it is no terminal""")  # fmt: skip
@click.argument("vm", metavar="NAME")
@click.argument("stray", nargs=-1, metavar="")
@click.option("-e", "--env", "environ", metavar="K=V", multiple=True, help="Set a variable; repeatable.")
@click.option("-w", "--workdir", "directory", metavar="DIR", help="Start in this directory of the guest.")
@click.option("-u", "--user", metavar="USER", help="Be this user of the guest, not root.")
@click.option("-d", "--detach", is_flag=True, help="Start it as a job, print the job's name, come back.")
@click.option(
    "--timeout", metavar="TIME", help="End it, and all it started, after 90, 90s, 15m, 2h; exit 124."
)
@click.option(
    "-t/-T", "--tty/--no-tty", "tty", default=None, help="A terminal or none; else: if you have one."
)
@click.option(
    "-i", "--interactive", is_flag=True, help="With -T: pass standard input on if it is a terminal."
)
@click.option("--auto-prepare", is_flag=True, help="Bring the workspace again first, if it has changed here.")
@click.pass_obj
def exec_(
    out: Out,
    /,
    vm: str,
    stray: tuple[str, ...],
    auto_prepare: bool,
    tty: bool | None,
    interactive: bool,
    detach: bool,
    environ: tuple[str, ...],
    timeout: str | None,
    words: tuple[str, ...],
    **start: str | None,
) -> int:
    """Run a command in a VM, its words exactly as typed.

    Its exit code is banger's; 128+n when it dies of signal n. Ctrl-C and SIGTERM go to the
    command and what it has started; the third one leaves it alone and comes back.
    """
    if stray or not words:
        meant = shlex.join(stray) or "ls -l"
        raise click.UsageError(f"The command goes after --, as in `banger vm exec {vm} -- {meant}`.", _here())
    given: Json = {**start, "environ": _pairs(environ), "timeout_s": _seconds(timeout)}
    if detach and (tty or interactive):
        raise click.UsageError("A job has no terminal: -d does not go with -t or -i.", _here())
    if tty and not session.stdin_is_terminal():
        raise click.UsageError("-t needs a terminal on standard input.", _here())
    carried(words, given["environ"] or ())
    if not (start["directory"] or start["user"]):
        workspace.refreshed(out, vm, prepare=auto_prepare)
    if detach:
        from banger_cli import jobs

        return jobs.begin(out, vm, words, given)
    if tty is None:
        tty = not out.as_json and session.stdin_is_terminal() and sys.stdout.isatty()
    return execute(out, vm, words, tty=tty, interactive=interactive, start=given)


def _pairs(environ: tuple[str, ...]) -> list[list[str]] | None:
    for pair in environ:
        if "=" not in pair:
            raise click.UsageError(f"-e {pair} has no value; it is -e NAME=VALUE.", _here())
    return [pair.split("=", 1) for pair in environ] or None


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", text)
    if found is None or not float(found[1]):
        raise click.UsageError(f"{text!r} is no time: it is 90, 90s, 15m or 2h.", _here())
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def carried(words: Sequence[str], environ: Sequence[Any] = ()) -> Json:
    """Give the words as the protocol carries them: in base64 where one is no UTF-8 or they are long."""
    from banger.guest.words import Command, as_bytes, check

    check(Command(words=tuple(words), environ=tuple(environ)))
    if sum(map(len, words)) < _LONG and all(word.isprintable() for word in words):
        return {"argv": list(words)}
    return {"raw": [base64.b64encode(as_bytes(word)).decode() for word in words]}


def execute(
    out: Out,
    vm: str,
    words: Sequence[str],
    *,
    tty: bool = False,
    interactive: bool = False,
    about: Json | None = None,
    start: Json | None = None,
) -> int:
    """Run words in a VM with our own standard streams; give the exit code.

    For programs (JSON mode) the output is caught and printed as one document, beside `about`. `start`
    has where and how it starts, as the protocol names it.
    """
    rows, cols = session.window()
    terminal = {"term": os.environ.get("TERM", "xterm"), "rows": rows, "cols": cols} if tty else {}
    asked = carried(words, (start or {}).get("environ") or ())
    with wire.connect() as daemon:
        daemon.request("vm.exec", vm=vm, tty=tty, **asked, **terminal, **(start or {}))
        if out.as_json:
            return _caught(out, daemon, about or {})
        stdin = 0 if tty or interactive or _stdin_is_given() else None
        with session.raw_terminal(0) if tty else contextlib.nullcontext():
            streams = {"stdout": session.write_to(1), "stderr": session.write_to(2)}
            return session.Session(daemon, stdin=stdin, **streams).run()


def _stdin_is_given() -> bool:
    return sys.stdin is not None and not session.stdin_is_terminal()


def _caught(out: Out, daemon: wire.Connection, about: Json) -> int:
    stdout, stderr = bytearray(), bytearray()
    stdin = 0 if _stdin_is_given() else None
    code = session.Session(daemon, stdin=stdin, stdout=stdout.extend, stderr=stderr.extend).run()
    said = {"stdout": stdout.decode("utf-8", "replace"), "stderr": stderr.decode("utf-8", "replace")}
    out.document({**about, "exit": code, **said})
    return code


@click.command("ssh", cls=WithWords, epilog="""\
Examples:
  banger vm ssh web
  banger vm ssh web -- tail -f /var/log/syslog
  banger vm ssh web --json        the ssh command line, for other programs""")  # fmt: skip
@click.argument("vm", metavar="NAME")
@click.pass_obj
def ssh(out: Out, vm: str, words: tuple[str, ...]) -> int:
    """Open a shell in a VM, or run a command, with the ssh program."""
    argv = wire.call("vm.ssh", vm=vm)["argv"]
    if out.as_json:
        out.document({"argv": argv})
        return 0
    code = enter(argv, words)
    if not words:
        remind(out, vm)
    return code


def enter(argv: list[str], words: Sequence[str] = ()) -> int:
    """Run the ssh program on this terminal, and give its exit code."""
    from banger.proc import attach

    if not words:
        return attach(argv)
    program, *options = argv
    terminal = ["-t"] if session.stdin_is_terminal() and sys.stdout.isatty() else []
    # ssh joins its words and the guest's shell splits them again: so they are quoted here. And ssh
    # gives 255 for any death by signal: the shell, which must not end with the command, gives 128+n.
    return attach([program, *terminal, *options, "--", f"{shlex.join(words)}; exit $?"])


def remind(out: Out, vm: str) -> None:
    """Say that a VM still runs, and how to end that."""
    out.note(f"{vm} still runs: `banger vm ssh {vm}` goes back, `banger vm delete {vm}` ends it.")


@click.command("logs", cls=Leaf, epilog="""\
Examples:
  banger vm logs web --tail 50
  banger vm logs -f web""")  # fmt: skip
@click.argument("vm", metavar="NAME")
@click.option("-f", "--follow", is_flag=True, help="Go on as more comes, until the VM stops.")
@click.option("--tail", type=click.IntRange(0), help="The last lines only.")
@click.option("--job", metavar="JOB", help="What a job of `vm exec -d` said instead, all that is kept.")
@click.pass_obj
def logs(out: Out, vm: str, follow: bool, tail: int | None, job: str | None) -> int:
    """Show what a VM's console said, as it is."""
    if job is not None:
        from banger_cli import jobs

        if tail is not None:
            raise click.UsageError("--tail is for the console: `... --job JOB | tail`.", _here())
        return jobs.show_log(out, vm, job, follow=follow)
    with wire.connect() as daemon:
        for line in daemon.stream("vm.logs", vm=vm, tail=tail, follow=follow):
            if "chunk" not in line:
                continue
            if out.as_json:
                out.document(line)
            else:
                sys.stdout.write(line["chunk"])
                sys.stdout.flush()
    return 0


def _here() -> click.Context:
    return click.get_current_context()
