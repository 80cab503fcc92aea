"""`banger ops bundle` and `ops show --bundle`: one operation in a file, and back. Needs no daemon."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import click

from banger.errors import AlreadyExists, BangerError, from_os_error
from banger_cli.commands import Leaf
from banger_cli.output import Out

Json = dict[str, Any]


class _WithFile(Leaf):
    """A command whose --output is a file: JSON is asked for with --json alone."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.params = [each for each in self.params if not getattr(each, "hidden", False)]


@click.command("bundle", cls=_WithFile, epilog="""\
Examples:
  banger ops bundle op-k3f9a2                  writes op-….bundle.json here
  banger ops bundle op-k3f9a2 --output - | less
  banger ops show --bundle op-….bundle.json    what a maintainer sees""")  # fmt: skip
@click.argument("op", metavar="OP")
@click.option("--output", metavar="FILE", help="Write to FILE instead; - is standard output.")
@click.option("--force", is_flag=True, help="Overwrite the file.")
@click.pass_obj
def bundle(out: Out, op: str, output: str | None, force: bool) -> None:
    """Write all about an operation to one file, for a bug report.

    Its events, those of its VM and of operations it waited for, and its log lines. The names of
    user and host, their directories, passwords, tokens and keys are replaced. Needs no daemon.
    """
    document = _make(op)
    text = json.dumps(document, indent=1) + "\n"
    path = Path(output or f"{document['op']}.bundle.json")
    if output == "-":
        click.echo(text, nl=False)
        out.note(_summary("standard output", document))
        return
    _write(path, text, force=force)
    counts = {name: len(document[name]) for name in ("events", "logs")}
    reply = {"op": document["op"], "path": str(path), **counts, "redacted": document["redacted"]}
    out.show(reply, [_summary(str(path), document)])


def _make(op: str) -> Json:
    from banger import config
    from banger.events import bundle as bundles
    from banger.events.redact import Redactor, private_here

    dirs = config.find_dirs()
    try:
        return bundles.make(dirs, op, _host(), Redactor(private_here(dirs)), _by_root)
    except OSError as error:
        raise from_os_error(error) from error


def _by_root(op: str) -> list[Json]:
    """Ask root for its own account; where it does not answer, the bundle has none."""
    from banger import config
    from banger.tasks.root import Pool, audit_of

    try:
        return audit_of(Pool(Path(config.load(config.find_dirs()).root_socket)), op)
    except BangerError:
        return []


def _host() -> Json:
    """Tell what the operation ran on, as far as that is still true."""
    import platform

    from banger import __version__

    return {
        "banger": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "qemu": _qemu(),
    }


def _qemu() -> str | None:
    from banger import proc
    from banger.vmm import qemu

    try:
        return proc.run([qemu.PROGRAM, "--version"], timeout_s=10).partition("\n")[0]
    except BangerError:
        return None


def _summary(where: str, document: Json) -> str:
    """Say in one line what was written and what was replaced in it."""
    taken = ", ".join(f"{count} × {stand}" for stand, count in document["redacted"].items())
    cut = f" ({document['logs_left_out']} older ones left out)" if document["logs_left_out"] else ""
    damage = " The log is damaged: what could be read is in it." if document["about"]["damage"] else ""
    return (
        f"{where}: {len(document['events'])} events, {len(document['logs'])} log lines{cut};"
        f" redacted: {taken or 'nothing'}.{damage}"
    )


def _write(path: Path, text: str, *, force: bool) -> None:
    """Write a file of the owner's only. Raises AlreadyExists unless `force`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if force else os.O_EXCL)
    try:
        file = open(os.open(path, flags, 0o600), "w", encoding="utf-8")  # noqa: PTH123, SIM115  a descriptor
    except FileExistsError:
        raise AlreadyExists(
            f"{path} exists already.", hint="`--force` overwrites it, `--output` chooses another name."
        ) from None
    except OSError as error:
        raise from_os_error(error) from error
    try:
        with file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                os.fchmod(file.fileno(), 0o600)  # one that is overwritten has a mode already
            file.write(text)
    except OSError as error:
        if not force:
            path.unlink(missing_ok=True)
        raise from_os_error(error) from error


def replayed(path: Path, op: str | None) -> Json:
    """Show an operation as a bundle tells it, in the form of the daemon's answer; by default its own.

    Raises NotFound, InvalidRequest when the file is no bundle.
    """
    from banger.events import bundle as bundles
    from banger.rpc import views

    document = bundles.read(path)
    replay = bundles.replay(document)
    found = replay.op if op is None else replay.find(op)
    by_root = document.get("root", []) if found == replay.op else []
    return views.op(replay.summary(found), replay.ops[found]) | {"root": by_root}
