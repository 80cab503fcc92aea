"""What the end-to-end tests share: one banger with a guest, and the README as a list of commands."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.testing.home import Home

REPOSITORY = Path(__file__).parents[2]


def readme_commands() -> list[list[str]]:
    """Give every `banger` command line of README.md's code blocks as words, in the order printed."""
    lines = (REPOSITORY / "README.md").read_text("utf-8").splitlines()
    blocks = [line.strip() for line in lines if line.startswith("    ")]
    return [shlex.split(line, comments=True)[1:] for line in blocks if line.startswith("banger ")]


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    """A banger that the tests of one module share."""
    with Home() as home:
        home.configure("memory_mib = 256\n")
        yield home


@pytest.fixture(scope="module")
def made(home: Home) -> str:
    done = home.banger("vm", "create", "web", "--wait")
    assert done.returncode == 0, done.stderr
    return "web"


@pytest.fixture
def web(home: Home, made: str) -> str:
    """The name of a VM that runs, shared by the tests of one module."""
    assert home.banger("vm", "start", made).returncode == 0
    return made
