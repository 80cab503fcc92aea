"""`banger vm run`: a machine, a command in it, and with --rm nothing left of either."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import click

from banger import layout
from banger.errors import BangerError, NotFound
from banger_cli import session, wire
from banger_cli.commands import interrupt_option
from banger_cli.follow import follow, settle, wait
from banger_cli.inside import enter, execute, remind
from banger_cli.interrupt import DETACH, Detached, Interruption
from banger_cli.output import Out
from banger_cli.spec import CreatesWithWords, spec_line, spec_options
from banger_cli.tools import bootstrap
from banger_cli.workspace import bring, checked, show_listing, wish_options

Json = dict[str, Any]
LOOK_S = 1.0


@click.command("run", cls=CreatesWithWords, epilog="""\
Examples:
  banger vm run --rm -- uname -a           one command; nothing is left, whatever happens
  banger vm run --rm ./repo -- make test   the same in a checkout of a repository
  banger vm run                            a shell in a new machine, which then stays
  banger vm run --rm --memory 4G --nat     a shell in one that goes with it
  banger vm run -d --name db               a machine in the background
  banger vm run . --include-untracked      a shell where your working tree is

Next: banger vm list, banger vm delete NAME""")  # fmt: skip
@click.argument("repository", metavar="[REPO]", required=False)
@click.option("--rm", is_flag=True, help="Delete the VM at the end, whatever happens.")
@click.option("-d", "--detach", is_flag=True, help="Leave it running and come back; prints its name.")
@wish_options
@click.option("--dry-run", is_flag=True, help="List the repository's files that would be brought; no VM.")
@click.option("--no-bootstrap", is_flag=True, help="Do not install the tools that a mise file names.")
@spec_options
@interrupt_option
@click.pass_obj
def run(
    out: Out,
    /,
    repository: str | None,
    rm: bool,
    detach: bool,
    dry_run: bool,
    no_bootstrap: bool,
    branch: str | None,
    source: str | None,
    untracked: bool,
    on_interrupt: str | None,
    words: tuple[str, ...],
    **spec: Any,
) -> int:
    """Create a VM and go inside, or run one command in it; with a repository, in a checkout of it.

    The command's exit code is banger's. Only its output is on standard output; the stages are
    on standard error.
    """
    interactive = not (detach or words or out.as_json) and session.stdin_is_terminal() and sys.stdout.isatty()
    _refuse_nonsense(
        rm=rm, on_interrupt=on_interrupt, detach=detach, command=bool(words), interactive=interactive
    )
    wish = {"branch": branch, "source": source, "untracked": untracked}
    listed = _listed(repository, dry_run=dry_run, **wish)
    if dry_run:
        show_listing(out, listed or {})
        return 0
    with wire.connect() as daemon:
        made = daemon.request("vm.create", start=True, ephemeral=rm, join=False, **spec)
        with _gone_at_end(out, daemon, made) if rm else contextlib.nullcontext():
            interruption = Interruption(out.screen, DETACH if rm else on_interrupt, made["op"])
            ready = _boot(out, made, interruption)
            if interruption.cancelled and (words or interactive):
                raise _too_late(made)
            if listed is not None:
                bring(out, made["vm"], listed, **wish)
                if listed["mise"] and not no_bootstrap:
                    bootstrap(out, made["vm"], nat=made["spec"]["nat"])
            if words:
                code = execute(out, made["vm"], words, about=ready)
            elif interactive:
                code = enter(wire.call("vm.ssh", vm=made["vm"])["argv"], _shell_in(made, listed))
            else:
                code = 0
                out.show(ready, [made["name"] if detach else f"banger vm ssh {made['name']}"])
        if not rm and (words or interactive):
            remind(out, made["name"])
    return code


def _listed(repository: str | None, *, dry_run: bool, **wish: Any) -> Json | None:
    """Look at the repository before there is a VM. Raises InvalidRequest."""
    if repository is not None:
        return checked(repository, **wish)
    given = [name for name, value in (("--dry-run", dry_run), *wish.items()) if value]
    if given:
        named = {"branch": "--branch", "source": "--from", "untracked": "--include-untracked"}
        raise click.UsageError(
            f"{named.get(given[0], given[0])} belongs to a repository, and none is named.",
            click.get_current_context(),
        )
    return None


def _shell_in(made: Json, listed: Json | None) -> tuple[str, ...]:
    """Give the words of a shell in the workspace; none for the shell that ssh gives by itself."""
    if listed is None:
        return ()
    path = wire.call("workspace.show", vm=made["vm"])["workspace"]["path"]
    return ("sh", "-c", 'cd "$0"; exec "${SHELL:-sh}" -l', path)


def _refuse_nonsense(
    *, rm: bool, on_interrupt: str | None, detach: bool, command: bool, interactive: bool
) -> None:
    here = click.get_current_context()
    if detach and (rm or command):
        raise click.UsageError(f"-d does not go with {'--rm' if rm else 'a command'}.", here)
    if rm and on_interrupt:
        raise click.UsageError(
            "--rm deletes the VM whatever happens; --on-interrupt does not go with it.", here
        )
    if rm and not (command or interactive):
        raise click.UsageError("--rm needs a command after --, or a terminal for a shell.", here)


def _boot(out: Out, made: Json, interruption: Interruption) -> Json:
    out.note(spec_line(made["spec"]))
    out.note(f"op: {made['op']}")
    result = wait(made["op"], out, interruption)
    out.note(f"ready in {layout.seconds(result['seconds'])}")
    return {**made, "fate": result["fate"], "seconds": result["seconds"]}


def _too_late(made: Json) -> Detached:
    """Whoever cancelled does not want to go inside, also when the VM could no longer be undone."""
    left = Detached(made["op"])
    left.message = f"Interrupted; {made['name']} is ready, and nothing was run in it."
    left.hint = f"`banger vm ssh {made['name']}` goes inside, `banger vm delete {made['name']}` ends it."
    return left


@contextlib.contextmanager
def _gone_at_end(out: Out, daemon: wire.Connection, made: Json) -> Iterator[None]:
    """Delete an ephemeral VM at the end; if we die first, in any way, the daemon does.

    Its sign is the end of the connection on which the VM was asked for, so Ctrl-C while it boots
    just leaves. A deletion that fails is an error of its own: something is left.
    """
    daemon.request("vm.tether", vm=made["vm"])
    try:
        with _tied(daemon, made["vm"]):
            yield
    except Detached as left:
        left.message = f"Interrupted; {made['name']} is being deleted."
        left.hint = "`banger ops list` shows it."
        raise
    except BaseException:
        try:
            _delete(out, made)
        except BangerError as error:
            out.warn(error)
        raise
    _delete(out, made)


@contextlib.contextmanager
def _tied(daemon: wire.Connection, vm: str) -> Iterator[None]:
    """Tie the VM to the next daemon when this one dies: it gives us a while before it deletes.

    An end of the daemon is no reason to start another: the user may have stopped it.
    """
    over = threading.Event()
    watch = threading.Thread(target=_tie_again, args=(daemon, vm, over), daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()


def _tie_again(daemon: wire.Connection, vm: str, over: threading.Event) -> None:
    while not over.is_set():
        if not daemon.wait_closed(LOOK_S):
            continue
        while not over.wait(LOOK_S):
            with contextlib.suppress(BangerError):
                daemon = wire.connect(start=False)
                daemon.request("vm.tether", vm=vm)
                break


def _delete(out: Out, made: Json) -> None:
    with contextlib.suppress(NotFound):  # a create that failed was undone: it is gone already
        op = wire.call("vm.delete", vm=made["vm"])["op"]
        result = settle(follow(op))
        out.note(f"{made['name']} is gone in {layout.seconds(result['seconds'])}")
