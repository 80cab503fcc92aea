"""kill -9 in the middle of every step of `vm create`, on real guests.

Whatever dies, the operation goes on under its own id to a good end or is undone, and nothing that
the log does not know of is left on the host.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import proc
from banger.events import queries
from banger.events import vocabulary as ev
from banger.events.log import EventLog
from banger.tasks import vm
from banger.testing import crash
from banger.testing.crash import Point, Trap, Victim
from banger.testing.home import Home

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

STEPS = [step.name for step in vm.CREATE.steps]
UNDONE = [step.name for step in vm.CREATE.steps if step.undo is not None]


class World:
    """A banger whose steps have traps, and the oracle that says whether anything is left of a VM."""

    def __init__(self, home: Home, traps: Path):
        self.home = home
        self.traps = traps

    def create(self, *traps: Trap) -> str:
        """Request a VM with traps set, see its operation to its end, and give its id."""
        for old in [*self.traps.glob("*.sprung"), *self.traps.glob("*.trap")]:
            old.unlink()
        self.home.banger("vm", "delete", "web")  # what a test that failed has left
        crash.set_traps(self.traps, *traps)
        op = str(self.home.json("vm", "create", "web")["op"])
        for _ in range(6):  # the client starts a new daemon when the old one is gone
            self.home.banger("ops", "follow", op)
            if self.home.json("ops", "show", op)["op"]["state"] == "ended":
                break
        assert crash.unsprung(self.traps) == [], "every trap sprang"
        return op

    def fate(self, op: str) -> str:
        return str(self.home.json("ops", "show", op)["op"]["fate"])

    def claims(self, op: str) -> int:
        """Tell how many workers have had the operation: at least one more than deaths it has seen."""
        return int(self.home.json("ops", "show", op)["op"]["epoch"])

    def answers(self) -> None:
        done = self.home.banger("vm", "exec", "web", "--", "echo", "I am well")
        assert (done.stdout, done.returncode) == ("I am well\n", 0), done.stderr

    def delete(self) -> None:
        done = self.home.banger("vm", "delete", "web")
        assert done.returncode == 0, done.stderr

    def nothing_is_left(self) -> None:
        """Compare log, ledger, queue, files, processes and ports with a host that has no VM."""
        dirs = self.home.dirs
        audited = self.home.json("ops", "audit")
        assert (audited["held"], audited["leaked"], audited["missing"]) == (0, [], [])
        assert audited["acquired"] == audited["released"]
        log = EventLog(dirs.database, dirs.work_bell, self.home.path / "own.fifo", "test")
        try:
            assert queries.vms(log) == []
            left = [r for r in queries.resources(log) if r.kind != "artifact"]
            assert left == []
            assert queries.active_count(log) == 0
            ports = {row.event.ssh_port for row in log.read() if isinstance(row.event, ev.VmStarted)}
        finally:
            log.close()
        assert list((dirs.state / "vms").iterdir()) == []
        assert {path.name for path in dirs.runtime.iterdir()} <= {"daemon.sock", "work.fifo", "events.fifo"}
        marked = [process for process in self.home.processes() if _is_vmm(process.pid)]
        assert marked == []
        for port in ports:
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0, "nobody listens on its port"


def _is_vmm(pid: int) -> bool:
    try:
        return "qemu" in Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return False


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    traps = tmp_path_factory.mktemp("traps")
    with Home(pipelines="banger.testing.crash") as home:
        home.environ[crash.DIRECTORY] = str(traps)
        home.configure("memory_mib = 256\nready_timeout_s = 40.0\n")
        world = World(home, traps)
        # A clean run, and one that is undone from the last step, count what each step does.
        assert world.fate(world.create()) == "done"
        world.answers()
        world.delete()
        fail = Trap(kind="vm.create", step="ready", point="before", who="nobody")
        assert world.fate(world.create(fail)) == "undone"
        world.nothing_is_left()
        yield world


def middle(world: World, step: str, *, back: bool = False) -> int:
    return max(1, crash.counted(world.traps, "vm.create", step, back=back) // 2)


def trap(world: World, step: str, point: Point, who: Victim, *, back: bool = False) -> Trap:
    nth = middle(world, step, back=back) if point == "inside" else 1
    if point == "inside" and crash.counted(world.traps, "vm.create", step, back=back) == 0:
        point = "after"  # it does nothing that could be interrupted
    return Trap(kind="vm.create", step=step, point=point, who=who, back=back, nth=nth)


@pytest.mark.parametrize("step", STEPS[1:])
def test_worker_then_daemon_die_in_the_middle_of_a_step(world: World, step: str) -> None:
    """The same operation survives the death of its worker, then of the daemon, inside one step."""
    op = world.create(trap(world, step, "inside", "worker"), trap(world, step, "inside", "daemon"))
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
        trap(world, step, "inside", "worker", back=True),
        trap(world, step, "inside", "daemon", back=True),
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
    op = world.create(trap(world, step, point, who))
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
