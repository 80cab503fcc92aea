"""What all tests share: a private home for one banger, and a check that nothing is left of it."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import config
from banger.events.log import EventLog


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path is short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="bg-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def dirs(short_path: Path) -> config.Dirs:
    """Private directories of one owner, made; the cache is the user's own (images are costly)."""
    environ = {
        "HOME": os.environ.get("HOME", "/"),
        "XDG_STATE_HOME": str(short_path / "state"),
        "XDG_RUNTIME_DIR": str(short_path / "run"),
        "XDG_CONFIG_HOME": str(short_path / "config"),
        **{key: os.environ[key] for key in ("XDG_CACHE_HOME",) if key in os.environ},
    }
    (short_path / "run").mkdir(mode=0o700)
    found = config.find_dirs(environ)
    found.make()
    return found


@pytest.fixture
def log(dirs: config.Dirs) -> Iterator[EventLog]:
    """An empty event log."""
    opened = EventLog(dirs.database, dirs.work_bell, dirs.event_bell, "test")
    yield opened
    opened.close()


TESTS = Path(__file__).parent
TOGETHER = {"guest": "fixed ids", "vmm": "fixed ids", "hosted": "hosted", "crash": "crash"}


def _company(path: Path) -> str:
    """Name what a test's file must not be run beside: its room's others, or nothing but itself."""
    return TOGETHER.get(path.parts[0], str(path))


def pytest_configure() -> None:
    """Undo what a shell does to background jobs: an ignored SIGINT is inherited and cannot be trapped."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix", action="store_true", help="run the long matrices whole, not every ninth case"
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is asked for by `-m long` only, and, unless --matrix, most of the long matrices.

    Of these it is the same ninth that stays. What shares a guest, or ids of VMs, goes to one process
    of those that run side by side.
    """
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_company(item.path.relative_to(TESTS))))
    if config.getoption("markexpr") != "long":
        _leave_out(config, items, {item for item in items if item.get_closest_marker("long")})
    if config.getoption("--matrix"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    _leave_out(config, items, {item for number, item in enumerate(slow) if number % 9})


def _leave_out(config: pytest.Config, items: list[pytest.Item], unwanted: set[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=list(unwanted))
    items[:] = [item for item in items if item not in unwanted]
