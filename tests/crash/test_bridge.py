"""kill -9 of the worker or of root's helper at root's steps, with real guests on a real bridge."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator

import pytest

from banger.testing import crash
from banger.testing.bridged import Bridged
from tests.crash.world import World

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(not shutil.which("nft"), reason="nft, which looks at the rules, is not installed"),
]

CREATE = ("vm", "create", "web", "--nat")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A banger on a bridge whose steps have traps; clean runs have counted what each step does."""
    traps = tmp_path_factory.mktemp("traps")
    with Bridged(pipelines="banger.testing.crash", more="ready_timeout_s = 40.0\n") as home:
        home.environ[crash.DIRECTORY] = str(traps)
        world = World(home, traps)
        assert world.fate(world.run(*CREATE)) == "done"
        assert world.fate(world.run("vm", "delete", "web", "--no-wait")) == "done"
        yield world


@pytest.fixture
def home(world: World) -> Iterator[Bridged]:
    """The banger, on whose host nothing may be left at the end of a test."""
    assert isinstance(world.home, Bridged)
    before = world.home.listing()
    yield world.home
    world.home.banger("vm", "delete", "web")
    assert world.home.listing() == before
    world.nothing_is_left()


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("step", "point"), [("tap", "inside"), ("tap", "after"), ("nat", "before"), ("nat", "inside")]
)
def test_a_worker_dies_in_a_step_of_roots(world: World, step: str, point: crash.Point) -> None:
    """The next worker asks root again, under a higher epoch, and the VM comes up."""
    op = world.run(*CREATE, traps=(world.trap(step, point, "worker"),))
    assert world.fate(op) == "done"
    world.answers()


@pytest.mark.parametrize("boundary", [3, 15, 25, 31])
def test_the_helper_dies_at_a_step_of_roots(world: World, home: Bridged, boundary: int) -> None:
    """By kill -9 before or after a call of the kernel: a new one is asked again, and the VM comes up."""
    home.end_helper()
    home.start_helper("--die-at", str(boundary))
    with home.start(*CREATE, "--wait") as asked:
        assert home.wait_helper() == -signal.SIGKILL
        home.start_helper()
        asked.communicate(timeout=120)
    assert asked.returncode == 0
    world.answers()


@pytest.mark.parametrize("boundary", [3, 11])
def test_the_helper_dies_while_a_vm_is_deleted(world: World, home: Bridged, boundary: int) -> None:
    """Deletion goes on where it was, and leaves nothing."""
    assert home.banger(*CREATE, "--wait").returncode == 0
    home.end_helper()
    home.start_helper("--die-at", str(boundary))
    with home.start("vm", "delete", "web") as asked:
        assert home.wait_helper() == -signal.SIGKILL
        home.start_helper()
        asked.communicate(timeout=120)
    assert asked.returncode == 0
    world.nothing_is_left()
