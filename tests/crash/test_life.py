"""kill -9 in the middle of every step of a VM's later life, on real guests."""

from __future__ import annotations

import pytest

from banger.tasks import vm
from tests.crash.test_create import STEPS, UNDONE
from tests.crash.world import World, steps_of

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

CASES = [
    (pipeline.kind, step.name)
    for pipeline in vm.PIPELINES
    if pipeline.kind in ("vm.start", "vm.stop", "vm.restart", "vm.kill", "vm.delete")
    for step in steps_of(pipeline)
]
DEATHS = 2 * (len(CASES) + len(STEPS[1:]) + len(UNDONE))
"""A worker's, then the daemon's, in each of the cases here and in `test_create`."""

RUNS_AFTER = {"vm.start": True, "vm.restart": True, "vm.stop": False, "vm.kill": False}


@pytest.mark.parametrize(("kind", "step"), CASES)
def test_worker_then_daemon_die_in_the_middle_of_a_step(world: World, kind: str, step: str) -> None:
    """The operation ends well under its own id, and the VM is what was asked for."""
    world.create()
    if kind == "vm.start":
        world.run("vm", "stop", "web", "--no-wait")
    traps = (
        world.trap(step, "inside", "worker", kind=kind),
        world.trap(step, "inside", "daemon", kind=kind),
    )
    op = world.run("vm", kind.removeprefix("vm."), "web", "--no-wait", traps=traps)
    assert world.claims(op) >= 3
    assert world.fate(op) == "done"
    if kind != "vm.delete":
        shown = world.home.json("vm", "show", "web")["vm"]
        assert shown["state"] == ("running" if RUNS_AFTER[kind] else "stopped")
        if RUNS_AFTER[kind]:
            world.answers()
        world.delete()
    world.nothing_is_left()


def test_there_are_enough_deaths() -> None:
    """At least sixty kills on real guests in every run, each second one during the recovery of the first."""
    assert DEATHS >= 60
