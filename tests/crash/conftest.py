from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from banger.testing import crash
from banger.testing.crash import Trap
from banger.testing.home import Home
from tests.crash.world import World

MATRIX = pytest.StashKey[str]()
"""What the crash matrix has to say at the end of the run."""


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that prints, where several run side by side."""
    if MATRIX in session.config.stash and hasattr(session.config, "workeroutput"):
        session.config.workeroutput["matrix"] = session.config.stash[MATRIX]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any) -> None:
    """Hear what one of several processes has to say."""
    said = getattr(node, "workeroutput", {}).get("matrix")
    if said is not None:
        node.config.stash[MATRIX] = said


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if MATRIX in config.stash:
        terminalreporter.write_line(config.stash[MATRIX])


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One banger for all crash tests, after clean runs have counted what each step does."""
    traps = tmp_path_factory.mktemp("traps")
    with Home(pipelines="banger.testing.crash") as home:
        home.environ[crash.DIRECTORY] = str(traps)
        home.configure("memory_mib = 256\nready_timeout_s = 40.0\n")
        world = World(home, traps)
        assert world.fate(world.create()) == "done"
        world.answers()
        for verb in ("stop", "start", "restart", "kill", "delete"):
            assert world.fate(world.run("vm", verb, "web", "--no-wait")) == "done"
        fail = Trap(kind="vm.create", step="ready", point="before", who="nobody")
        assert world.fate(world.create(fail)) == "undone"
        world.nothing_is_left()
        yield world
