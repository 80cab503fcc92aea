"""kill -9 in the middle of every step of `vm create`, on real guests.

Whatever dies, the operation goes on under its own id to a good end or is undone, and nothing that
the log does not know of is left on the host.
"""

from __future__ import annotations

import pytest

from banger import proc
from banger.tasks import vm
from banger.testing.crash import Point, Trap, Victim
from tests.crash.world import World, steps_of

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

STEPS = [step.name for step in steps_of(vm.CREATE)]
UNDONE = [step.name for step in steps_of(vm.CREATE) if step.undo is not None]


@pytest.mark.parametrize("step", STEPS[1:])
def test_worker_then_daemon_die_in_the_middle_of_a_step(world: World, step: str) -> None:
    """The same operation survives the death of its worker, then of the daemon, inside one step."""
    op = world.create(world.trap(step, "inside", "worker"), world.trap(step, "inside", "daemon"))
    assert world.claims(op) >= 3
    assert world.fate(op) == "done"
    world.answers()
    world.delete()
    world.nothing_is_left()


@pytest.mark.parametrize("step", UNDONE)
def test_worker_then_daemon_die_in_the_middle_of_an_undo(world: World, step: str) -> None:
    """An operation that failed is undone to nothing, whoever dies inside an undo step."""
    fail = Trap(kind="vm.create", step="ready", point="before", who="nobody")
    op = world.create(
        fail,
        world.trap(step, "inside", "worker", back=True),
        world.trap(step, "inside", "daemon", back=True),
    )
    assert world.claims(op) >= 3
    assert world.fate(op) == "undone"
    world.nothing_is_left()


@pytest.mark.slow
@pytest.mark.parametrize("who", ["worker", "daemon", "everyone"])
@pytest.mark.parametrize("point", ["before", "inside", "after"])
@pytest.mark.parametrize("step", STEPS[1:])
def test_any_death_at_any_point_of_a_step(world: World, step: str, point: Point, who: Victim) -> None:
    """Before, inside and after the effect, whoever dies: the operation ends well."""
    op = world.create(world.trap(step, point, who))
    assert world.fate(op) == "done"
    world.answers()
    world.delete()
    world.nothing_is_left()


def test_the_oracle_sees_what_is_left(world: World) -> None:
    """A planted leftover of each kind makes the oracle fail: it is not blind."""
    world.nothing_is_left()
    stray = world.home.dirs.vm("vm-stray000")
    stray.directory.mkdir()
    with pytest.raises(AssertionError):
        world.nothing_is_left()
    stray.directory.rmdir()
    stray.qmp.touch()
    with pytest.raises(AssertionError):
        world.nothing_is_left()
    stray.qmp.unlink()
    world.nothing_is_left()
    assert proc.me() not in world.home.processes()
