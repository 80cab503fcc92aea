"""`banger vm exec`, `ssh` and `logs`: being inside a guest, and listening at its door."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import click

from banger_cli import session, wire
from banger_cli.commands import Leaf, WithWords
from banger_cli.output import Out

Json = dict[str, Any]


@click.command("exec", cls=WithWords, epilog="""\
Examples:
  banger vm exec web -- make -j2 test
  banger vm exec web -- sh -c 'echo "$HOME"'  quoting is yours, word by word
  banger vm exec -t web -- htop               with a terminal
  tar c . | banger vm exec web -- tar x       standard input goes too if it is no terminal""")  # fmt: skip
@click.argument("vm", metavar="NAME")
@click.argument("stray", nargs=-1, metavar="")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal, and your keys.")
@click.option("-i", "--interactive", is_flag=True, help="Pass standard input on even if it is a terminal.")
@click.pass_obj
def exec_(
    out: Out, vm: str, stray: tuple[str, ...], tty: bool, interactive: bool, words: tuple[str, ...]
) -> int:
    """Run a command in a VM, its words exactly as typed.

    Its exit code is banger's; 128+n when it dies of signal n. Ctrl-C and SIGTERM go to the
    command; the third one leaves it alone and comes back.
    """
    if stray or not words:
        meant = shlex.join(stray) or "ls -l"
        raise click.UsageError(f"The command goes after --, as in `banger vm exec {vm} -- {meant}`.", _here())
    if tty and not session.stdin_is_terminal():
        raise click.UsageError("-t needs a terminal on standard input.", _here())
    return execute(out, vm, words, tty=tty, interactive=interactive)


def execute(
    out: Out,
    vm: str,
    words: Sequence[str],
    *,
    tty: bool = False,
    interactive: bool = False,
    about: Json | None = None,
) -> int:
    """Run words in a VM with our own standard streams; give the exit code.

    For programs (JSON mode) the output is caught and printed as one document, beside `about`.
    """
    rows, cols = session.window()
    terminal = {"term": os.environ.get("TERM", "xterm"), "rows": rows, "cols": cols} if tty else {}
    with wire.connect() as daemon:
        daemon.request("vm.exec", vm=vm, argv=list(words), tty=tty, **terminal)
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
@click.pass_obj
def logs(out: Out, vm: str, follow: bool, tail: int | None) -> None:
    """Show what a VM's console said, as it is."""
    with wire.connect() as daemon:
        for line in daemon.stream("vm.logs", vm=vm, tail=tail, follow=follow):
            if "chunk" not in line:
                continue
            if out.as_json:
                out.document(line)
            else:
                sys.stdout.write(line["chunk"])
                sys.stdout.flush()


def _here() -> click.Context:
    return click.get_current_context()
