from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from banger.config import find_dirs
from banger.errors import all_codes
from banger_cli import app, page, place
from banger_cli.commands import Branch
from tests.cli.conftest import Banger
from tests.cli.fake_daemon import FakeDaemon

HEAVY = {"click", "json", "socket", "re", "msgspec", "typing", "pathlib", "struct"}


@pytest.mark.parametrize("set_", ["", "XDG_STATE_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME XDG_RUNTIME_DIR"])
@pytest.mark.parametrize("home", ["/home/a", "/home/a/", None])
def test_place_agrees_with_config(monkeypatch: pytest.MonkeyPatch, set_: str, home: str | None) -> None:
    """The fast path looks for the daemon exactly where banger.config puts it."""
    for name in ("XDG_STATE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in set_.split():
        monkeypatch.setenv(name, f"/tmp/{name}")
    if home is None:
        monkeypatch.delenv("HOME")
    else:
        monkeypatch.setenv("HOME", home)
    assert (Path(place.socket()), Path(place.state())) == (find_dirs().socket, find_dirs().state)


@pytest.mark.parametrize("words", [["ps"], ["vm", "list", "-a"], ["--help"], ["--version"]])
def test_fast_imports_nothing_heavy(daemon: FakeDaemon, words: list[str]) -> None:
    """The commands typed most import none of the modules that make a start slow."""
    daemon.answers["vm.table"] = b"NAME\n"
    # -S: what the environment's own site hooks import is not ours.
    script = (
        "import sys; sys.path[:0] = sys.argv.pop(1).split(':'); from banger_cli import main; main.main();"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    paths = ":".join(str(Path(__file__).parents[2] / part) for part in (".", "cli"))
    ran = subprocess.run(
        [sys.executable, "-S", "-c", script, paths, *words], capture_output=True, text=True, check=True
    )
    assert ran.stderr == "[]\n"
    assert ran.stdout


@pytest.mark.parametrize(("words", "everything"), [("ps", False), ("vm ps", False), ("vm list -a", True)])
def test_table_comes_from_the_daemon(
    banger: Banger, daemon: FakeDaemon, words: str, everything: bool
) -> None:
    """Every spelling of the list prints the daemon's table, control characters made harmless."""
    daemon.answers["vm.table"] = b"NAME\nw\x1b[2Jeb\n"
    ran = banger(*words.split())
    assert (ran.returncode, ran.stdout) == (0, "NAME\nw\\x1b[2Jeb\n")
    assert daemon.calls == [("vm.table", {"all": everything})]


def test_table_error_is_told_in_full(banger: Banger, daemon: FakeDaemon) -> None:
    """An error in place of the table is a sentence, a hint and the error's exit code."""
    daemon.answers["vm.table"] = b'{"error": {"code": "busy", "message": "Not now.", "hint": "Later."}}\n'
    ran = banger("ps")
    assert (ran.returncode, ran.stdout, ran.stderr) == (4, "", "banger: Not now.\n  hint: Later.\n")


def test_help_names_every_command() -> None:
    """A command that is not on the top page cannot be found, so each is there."""
    ctx = app.root.make_context("banger", [])
    for name in app.root.list_commands(ctx):
        command = app.root.get_command(ctx, name)
        assert name in page.TOP
        if isinstance(command, Branch):
            assert all(leaf in page.TOP for leaf in command.list_commands(ctx))


def test_every_command_has_help_and_json() -> None:
    """Every command loads, says what it is for, and takes --json."""
    ctx = app.root.make_context("banger", [])
    branches = [app.root, *(app.root.get_command(ctx, name) for name in app.root.list_commands(ctx))]
    leaves = [each for each in branches if not isinstance(each, Branch)]
    for branch in branches:
        if isinstance(branch, Branch):
            leaves += [branch.get_command(ctx, name) for name in branch.list_commands(ctx)]
    for leaf in leaves:
        assert leaf is not None
        assert leaf.help
        assert any("--json" in param.opts for param in leaf.params), leaf.name


def test_exit_codes_are_documented() -> None:
    """Every exit code that an error can give is on the exit-codes page."""
    documented = set(re.findall(r"^  (\d+) ", page.EXIT_CODES, re.MULTILINE))
    assert {str(cls.exit_code) for cls in all_codes().values()} <= documented


def test_topics(banger: Banger) -> None:
    """`banger help exit-codes` prints the page."""
    assert banger("help", "exit-codes").stdout == page.EXIT_CODES
    assert banger("--help").stdout == banger("help", "top").stdout == page.TOP
