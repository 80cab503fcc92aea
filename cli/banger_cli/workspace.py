"""`banger vm workspace`: a repository of the host's in a VM, and its changes back."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from banger import layout
from banger.errors import AlreadyExists, BangerError, from_os_error
from banger_cli import wire
from banger_cli.bundle import _WithFile as WithFile
from banger_cli.commands import Branch, Leaf, key_option, op_line, stacked, wait_options
from banger_cli.follow import wait
from banger_cli.interrupt import Interruption
from banger_cli.output import Out

Json = dict[str, Any]

branch = Branch(
    "workspace",
    {"prepare": "workspace:prepare", "export": "workspace:export"},
    help="Bring a git repository into a VM, and what was changed there back as a patch.",
    epilog="""\
Examples:
  banger vm workspace prepare web ./repo     it is at /root/repo then, and commands start in it
  banger vm exec web -- make test
  banger vm workspace export web | git -C ./repo apply""",
)

wish_options = stacked(
    [
        click.option("--branch", metavar="B", help="Be on this branch in the guest."),
        click.option("--from", "source", metavar="REF", help="This commit, not the working tree."),
        click.option(
            "--include-untracked", "untracked", is_flag=True, help="New files too; no ignored ones."
        ),
    ]
)
"""What of a repository is brought."""


@click.command("prepare", cls=Leaf, epilog="""\
Examples:
  banger vm workspace prepare web .
  banger vm workspace prepare web ./repo --include-untracked
  banger vm workspace prepare web ./repo --branch try --from v1.2
  banger vm workspace prepare web . --dry-run     what would be brought

Next: banger vm exec web -- make test""")  # fmt: skip
@click.argument("vm", metavar="NAME")
@click.argument("repository", metavar="REPO")
@wish_options
@click.option("--dry-run", is_flag=True, help="List the files that would be brought, and bring none.")
@wait_options
@key_option
@click.pass_obj
def prepare(
    out: Out,
    /,
    vm: str,
    repository: str,
    dry_run: bool,
    waits: bool,
    on_interrupt: str | None,
    key: str | None,
    **wish: Any,
) -> None:
    """Bring a repository into a VM that runs, as its files are now.

    It takes the place of the one that was there, when it is whole; what was there before stays in
    /root/.banger/REPO/before until the next time. In a guest with git it is a checkout, without history.
    """
    listed = checked(repository, **wish)
    if dry_run:
        show_listing(out, listed)
        return
    asked = wire.call("workspace.prepare", vm=vm, repository=listed["repository"], key=key, **wish)
    if not waits:
        out.show(asked, [op_line(asked)])
        return
    result = wait(asked["op"], out, Interruption.of(out.screen, on_interrupt, asked))
    out.show({**asked, **result}, [f"{_counted(listed)} in {vm} in {layout.seconds(result['seconds'])}"])


def bring(out: Out, vm: str, listed: Json, **wish: Any) -> None:
    """Bring a repository that was looked at into a VM, and wait until it is there."""
    asked = wire.call("workspace.prepare", vm=vm, repository=listed["repository"], **wish)
    wait(asked["op"], out)
    out.note(f"{_counted(listed)} from {listed['repository']}")


def checked(repository: str, *, branch: str | None, source: str | None, untracked: bool) -> Json:
    """List what would be brought: {repository, files: [{name, bytes}], bytes, mise}.

    Raises InvalidRequest.
    """
    from banger.workspace import repository as repositories

    where = os.path.abspath(repository)  # noqa: PTH100  Path.resolve would follow links that the user named
    wish = repositories.Wish(repository=where, branch=branch, source=source, untracked=untracked)
    listed = repositories.listing(repositories.find(wish), wish)
    files = [{"name": repositories.shown(name), "bytes": size} for name, size in listed.files]
    return {"repository": where, "files": files, "bytes": listed.size_bytes, "mise": listed.mise}


def show_listing(out: Out, listed: Json) -> None:
    """Show what would be brought."""
    rows = [(layout.size(each["bytes"]), each["name"]) for each in listed["files"]]
    out.show(listed, [*layout.table(("SIZE", "FILE"), rows), "", f"{_counted(listed)} would be brought"])


def _counted(listed: Json) -> str:
    return f"{len(listed['files'])} files, {layout.size(listed['bytes'])}"


def moved(workspace: Json) -> bool:
    """Tell whether the host's repository is at something else than when it was brought; False if unknown."""
    from banger.workspace import repository as repositories

    wish = repositories.Wish(
        repository=workspace["repository"],
        branch=workspace.get("branch"),
        source=workspace.get("source"),
        untracked=workspace.get("untracked", False),
    )
    try:
        return bool(repositories.stamp(repositories.find(wish), wish) != workspace["stamp"])
    except BangerError:
        return False


def again(out: Out, vm: str, workspace: Json) -> None:
    """Bring a workspace's repository again, as it was asked for the first time."""
    given = {name: workspace.get(name) for name in ("repository", "branch", "source", "untracked")}
    out.note(f"banger: {workspace['repository']} has changed since it was brought; bringing it again")
    wait(wire.call("workspace.prepare", vm=vm, **given)["op"], out)


def refreshed(out: Out, vm: str, *, prepare: bool) -> None:
    """Before a command runs in a workspace: say when the repository has moved on, or bring it again."""
    workspace = wire.call("vm.show", vm=vm)["vm"]["workspace"]
    if workspace is None or not moved(workspace):
        return
    if prepare:
        again(out, vm, workspace)
        return
    out.note(
        f"banger: {workspace['repository']} has changed since it was brought;"
        f" --auto-prepare, or `banger vm workspace prepare {vm} {workspace['repository']}`, brings it again"
    )


@click.command("export", cls=WithFile, epilog="""\
Examples:
  banger vm workspace export web                         to standard output
  banger vm workspace export web -o web.patch && git apply web.patch
  banger vm workspace export web --base main             what it would be to main""")  # fmt: skip
@click.argument("vm", metavar="NAME")
@click.option("--base", metavar="REF", help="Against this commit of the host's, not what was prepared.")
@click.option("-o", "--output", metavar="FILE", help="Write to FILE; - is standard output.")
@click.option("--force", is_flag=True, help="Overwrite the file.")
@click.pass_obj
def export(out: Out, vm: str, base: str | None, output: str | None, force: bool) -> None:
    """Give what was changed in a VM's workspace as a patch that `git apply` takes.

    With new files, deletions, modes and binary files; ignored ones are not in it. The checkout in the
    guest, its index too, stays as it is.
    """
    found = _changes(vm, base)
    if output in (None, "-"):
        _to_stdout(out, found.patch)
    else:
        _write(Path(str(output)), found.patch, force=force)
    told = {"vm": vm, "files": list(found.files), "bytes": len(found.patch), "path": output}
    if out.as_json and output in (None, "-"):
        out.document({**told, "patch": found.patch.decode("utf-8", "backslashreplace")})
    elif out.as_json:
        out.document(told)
    else:
        out.note(f"{len(found.files)} files changed" + (f": {output}" if output not in (None, "-") else ""))


def _changes(vm: str, base: str | None) -> Any:
    import msgspec

    from banger.model import Workspace
    from banger.workspace import export as exports
    from banger.workspace.parcel import Base

    known = wire.call("workspace.show", vm=vm)
    return exports.changes(
        known["argv"],
        msgspec.convert(known["workspace"], type=Workspace),
        Base(directory=Path(known["base"])),
        against=base,
        limit_mib=known["limit_mib"],
    )


def _to_stdout(out: Out, patch: bytes) -> None:
    if not out.as_json:
        sys.stdout.flush()
        sys.stdout.buffer.write(patch)
        sys.stdout.buffer.flush()


def _write(path: Path, patch: bytes, *, force: bool) -> None:
    """Write a patch, whole or not at all. Raises AlreadyExists unless `force`."""
    try:
        if path.exists() and not force:
            raise AlreadyExists(f"{path} exists already.", hint="`--force` overwrites it.")
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_bytes(patch)
        part.replace(path)
    except OSError as error:
        raise from_os_error(error) from error


def story(workspace: Json | None) -> Iterator[tuple[str, Any]]:
    """Give the lines of `vm show` about a workspace."""
    if workspace is not None:
        kind = "a checkout" if workspace.get("git") else "plain files"
        yield "workspace", f"{workspace['path']} ({kind} of {workspace['repository']})"
