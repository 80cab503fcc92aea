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


def pytest_configure() -> None:
    """Undo what a shell does to background jobs: an ignored SIGINT is inherited and cannot be trapped."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix", action="store_true", help="run the long matrices whole, not every ninth case"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out most of the long matrices unless --matrix asks for them; the same ninth each time."""
    if config.getoption("--matrix"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    left_out = {item for number, item in enumerate(slow) if number % 9}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
