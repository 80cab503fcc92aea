"""Ctrl-C, and the daemon's death, while a real operation is waited for."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from banger import proc
from banger.events.log import EventLog
from banger.testing.home import Home
from tests.cli import scenes
from tests.cli.conftest import ARGV, Banger, Terminal
from tests.cli.fake_daemon import FakeDaemon
from tests.cli.pipelines import PATIENT

Json = dict[str, Any]
QUESTION = "or wait? [D/c/w] "
CTRL_C, CTRL_D = b"\x03", b"\x04"


class Work:
    """An operation that was undone, and waits for as long as we like when it is asked for again."""

    def __init__(self, home: Home, log: EventLog, directory: Path, lane: str):
        self.home = home
        self.directory = directory
        (directory / "fail").touch()
        self.undone = log.request(PATIENT.request(lane=lane, args={"directory": str(directory)}))
        assert home.banger("ops", "follow", self.undone).returncode == 6
        (directory / "fail").unlink()

    def wait(self, *flags: str) -> list[str]:
        """Give the argv that asks for it again and waits."""
        given = [f"{key}={word}" for key, word in self.home.environ.items() if os.environ.get(key) != word]
        return ["env", *given, *self.home.argv("ops", "retry", self.undone, *flags)]

    def op(self) -> Json:
        """Show the operation that was asked for last."""
        ops: list[Json] = self.home.json("ops", "list", "--limit", "1")["ops"]
        return ops[0]

    def go(self) -> None:
        (self.directory / "go").touch()

    def end(self) -> str:
        """Wait for its end and give its fate."""
        self.home.banger("ops", "follow", self.op()["id"])
        return str(self.op()["fate"])

    def left(self) -> list[str]:
        return [path.name for path in self.directory.iterdir()]


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[Home, EventLog]]:
    """A real daemon with its workers, and our own door to its log."""
    with Home(pipelines="tests.cli.pipelines") as home:
        home.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
        home.configure("workers = 2\n")
        started = home.banger("daemon", "start")
        assert started.returncode == 0, started.stderr
        log = EventLog(home.dirs.database, home.dirs.work_bell, home.path / "own.fifo", "test")
        yield home, log
        log.close()


_lanes = itertools.count()


@pytest.fixture
def work(real: tuple[Home, EventLog], tmp_path: Path) -> Iterator[Work]:
    work = Work(*real, tmp_path, f"lane-{next(_lanes)}")
    yield work
    (tmp_path / "hold").unlink(missing_ok=True)
    work.go()
    work.end()


@contextlib.contextmanager
def at_terminal(argv: list[str]) -> Iterator[Terminal]:
    terminal = Terminal(argv)
    yield terminal
    if terminal.child.poll() is None:
        terminal.child.kill()
        terminal.child.wait()
    os.close(terminal.master)
    os.close(terminal.slave)


@contextlib.contextmanager
def without_terminal(argv: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A command that has drawn its first step."""
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True) as client:
        assert client.stderr is not None
        assert "✓ make" in client.stderr.readline()
        yield client
        if client.poll() is None:
            client.kill()


def interrupted(terminal: Terminal) -> None:
    """Press Ctrl-C while the operation hangs, and see the question."""
    terminal.expect("✓ make")
    terminal.type(CTRL_C)
    terminal.expect(QUESTION)


# -- at a terminal -------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [b"d\r", b"detach\r", b"\r", CTRL_C, CTRL_D, b"x\rD\r"])
def test_detach(work: Work, answer: bytes) -> None:
    """With d, Enter, another Ctrl-C or the end of input it goes on alone; what is no answer asks again."""
    with at_terminal(work.wait()) as terminal:
        interrupted(terminal)
        terminal.type(answer)
        shown = terminal.expect("undoes it.")
        assert "Detached; the operation goes on." in shown
        assert terminal.end() == 130
    assert shown.count(QUESTION) == (1 if b"x" in answer else 0)
    assert work.op()["state"] == "running"
    work.go()
    assert work.end() == "done"


def test_cancel(work: Work) -> None:
    """With c the operation is undone before our eyes, to nothing, and the end is that of a cancelled one."""
    with at_terminal(work.wait()) as terminal:
        interrupted(terminal)
        terminal.type(b"c\r")
        shown = terminal.expect("banger: The operation was cancelled and undone.")
        assert terminal.end() == 6
    assert re.search(r"Cancelling.*↩ undoing.*↩ make", shown, re.DOTALL)
    assert "✓ make" not in shown
    assert work.op()["fate"] == "cancelled"
    assert work.left() == []


def test_go_on_waiting(work: Work) -> None:
    """With w it goes on where it was: no event is drawn twice, none is lost, and Ctrl-C asks again."""
    with at_terminal(["env", "TERM=xterm", *work.wait()]) as terminal:
        interrupted(terminal)
        terminal.type(b"w\r")
        terminal.expect("w\r\n")
        assert "✓ make" not in terminal.expect("· hang")
        terminal.type(CTRL_C)
        terminal.expect(QUESTION)
        work.go()
        assert work.end() == "done"
        terminal.type(b"w\r")
        shown = terminal.expect(f"{work.op()['id']} is done")
        assert terminal.end() == 0
    assert shown.count("✓ hang") == 1
    assert "✓ make" not in shown


def test_too_late(work: Work) -> None:
    """What was done before it could be cancelled is said to be, and is reported done."""
    with at_terminal(work.wait()) as terminal:
        interrupted(terminal)
        work.go()
        assert work.end() == "done"
        terminal.type(b"c\r")
        shown = terminal.expect("is done\r\n")
        assert terminal.end() == 0
    assert f"{work.op()['id']} was done before it could be cancelled." in shown


def test_ctrl_c_while_it_is_cancelled(work: Work) -> None:
    """A second Ctrl-C leaves the undo to itself, and it goes on to nothing."""
    (work.directory / "hold").touch()
    with at_terminal(work.wait()) as terminal:
        interrupted(terminal)
        terminal.type(b"c\r")
        terminal.expect("↩ undoing")
        terminal.type(CTRL_C)
        shown = terminal.expect("shows it.")
        assert terminal.end() == 130
    assert "Detached; the undo goes on." in shown
    (work.directory / "hold").unlink()
    assert work.end() == "cancelled"
    assert work.left() == []


def test_no_question_when_it_is_decided(work: Work) -> None:
    """--on-interrupt decides on a terminal, too, without asking."""
    with at_terminal(work.wait("--on-interrupt", "cancel")) as terminal:
        terminal.expect("✓ make")
        terminal.type(CTRL_C)
        shown = terminal.expect("The operation was cancelled and undone.")
        assert terminal.end() == 6
    assert QUESTION not in shown


# -- without a terminal --------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--on-interrupt", "detach"]])
def test_detach_without_a_terminal(work: Work, flags: list[str]) -> None:
    """Where nobody can answer, nobody is asked, and the operation goes on."""
    with without_terminal(work.wait(*flags)) as client:
        client.send_signal(signal.SIGINT)
        _, err = client.communicate(timeout=20)
        assert client.returncode == 130
    assert QUESTION not in err
    assert work.op()["state"] == "running"


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_cancel_without_a_terminal(work: Work, flags: list[str]) -> None:
    """--on-interrupt cancel undoes the operation and waits for that, for people and for programs."""
    with without_terminal(work.wait("--on-interrupt", "cancel", *flags)) as client:
        client.send_signal(signal.SIGINT)
        out, err = client.communicate(timeout=20)
        assert client.returncode == 6
    assert "↩ make" in err
    assert (json.loads(out)["error"]["code"] if flags else out) == ("cancelled" if flags else "")
    assert work.op()["fate"] == "cancelled"
    assert work.left() == []


def test_ctrl_c_in_ops_cancel(work: Work) -> None:
    """What is being cancelled is not asked about: Ctrl-C leaves the undo to itself."""
    (work.directory / "hold").touch()
    with without_terminal(work.wait()) as client:
        cancelling = ["env", *work.wait()[1:-3], "ops", "cancel", work.op()["id"]]
        with at_terminal(cancelling) as terminal:
            terminal.expect("↩ undoing")
            terminal.type(CTRL_C)
            assert QUESTION not in terminal.expect("Detached; the undo goes on.")
            assert terminal.end() == 130
        (work.directory / "hold").unlink()
        client.communicate(timeout=20)
        assert client.returncode == 6


def test_ignored_ctrl_c_stays_ignored(work: Work) -> None:
    """What a shell has put in the background, with SIGINT ignored, is not ended by it."""
    ignoring = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *work.wait("--on-interrupt", "cancel")]
    with without_terminal(ignoring) as client:
        client.send_signal(signal.SIGINT)
        work.go()
        _, err = client.communicate(timeout=20)
        assert client.returncode == 0, err


# -- the daemon's death --------------------------------------------------------------------


def _kill_daemon(home: Home) -> None:
    pid = home.daemon()
    assert pid is not None
    daemon = proc.identify(pid)
    assert daemon is not None
    proc.kill(daemon)


def test_reconnecting_is_said(work: Work) -> None:
    """When the daemon is killed under a waiting command, it says so once and loses and repeats nothing."""
    with without_terminal(work.wait()) as client:
        _kill_daemon(work.home)
        assert client.stderr is not None
        said = client.stderr.readline()
        assert re.fullmatch(r"banger: the daemon went away; following on after event \d+\n", said)
        work.go()
        out, err = client.communicate(timeout=30)
        assert client.returncode == 0, err
    assert out.endswith(" is done\n")
    assert "went away" not in err
    assert "✓ make" not in err
    assert err.count("✓ hang") == 1


def test_reconnecting_is_said_beside_json(work: Work) -> None:
    """`ops follow --json` says on standard error that the daemon went away, and each event once."""
    with without_terminal(work.wait()) as waiting:
        op = work.op()["id"]
        with work.home.start("ops", "follow", op, "--json") as follower:
            assert follower.stdout is not None
            lines = [follower.stdout.readline()]
            while b'"hang"' not in lines[-1] or b"step.started" not in lines[-1]:
                lines.append(follower.stdout.readline())
            _kill_daemon(work.home)
            work.go()
            rest, err = follower.communicate(timeout=30)
            assert follower.returncode == 0
        waiting.communicate(timeout=30)
    assert err.count(b"the daemon went away") == 1
    answers = [json.loads(line) for line in [*lines, *rest.splitlines()]]
    seqs = [answer["event"]["seq"] for answer in answers[:-1]]
    assert seqs == [event["seq"] for event in work.home.json("events", "list", "--op", op)["events"]]
    assert answers[-1]["result"]["fate"] == "done"


def test_what_was_joined_is_neither_lost_nor_repeated(banger: Banger, daemon: FakeDaemon) -> None:
    """The older events of an operation that is joined come late, and survive the daemon's death, too."""
    first, own = scenes.requested("image"), scenes.event(9, "op.parked", on="op-2", reason="waits")
    joined = [scenes.started(2, 0, "packages", "op-2"), scenes.done(3, 0, "packages", op="op-2")]
    lost: list[Json | None] = [first, own, joined[0], None]
    whole: list[Json | None] = [first, own, *joined, scenes.ended()]
    answers = iter([lost, whole])

    def follow(params: Json) -> list[Json | None]:
        return [
            line
            for line in next(answers)
            if line is None or "result" in line or line["event"]["seq"] > params["after"]
        ]

    daemon.answers["ops.follow"] = follow
    ran = banger("ops", "follow", "op-1", "--json")
    assert [json.loads(line) for line in ran.stdout.splitlines()] == [first, own, *joined, scenes.ended()]


# -- several, and those that go inside -----------------------------------------------------


def _held(told: threading.Event, ends: Callable[[str], Json]) -> Callable[[Json], Iterator[Json]]:
    """Answer ops.follow with a step, and the end once `told`."""

    def follow(params: Json) -> Iterator[Json]:
        if params["after"] == 0:
            yield scenes.requested("make", op=params["op"])
            yield scenes.done(2, 0, "make", op=params["op"])
        told.wait(20)
        yield ends(params["op"])

    return follow


def _cancelling(told: threading.Event, answer: Json) -> Callable[[Json], Json]:
    def cancel(_: Json) -> Json:
        told.set()
        return answer

    return cancel


def test_several_are_cancelled_together(daemon: FakeDaemon) -> None:
    """Cancelling while several VMs are waited for cancels the operations of all."""
    told = threading.Event()
    daemon.answers |= {
        "vm.start": lambda params: {"op": f"op-{params['vm']}", "vm": "vm-1", "name": params["vm"]},
        "ops.cancel": _cancelling(told, {"op": "op-a"}),
        "ops.follow": _held(told, lambda op: scenes.ended("cancelled", op=op)),
    }
    with at_terminal([*ARGV, "vm", "start", "a", "b"]) as terminal:
        terminal.expect("✓ make")
        terminal.type(CTRL_C)
        assert "2 operations: " in terminal.expect(QUESTION)
        terminal.type(b"c\r")
        shown = terminal.expect("op: op-b")
        assert terminal.end() == 6
    assert shown.count("banger: The operation was cancelled and undone.") == 2
    assert daemon.asked("ops.cancel") == [{"op": "op-a"}, {"op": "op-b"}]


def test_run_that_is_cancelled_too_late(daemon: FakeDaemon) -> None:
    """A VM that was ready before its `vm run` could be cancelled stays, and nothing is run in it."""
    told = threading.Event()
    ended = {"error": {"code": "state", "message": "It has ended already."}}
    daemon.answers |= {
        "vm.create": scenes.MADE,
        "ops.cancel": _cancelling(told, ended),
        "ops.follow": _held(told, lambda op: scenes.ended(op=op)),
    }
    with at_terminal([*ARGV, "vm", "run", "--", "true"]) as terminal:
        interrupted(terminal)
        terminal.type(b"c\r")
        shown = terminal.expect("`banger vm delete web` ends it.")
        assert terminal.end() == 130
    assert "ready in 4.70s" in shown
    assert daemon.asked("vm.exec") == []


def test_run_rm_is_not_asked_about(banger: Banger, daemon: FakeDaemon) -> None:
    """`vm run --rm` leaves at Ctrl-C without a question, and refuses to be told otherwise."""
    told = threading.Event()
    daemon.answers |= {
        "vm.create": scenes.MADE,
        "vm.tether": {},
        "ops.follow": _held(told, lambda op: scenes.ended(op=op)),
    }
    with at_terminal([*ARGV, "vm", "run", "--rm", "--", "true"]) as terminal:
        terminal.expect("✓ make")
        terminal.type(CTRL_C)
        assert QUESTION not in terminal.expect("web is being deleted")
        assert terminal.end() == 130
    told.set()
    assert daemon.asked("ops.cancel") == []
    refused = banger("vm", "run", "--rm", "--on-interrupt", "cancel", "--", "true")
    assert (refused.returncode, len(daemon.asked("vm.create"))) == (2, 1)


@pytest.mark.guest
def test_cancelled_create_leaves_nothing() -> None:
    """Ctrl-C and c while a real guest boots undo the whole VM: nothing is left on the host."""
    with Home() as home:
        home.configure("memory_mib = 256\n")
        own = [f"{name}={value}" for name, value in home.environ.items() if name.startswith("XDG_")]
        argv = ["env", "TERM=xterm", *own, *home.argv("vm", "create", "web", "--wait")]
        with at_terminal(argv) as terminal:
            terminal.expect("· guest boots")
            terminal.type(CTRL_C)
            terminal.expect(QUESTION)
            terminal.type(b"c\r")
            terminal.expect("The operation was cancelled and undone.")
            assert terminal.end() == 6
        assert home.leftovers() == []
