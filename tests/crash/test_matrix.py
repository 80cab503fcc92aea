"""kill -9 at every point of every registered pipeline, on a recording host: nothing is lost or left.

The recording host has files for VMMs, guests and builders; workers, event log, saga, directories,
keys, initrds and the store of artifacts are the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import get_args, get_type_hints

import msgspec
import pytest

from banger.events import queries
from banger.events import vocabulary as ev
from banger.model import Resource, VmSpec
from banger.rpc import protocol as p
from banger.tasks.context import Ctx
from banger.tasks.pipeline import Pipeline, Step
from banger.tasks.registry import pipelines
from banger.testing import matrix, oracle
from banger.testing.lane import Case, Lane
from banger.testing.mortal import MortalLog, Point
from banger.testing.pipelines import FILES
from banger.testing.recording import RecordingWorld, write
from banger.testing.scenes import ask
from banger.vmm.driver import Machine
from tests.crash.conftest import MATRIX

KILLS = 1200


@pytest.fixture(scope="module")
def lane() -> Iterator[Lane]:
    with Lane(pipelines()) as lane:
        yield lane


@pytest.mark.timeout(7200)
def test_every_death_is_recovered_from(lane: Lane, request: pytest.FixtureRequest) -> None:
    """The host, the projections and the log are what they are when nobody dies, after every case."""
    cases = matrix.plan(lane, thorough=request.config.getoption("--matrix"))
    report = matrix.run(cases)
    request.config.stash[MATRIX] = str(report)
    assert [f"{each.case}: {each.differences}" for each in report.wrong[:20]] == []
    assert report.kills >= KILLS


def test_every_point_of_every_step_is_in_the_plan(lane: Lane) -> None:
    """Each step of each registered pipeline, and each undo, has a death at each of its moments."""
    assert matrix.required(pipelines()) <= matrix.covered(matrix.plan(lane))


def test_a_pipeline_without_a_scene_is_told() -> None:
    """A kind of operation that is added without its points fails the plan, by name."""
    known = {FILES.kind: FILES}
    assert matrix.required(known) != set()
    with Lane(known) as lane, pytest.raises(LookupError, match=FILES.kind):
        matrix.plan(lane)


def test_a_step_that_no_scene_comes_to_is_told() -> None:
    """A step that is not run when nobody dies fails the plan, by name: it needs a scene of its own."""
    idle = Step(name="idle", title="idle", run=lambda _: None, why_no_undo="it does nothing")
    known = changed("vm.kill", lambda steps: (*steps, idle))  # what is asked for has the real steps
    with Lane(known) as lane, pytest.raises(LookupError, match=r"vm\.kill comes to idle"):
        matrix.plan(lane)


def changed(kind: str, change: Callable[[tuple[Step, ...]], tuple[Step, ...]]) -> dict[str, Pipeline]:
    """Give all pipelines, one of them with other steps."""
    known = dict(pipelines())
    return {**known, kind: Pipeline(kind, change(known[kind].steps))}


def with_step(kind: str, name: str, **changes: object) -> dict[str, Pipeline]:
    """Give all pipelines, one step of one of them changed."""
    return changed(
        kind,
        lambda steps: tuple(
            replace(step, **changes) if step.name == name else step  # type: ignore[arg-type]
            for step in steps
        ),
    )


# -- the matrix finds what it is there to find ---------------------------------------------------


def test_a_step_that_cannot_be_repeated_is_found() -> None:
    """An effect that fails where it was done before shows as another fate."""

    def run(ctx: Ctx) -> None:
        ctx.paths.directory.mkdir(mode=0o700, exist_ok=False)

    with Lane(with_step("vm.create", "directory", run=run)) as lane:
        acted = Point(moment="acted", kind="vm.create", step="directory")
        found = lane.run(Case(scene="vm.create", deaths=(acted,)))
    assert found.kills == 1
    assert "more: fate undone" in found.differences


def test_a_step_that_does_not_tell_what_it_acquires_is_found() -> None:
    """A directory that is in nobody's ledger is a stray even when nobody dies."""
    with (
        Lane(with_step("vm.create", "directory", acquires=lambda _: ())) as lane,
        pytest.raises(AssertionError, match="leaked: directory"),
    ):
        lane.clean("vm.create", None)


def test_an_undo_that_undoes_nothing_is_found() -> None:
    """What is left behind when an operation fails is a stray."""
    known = with_step("vm.create", "directory", undo=lambda _: None)
    keys = next(step for step in known["vm.create"].steps if step.name == "keys")
    with Lane(known) as lane, pytest.raises(AssertionError, match="leaked: directory"):
        lane.clean("vm.create", matrix.trouble_at(lane, "vm.create", "vm.create", keys))


def test_something_left_half_made_is_found(lane: Lane) -> None:
    """A file that no ledger speaks of, and the clean run has not, is a difference."""
    clean, _ = lane.clean("vm.create", None)
    op = lane.request("vm.create")
    lane.work().result()
    (lane.dirs.state / ".half").touch()
    found, _ = lane.look(op)
    assert [line.split()[0:3] for line in oracle.differences(clean, found)] == [
        ["more:", "file", "state/banger/.half"]
    ]


# -- the oracle is not blind ---------------------------------------------------------------------

Plant = Callable[[MortalLog, RecordingWorld], str]
SPEC = VmSpec(name="stray", image="i", kernel="k", vcpu=1, memory_mib=128, disk_mib=64)


def stray_name(log: MortalLog, _: RecordingWorld) -> str:
    with log.transaction() as tx:
        tx.append("vm-stray000", ev.VmReserved(spec=SPEC, host="h"))
    return "name stray"


def stray_directory(_: MortalLog, world: RecordingWorld) -> str:
    stray = world.dirs.vm("vm-stray000").directory
    stray.mkdir()
    return f"directory {stray}"


def stray_file(log: MortalLog, world: RecordingWorld) -> str:
    stray = world.dirs.vm(queries.find_vm(log, "web").id).initrd
    write(stray, b"nobody's: the VM does not run")
    return f"file {stray}"


def stray_socket(_: MortalLog, world: RecordingWorld) -> str:
    stray = world.dirs.vm("vm-stray000").agent
    write(stray, b"")
    return f"socket {stray}"


def stray_process(log: MortalLog, world: RecordingWorld) -> str:
    return f"process {run_a_stray(log, world).vm}"


def stray_port(log: MortalLog, world: RecordingWorld) -> str:
    return f"port {run_a_stray(log, world).ssh_port}"


def run_a_stray(log: MortalLog, world: RecordingWorld) -> Machine:
    """Run a VMM that nobody knows, and leave nothing of it but the process and its port."""
    beside = world.dirs.vm(queries.find_vm(log, "web").id)
    machine = Machine(
        vm="vm-stray000",
        op="op-stray000",
        name="stray",
        vcpu=1,
        memory_mib=128,
        kernel=world.dirs.database,
        initrd=world.dirs.database,
        words=(),
        disks=(),
        ssh_port=20_000,
        mac="02:00:00:00:00:01",
        nat=False,
        paths=msgspec.structs.replace(beside, vm="vm-stray000"),
    )
    world.vmm.launch(machine)
    for path in (machine.paths.qmp, machine.paths.agent):
        path.unlink()
    return machine


def stray_artifact(_: MortalLog, world: RecordingWorld) -> str:
    digest = "f" * 64
    (world.dirs.cache / "images" / digest).mkdir()
    return f"artifact image:{digest}"


PLANTS = [stray_name, stray_directory, stray_file, stray_socket, stray_process, stray_port]


@pytest.mark.parametrize("plant", [*PLANTS, stray_artifact])
def test_a_leak_of_each_kind_is_found(lane: Lane, plant: Plant) -> None:
    """What is on the host and in nobody's ledger is named."""
    stop_web(lane)
    with lane.opened() as (log, world):
        assert list(oracle.strays(log, world)) == []
        line = plant(log, world)
        assert f"leaked: {line}" in list(oracle.strays(log, world))


@pytest.mark.parametrize("plant", PLANTS)
def test_a_sweep_removes_a_leak_of_each_kind(lane: Lane, plant: Plant) -> None:
    """After a sweep nothing is anybody's too much or too little, and the VM beside it is whole."""
    stop_web(lane)
    with lane.opened() as (log, world):
        plant(log, world)
    lane.deed(ask(p.OpsSweep())).result()
    lane.work().result()
    with lane.opened() as (log, world):
        assert list(oracle.strays(log, world)) == []
        assert [(vm.spec.name, vm.state) for vm in queries.vms(log)] == [("web", "stopped")]
        assert queries.ops(log, limit=1)[0].fate == "done"


@pytest.mark.parametrize("kind", get_args(get_type_hints(Resource)["kind"]))
def test_what_is_missing_of_each_kind_is_found(lane: Lane, kind: str) -> None:
    """What is in the ledger and not on the host is named."""
    stop_web(lane)
    with lane.opened() as (log, world):
        with log.transaction() as tx:
            gone = msgspec.convert({"kind": kind, "id": "nowhere"}, Resource)
            tx.append("op-gone0000", ev.ResourceHeld(resource=gone, vm="vm-gone0000"), op="op-gone0000")
        assert list(oracle.strays(log, world)) == [f"missing: {kind} nowhere"]


def stop_web(lane: Lane) -> None:
    """Have one VM, which is stopped, and nothing else."""
    lane.request("vm.stop")
    lane.work().result()
