"""`banger ssh-config`: let `ssh NAME.vm`, scp and editors reach VMs, and take that back."""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from banger.config import Dirs, find_dirs
from banger.errors import InvalidRequest, WrongState
from banger_cli.commands import Branch, Leaf
from banger_cli.output import Out

MADE = "# ~/.ssh/config was made for this\n"
MADE_BOTH = "# ~/.ssh and ~/.ssh/config were made for this\n"
# A name is one word in quotes: one that could end them is not ours.
_HOSTS = """*.vm "!*'*\""""

branch = Branch(
    "ssh-config",
    {"install": "ssh_config:install", "uninstall": "ssh_config:uninstall", "show": "ssh_config:show"},
    help="Let `ssh NAME.vm`, scp and editors reach VMs.",
    epilog="""\
Examples:
  banger ssh-config install           one line at the top of ~/.ssh/config
  ssh web.vm
  scp -O notes.txt web.vm:            -O: guests have no SFTP server
  ssh -N -L 8080:127.0.0.1:80 web.vm
  banger ssh-config uninstall         ~/.ssh/config is what it was""",
)


@click.command("install", cls=Leaf, epilog="Examples:\n  banger ssh-config install")
@click.pass_obj
def install(out: Out) -> None:
    """Put one Include line at the top of ~/.ssh/config; the rest of it stays, byte for byte."""
    dirs = find_dirs()
    ours, theirs = _ours(dirs), _theirs()
    before, made = _read(theirs), _made(ours)
    if before is None:
        made = MADE if theirs.parent.is_dir() else MADE_BOTH
        theirs.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = _text(dirs)
    dirs.make()
    _write(ours, (made + text).encode(), 0o600)
    if not (before or b"").startswith(_line(ours)):
        _write(theirs, _line(ours) + (before or b""), _mode(theirs))
    out.show(_facts(ours, theirs), [f"{theirs} includes {ours}", "Now `ssh NAME.vm` reaches a VM."])


@click.command("uninstall", cls=Leaf, epilog="Examples:\n  banger ssh-config uninstall")
@click.pass_obj
def uninstall(out: Out) -> None:
    """Take the Include line out of ~/.ssh/config again, which then is what it was."""
    ours, theirs = _ours(find_dirs()), _theirs()
    content, line, made = _read(theirs), _line(ours), _made(ours)
    if content is not None and line in content.splitlines(keepends=True):
        rest = b"".join(_without(content.splitlines(keepends=True), line))
        if rest or not made:
            _write(theirs, rest, _mode(theirs))
        else:
            theirs.unlink()
            if made == MADE_BOTH:
                with contextlib.suppress(OSError):  # something else is there by now
                    theirs.parent.rmdir()
    ours.unlink(missing_ok=True)
    out.show(_facts(ours, theirs), [f"{theirs} no longer includes {ours}"])


@click.command("show", cls=Leaf, epilog="Examples:\n  banger ssh-config show")
@click.pass_obj
def show(out: Out) -> None:
    """Show what ssh is told, and whether ~/.ssh/config includes it."""
    dirs = find_dirs()
    ours, theirs = _ours(dirs), _theirs()
    facts = _facts(ours, theirs)
    state = f"{theirs} includes it" if facts["installed"] else "not installed: `banger ssh-config install`"
    out.show(facts | {"text": _text(dirs)}, [f"# {ours}: {state}", *_text(dirs).splitlines()])


def _facts(ours: Path, theirs: Path) -> dict[str, Any]:
    try:
        content = theirs.read_bytes()
    except OSError:
        content = b""
    return {
        "installed": _line(ours) in content.splitlines(keepends=True),
        "config": str(theirs),
        "included": str(ours),
    }


# -- what ssh is told ----------------------------------------------------------------------------


def _text(dirs: Dirs) -> str:
    """Write the settings for `*.vm`: ssh_config(5)."""
    words = [sys.executable, "-P", "-m", "banger_cli.proxy", str(dirs.socket)]
    ask = " ".join(shlex.quote(_plain(word)) for word in words)
    return f"""\
# Made by `banger ssh-config install`; `banger ssh-config uninstall` takes it away.
Host {_HOSTS}
    User root
    ProxyCommand {ask} connect '%h'
    ProxyUseFdpass yes
    KnownHostsCommand {ask} host-key %H
    UserKnownHostsFile /dev/null
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    UpdateHostKeys no
    IdentityFile "{_plain(str(dirs.user_key))}"
    IdentitiesOnly yes
    ForwardAgent no
    ForwardX11 no
"""


def _plain(word: str) -> str:
    """Give a path that means itself to ssh and to a shell, in quotes. Raises InvalidRequest for others."""
    if not word.isprintable() or not set("\"'\\$%").isdisjoint(word):
        raise InvalidRequest(
            f"{word!a} cannot be told to ssh.",
            hint="Set XDG_STATE_HOME or XDG_RUNTIME_DIR to plainer directories.",
        )
    return word


# -- the user's own file -------------------------------------------------------------------------


def _ours(dirs: Dirs) -> Path:
    return dirs.state / "ssh_config"


def _theirs() -> Path:
    return Path.home() / ".ssh" / "config"


def _line(ours: Path) -> bytes:
    return f'Include "{_plain(str(ours))}"\n'.encode()


def _made(ours: Path) -> str:
    """Tell whether the user's file was made by us: the first line of ours remembers."""
    try:
        first = ours.read_text("utf-8").splitlines(keepends=True)[:1]
    except FileNotFoundError:
        return ""
    return first[0] if first and first[0] in (MADE, MADE_BOTH) else ""


def _without(lines: list[bytes], line: bytes) -> list[bytes]:
    at = lines.index(line)
    return lines[:at] + lines[at + 1 :]


def _read(path: Path) -> bytes | None:
    """Read the user's file, if it is one that we may replace. Raises WrongState when it is not."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    why = _refused(found)
    if why is not None:
        raise WrongState(
            f"{path} is {why}: it was left alone.",
            hint=f"Put this at its top yourself: {_line(_ours(find_dirs())).decode().strip()}",
        )
    return path.read_bytes()


def _refused(found: os.stat_result) -> str | None:
    if stat.S_ISLNK(found.st_mode):
        return "a symbolic link"
    if not stat.S_ISREG(found.st_mode):
        return "not a file"
    if found.st_nlink > 1:
        return "a file with several names"
    if found.st_uid != os.getuid():
        return "another user's"
    return None if found.st_mode & stat.S_IWUSR else "read-only"


def _mode(path: Path) -> int:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return 0o600


def _write(path: Path, content: bytes, mode: int) -> None:
    """Have a file of this content take the place of what is there, whole."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
