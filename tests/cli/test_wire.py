from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from banger.errors import DaemonDown, InvalidRequest, NotFound
from banger_cli import app, wire
from tests.cli import fake_daemon
from tests.cli.conftest import Banger
from tests.cli.fake_daemon import FakeDaemon, Json

START = """
import sys
sys.executable = sys.argv[1]
from banger_cli import app
sys.exit(app.run(sys.argv[2:]))
"""


@pytest.fixture
def stand_in(home: Path) -> Path:
    """Make a program that is the fake daemon, to stand in for Python whatever that is asked to run."""
    path = home / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{fake_daemon.__file__}" "$@"\n')
    path.chmod(0o755)
    return path


def _start(stand_in: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START, str(stand_in), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_errors_keep_their_class(daemon: FakeDaemon) -> None:
    """An error from the daemon is raised as its own class with its hint and operation."""
    daemon.answers["vm.show"] = {
        "error": {"code": "not-found", "message": "No web.", "hint": "Look.", "op": "op-9"}
    }
    with pytest.raises(NotFound, match=r"No web\.") as caught:
        wire.call("vm.show", vm="web")
    assert (caught.value.hint, caught.value.op) == ("Look.", "op-9")


def test_none_is_not_sent(daemon: FakeDaemon) -> None:
    """A parameter that was not given is not sent, so the daemon's default holds."""
    daemon.answers["ops.list"] = {"ops": []}
    wire.call("ops.list", vm=None, limit=3)
    assert daemon.calls == [("ops.list", {"limit": 3})]


def test_hung_daemon_is_told_apart(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that accepts but answers nothing is reported within the patience, twice over."""
    monkeypatch.setattr(wire, "PATIENCE_S", 0.2)
    daemon.answers["hello"] = daemon.answers["vm.list"] = lambda _: time.sleep(5)
    began = time.monotonic()
    with pytest.raises(DaemonDown, match="accepts connections but does not answer"):
        wire.call("vm.list")
    assert time.monotonic() - began < 2


def _slow(_: Json) -> Json:
    time.sleep(0.7)
    return {"vms": []}


def test_working_daemon_is_waited_for(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A daemon that is slow with one request but answers hello is at work: we wait, and say so."""
    monkeypatch.setattr(wire, "PATIENCE_S", 0.2)
    daemon.answers["vm.list"] = _slow
    assert wire.call("vm.list") == {"vms": []}
    assert "still working on vm.list" in capsys.readouterr().err


def test_lost_connection(banger: Banger, daemon: FakeDaemon) -> None:
    """A daemon that dies under a request gives exit code 5 and a sentence."""
    daemon.answers["vm.show"] = None
    ran = banger("vm", "show", "web")
    assert ran.returncode == 5
    assert ran.stderr.startswith("banger: The daemon went away before it answered.\n  hint: ")


def test_full_backlog_is_not_a_hang(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket whose backlog stays full ends in DaemonDown after the patience."""
    monkeypatch.setattr(wire, "PATIENCE_S", 1.0)
    (home / "run" / "banger").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as first:
        full.bind(str(home / "run" / "banger" / "daemon.sock"))
        full.listen(0)
        first.connect(full.getsockname())
        with pytest.raises(DaemonDown, match="accepts no more connections"):
            wire.call("vm.list")


def test_path_too_long(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime directory too deep for a socket is refused by name, not with an errno."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp/" + "d" * 120)
    with pytest.raises(InvalidRequest, match="too long a path"):
        wire.connect()


def test_many_at_once_start_one_daemon(home: Path, stand_in: Path) -> None:
    """Eight commands at the same moment start one daemon, safely, and all get their answer."""
    clients = [_start(stand_in, "vm", "list", "--json") for _ in range(8)]
    assert [client.communicate(timeout=30)[0] for client in clients] == ['{"vms": []}\n'] * 8
    log = (home / "run" / "banger" / "started").read_text().splitlines()
    assert len(log) == 1
    how = json.loads(log[0])
    assert how["argv"][:4] == ["-P", "-m", "banger.rpc.daemon", "--ready-fd"]
    assert how["cwd"] == "/"
    assert how["sid"] != os.getsid(0)
    wire.call("daemon.stop")


def test_daemon_that_cannot_start(home: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that ends while starting gives exit code 5 and its own last words."""
    monkeypatch.setenv("FAKE_DIES", "1")
    client = _start(stand_in, "vm", "list", "--json")
    answer = json.loads(client.communicate(timeout=30)[0])
    assert client.returncode == 5
    assert answer["error"]["message"] == "The daemon ended while starting: the database is on fire"


@pytest.mark.parametrize("command", ["status", "stop"])
def test_status_and_stop_start_nothing(banger: Banger, home: Path, command: str) -> None:
    """`daemon status` and `daemon stop` without a daemon say so, and start none."""
    ran = banger("daemon", command)
    assert (ran.returncode, ran.stderr.splitlines()[0]) == (5, "banger: No daemon is running.")
    assert not (home / ".local").exists()


def test_stop_ends_a_hung_daemon(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`daemon stop` ends a daemon that answers nothing, found by who listens on its socket."""
    monkeypatch.setattr(wire, "PATIENCE_S", 0.2)
    path = home / "run" / "banger" / "daemon.sock"
    path.parent.mkdir(parents=True)
    script = (
        "import socket, sys, time; s = socket.socket(1); s.bind(sys.argv[1]); s.listen(); print(flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", f"{script}; time.sleep(60)", str(path)], stdout=subprocess.PIPE
    ) as hung:
        assert hung.stdout
        hung.stdout.readline()
        assert app.run(["daemon", "stop", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"pid": hung.pid}
        assert hung.wait(1) == -signal.SIGTERM
