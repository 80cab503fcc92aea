"""What the repository says of itself is true."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import click
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from banger_cli.app import root as command_line

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]
PAGES = sorted((ROOT / "docs/decisions").glob("*.md"))

# The brackets keep these lines from finding themselves.
REGISTRIES = r"[p]ypi\.org|[p]ythonhosted\.org|[n]pmjs\.(org|com)|[c]rates\.io|[p]roxy\.golang\.org"
PLACES = r"/[w]ork/(main|shared|\.)|/tmp/[l]ab|\.[l]ibrary|/opt/[p]ypi|/opt/[w]heels|/root/\.[p]yenv"


def grep(pattern: str) -> list[str]:
    """List the lines that match an extended regular expression, in all files but the ignored ones."""
    found = subprocess.run(
        ["git", "grep", "--untracked", "-nIE", pattern], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode <= 1, found.stderr
    return found.stdout.splitlines()


def declared(group: str) -> dict[str, Requirement]:
    """Give the requirements of a dependency group, the run-time ones with them, by normalised name."""
    texts = list(PROJECT["project"]["dependencies"])
    for entry in PROJECT["dependency-groups"][group]:
        if isinstance(entry, str):
            texts.append(entry)
        else:
            texts += PROJECT["dependency-groups"][entry["include-group"]]
    return {canonicalize_name(Requirement(text).name): Requirement(text) for text in texts}


def pins(lock: str) -> dict[str, str]:
    """Give the version of each package in a lock file; each must have a hash."""
    text = (ROOT / "requirements" / lock).read_text("utf-8")
    found = re.findall(r"^(\S+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)
    assert len(found) == len(re.findall(r"^[a-z]", text, re.MULTILINE))
    return dict(found)


def imported(folder: str) -> Iterator[tuple[str, str]]:
    """Give each import in a folder of something that is neither Python's nor ours: file and package."""
    ours = {"banger", "banger_cli", "bench", "smoke", "tests"}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            for module in modules:
                top = module.partition(".")[0]
                if top not in sys.stdlib_module_names and top not in ours:
                    yield path.relative_to(ROOT).as_posix(), top


def code_in(document: str) -> Iterator[str]:
    """Give the lines of a document's code blocks, and its inline code."""
    text = (ROOT / document).read_text("utf-8")
    for block in re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from block.splitlines()
    yield from re.findall(r"^ {4}(\S.*)", text, re.MULTILINE)
    yield from re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def typed(document: str, program: str) -> Iterator[list[str]]:
    """Give the words after `program` of each line of code that calls it."""
    for line in code_in(document):
        if match := re.match(rf"(?:\$ )?{program} ([^#|>…]*)", line):
            yield match[1].split()


def wrong_with(words: list[str]) -> str | None:
    """Tell which of a command line's words banger does not know."""
    command: click.Command = command_line
    for word in words:
        context = click.Context(command)
        if word == "--":
            break
        if word.startswith("--"):
            if not any(
                word in (*option.opts, *option.secondary_opts) for option in command.get_params(context)
            ):
                return word
        elif isinstance(command, click.Group):
            found = command.get_command(context, word)
            if found is None:
                return word
            command = found
    return None


def test_no_registry_and_no_place_is_named() -> None:
    """No file names a package registry's host or a path of the machine it was written on."""
    assert grep(f"{REGISTRIES}|{PLACES}") == []
    assert grep(r"^# 1\. Record decisions$") != [], "the search finds nothing at all"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_decision_has_its_sections(page: Path) -> None:
    """Every decision tells its context, what was decided and what follows."""
    text = page.read_text("utf-8")
    assert re.match(rf"# {int(page.name[:4])}\. \S", text)
    assert re.findall(r"^## (.*)", text, re.MULTILINE)[:3] == ["Context", "Decision", "Consequences"]


def test_decisions_are_numbered_without_gap_or_twin() -> None:
    """The decisions' numbers are 1, 2, 3 and so on."""
    assert [int(page.name[:4]) for page in PAGES] == list(range(1, len(PAGES) + 1))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documented_commands_exist(document: str) -> None:
    """Every `banger` command line in the documents is made of words and options banger knows."""
    assert [words for words in typed(document, "banger") if wrong_with(words)] == []
    assert [wrong_with(["vm", "fly"]), wrong_with(["vm", "run", "--fly"])] == ["fly", "--fly"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documented_targets_exist(document: str) -> None:
    """Every `make` target in the documents is one of the Makefile's."""
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert {words[0] for words in typed(document, "make") if words} <= set(targets)


@pytest.mark.parametrize(
    ("folder", "groups"),
    [("banger", ["build"]), ("cli", ["build"]), ("tests", ["dev"]), ("bench", ["dev", "peers"])],
)
def test_an_imported_library_is_declared(folder: str, groups: list[str]) -> None:
    """What a room imports is named in pyproject.toml even when another library brings it."""
    # A peer of the bench is installed elsewhere: its module's name is taken for the package's.
    names, known = packages_distributions(), {name for group in groups for name in declared(group)}
    for_tests = known | set(declared("dev"))  # a stand-in for another program is run from a checkout only
    undeclared = {
        (path, module)
        for path, module in imported(folder)
        if not {canonicalize_name(name) for name in names.get(module, [module])}
        & (for_tests if path.startswith("banger/testing/") else known)
    }
    assert undeclared == set()


@pytest.mark.parametrize(("lock", "group"), [("runtime.txt", "build"), ("dev.txt", "dev")])
def test_lock_files_fit_the_project(lock: str, group: str) -> None:
    """Each declared requirement is pinned, by hash, to a version that pyproject.toml allows."""
    pinned = pins(lock)
    assert {
        name: pinned.get(name)
        for name, requirement in declared(group).items()
        if name not in pinned or pinned[name] not in requirement.specifier
    } == {}


def test_developers_run_what_users_run() -> None:
    """The two lock files agree on every version they share."""
    assert pins("runtime.txt").items() <= pins("dev.txt").items()


def test_peers_are_pinned_and_kept_apart() -> None:
    """What the bench measures beside banger is pinned by hash, and no peer is in the lock of .venv."""
    peers = {Requirement(text).name: Requirement(text) for text in PROJECT["dependency-groups"]["peers"]}
    pinned = pins("peers.txt")
    assert {name for name, peer in peers.items() if pinned.get(name, "") not in peer.specifier} == set()
    assert not peers.keys() & pins("dev.txt").keys()


def test_no_database_driver_comes_along() -> None:
    """No driver is there that huey or peewee would import, slowing every process down."""
    assert not {"psycopg", "psycopg2", "psycopg2-binary", "pymysql", "redis"} & pins("dev.txt").keys()


@pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="Debian's package list is needed")
@pytest.mark.parametrize(("packages", "calls"), [([], []), (["of-no-package"], ["update", "of-no-package"])])
def test_packages_are_installed_only_when_missing(
    tmp_path: Path, packages: list[str], calls: list[str]
) -> None:
    """Neither apt-get nor sudo runs when every package is there."""
    log = tmp_path / "calls"
    log.touch()
    for name, script in {"sudo": 'exec "$@"', "apt-get": f'echo "$@" >>{log}'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n", "utf-8")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([ROOT / "setup/packages", *packages], check=True, env=env, timeout=60)
    assert [line.split()[-1] for line in log.read_text("utf-8").splitlines()] == calls
