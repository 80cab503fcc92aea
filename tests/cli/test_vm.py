from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.cli import scenes
from tests.cli.conftest import ARGV, Banger, Terminal
from tests.cli.fake_daemon import FakeDaemon

Json = dict[str, Any]
SPEC_LINE = "spec: name=web image=debian-12 vcpu=1 memory=3007MiB disk=8192MiB network=user nat=off"
VM = {
    **scenes.SPEC,
    "id": "vm-1",
    "state": "running",
    "desired": "stopped",
    "created_us": 1,
    "started_us": None,
    "ssh_port": 2222,
    "root_disk": "overlay",
    "address": None,
    "workspace": None,
    "pid": 7,
    "reason": "a\nb",
    "op": None,
    "resources": [{"kind": "port", "id": "2222", "state": "held", "op": "op-1"}],
    "history": [{"op": "op-1", "kind": "vm.create", "fate": "done", "time_us": 1}],
}


@pytest.fixture
def maker(daemon: FakeDaemon) -> FakeDaemon:
    """Give a daemon that makes one VM, web, and runs commands in it."""
    daemon.answers |= {
        "vm.create": scenes.MADE,
        "vm.tether": {},
        "vm.delete": {"op": "op-2", "vm": "vm-1", "name": "web"},
        "vm.ssh": {"argv": ["ssh", "root@127.0.0.1"]},
        "ops.follow": lambda params: scenes.CREATED if params["op"] == "op-1" else [scenes.ended(op="op-2")],
    }
    return daemon


def _methods(daemon: FakeDaemon) -> list[str]:
    return [method for method, _ in daemon.calls]


def test_create_returns_at_once(banger: Banger, maker: FakeDaemon) -> None:
    """`vm create` prints the spec and the operation, asks for just what was given, and waits for nothing."""
    ran = banger("vm", "create", "web", "--memory", "2G", "--nat")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{SPEC_LINE}\nop: op-1\n", "")
    asked = {"name": "web", "memory_mib": 2048, "nat": True, "start": True, "ephemeral": False}
    assert maker.calls == [("vm.create", asked)]


def test_create_waits(banger: Banger, maker: FakeDaemon) -> None:
    """`vm create --wait` streams the stages on standard error and ends with the time it took."""
    ran = banger("vm", "create", "--wait")
    assert ran.stdout == f"{SPEC_LINE}\nop: op-1\nready in 4.70s\n"
    assert ran.stderr == "  ✓ disks            0.02s\n"


def test_create_json(banger: Banger, maker: FakeDaemon) -> None:
    """--json gives one document with the spec, the operation and its fate."""
    document = json.loads(banger("vm", "create", "--wait", "--json").stdout)
    assert document == {**scenes.MADE, "fate": "done", "seconds": 4.7}


def test_create_that_fails(banger: Banger, maker: FakeDaemon) -> None:
    """A create that fails and is undone gives 6, the reason, the hint and the operation."""
    maker.answers["ops.follow"] = scenes.UNDONE
    ran = banger("vm", "create", "--wait")
    assert ran.returncode == 6
    assert ran.stderr.endswith("banger: mkfs is on fire\n  hint: Put it out.\n  op: op-1\n")
    error = json.loads(banger("vm", "create", "--wait", "--json").stdout)["error"]
    assert error == {**scenes.FIRE, "op": "op-1"}


@pytest.mark.parametrize(
    "words",
    [
        "create Web",
        "create a --name b",
        "create --memory 0",
        "create --vcpu many",
        "run -d --rm",
        "run -d -- true",
        "run --rm",
        "run ./repo",
        "exec web",
        "exec -t web -- true",
        "logs web --tail -1",
        "frobnicate",
    ],
)
def test_usage_errors(banger: Banger, daemon: FakeDaemon, words: str) -> None:
    """What cannot be meant is refused with 2, a sentence and a hint, before the daemon hears of it."""
    ran = banger("vm", *words.split())
    assert (ran.returncode, ran.stdout, daemon.calls) == (2, "", [])
    assert ran.stderr.startswith("banger: ")
    assert "\n  hint: " in ran.stderr
    answer = json.loads(banger("vm", "--json", *words.split()).stdout)
    assert answer["error"]["code"] == "invalid"


def test_run_rm(banger: Banger, maker: FakeDaemon) -> None:
    """`vm run --rm -- CMD`: only its output on stdout, its exit code is ours, the VM is deleted."""
    ran = banger("vm", "run", "--rm", "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (ran.returncode, ran.stdout) == (3, "out\n")
    assert ran.stderr.splitlines() == [
        SPEC_LINE,
        "op: op-1",
        "  ✓ disks            0.02s",
        "ready in 4.70s",
        "err",
        "web is gone in 4.70s",
    ]
    assert _methods(maker) == [
        "vm.create", "vm.tether", "ops.follow", "vm.exec", "vm.delete", "ops.follow",
    ]  # fmt: skip
    assert maker.asked("vm.create")[0]["ephemeral"] is True


def test_run_keeps(banger: Banger, maker: FakeDaemon) -> None:
    """Without --rm the VM stays, untethered, and a reminder says so."""
    ran = banger("vm", "run", "--", "false")
    assert ran.returncode == 1
    assert "web still runs: `banger vm ssh web`" in ran.stderr
    assert not {"vm.delete", "vm.tether"} & set(_methods(maker))


def test_run_detached(banger: Banger, maker: FakeDaemon) -> None:
    """`vm run -d` prints the name when it is ready, for scripts."""
    assert banger("vm", "run", "-d").stdout == "web\n"
    assert banger("vm", "run").stdout == "banger vm ssh web\n"


def test_run_json(banger: Banger, maker: FakeDaemon) -> None:
    """`vm run --json -- CMD` catches the output and gives all of it as one document."""
    ran = banger("vm", "run", "--rm", "--json", "--", "sh", "-c", "echo out; exit 4")
    document = json.loads(ran.stdout)
    assert ran.returncode == 4
    assert (document["exit"], document["stdout"], document["stderr"]) == (4, "out\n", "")
    assert (document["op"], document["spec"]["name"]) == ("op-1", "web")


def test_run_rm_that_fails_to_boot(banger: Banger, maker: FakeDaemon) -> None:
    """When the VM does not come up its error is the answer, and nothing of it is left."""
    maker.answers["ops.follow"] = scenes.UNDONE
    maker.answers["vm.delete"] = {"error": {"code": "not-found", "message": "No web."}}
    ran = banger("vm", "run", "--rm", "--", "true")
    assert ran.returncode == 6
    assert "No web" not in ran.stderr


def test_run_rm_that_cannot_delete(banger: Banger, maker: FakeDaemon) -> None:
    """A VM that cannot be deleted is an error, whatever the command said: something is left."""
    maker.answers["vm.delete"] = {"error": {"code": "stuck", "message": "It does not go."}}
    ran = banger("vm", "run", "--rm", "--", "true")
    assert ran.returncode == 7
    assert "banger: It does not go." in ran.stderr


def test_run_rm_exec_failure_deletes(banger: Banger, maker: FakeDaemon) -> None:
    """A guest that cannot be reached gives 9, and the VM is deleted all the same."""
    maker.answers["vm.exec"] = {"error": {"code": "guest-unreachable", "message": "No answer."}}
    assert banger("vm", "run", "--rm", "--", "true").returncode == 9
    assert _methods(maker)[-2:] == ["vm.delete", "ops.follow"]


def test_kill_9_unties_the_tether(maker: FakeDaemon) -> None:
    """`vm run --rm` killed with -9 closes its tether, which tells the daemon to delete the VM."""
    with subprocess.Popen(
        [*ARGV, "vm", "run", "--rm", "--", "sh", "-c", "echo up; exec sleep 60"], stdout=subprocess.PIPE
    ) as client:
        assert client.stdout
        assert client.stdout.readline() == b"up\n"
        assert not maker.untethered.is_set()
        client.kill()
    assert maker.untethered.wait(5)


def test_ctrl_c_while_booting_unties_the_tether(maker: FakeDaemon) -> None:
    """Ctrl-C while an ephemeral VM boots gives 130, says that it is being deleted, and unties it."""
    held = threading.Event()

    def follow(_: Json) -> Any:
        yield scenes.CREATED[0]
        yield scenes.CREATED[2]
        held.wait(10)

    maker.answers["ops.follow"] = follow
    with subprocess.Popen(
        [*ARGV, "vm", "run", "--rm", "--", "true"], stderr=subprocess.PIPE, text=True
    ) as client:
        assert client.stderr
        while "disks" not in client.stderr.readline():
            pass
        client.send_signal(2)
        _, err = client.communicate(timeout=10)
    held.set()
    assert client.returncode == 130
    assert "web is being deleted" in err
    assert maker.untethered.wait(5)


@pytest.mark.parametrize("verb", ["start", "stop", "restart", "kill", "delete"])
def test_verbs(banger: Banger, daemon: FakeDaemon, verb: str) -> None:
    """Each verb is an operation that is waited for, or not."""
    daemon.answers[f"vm.{verb}"] = {"op": "op-1", "vm": "vm-1", "name": "web"}
    daemon.answers["ops.follow"] = scenes.CREATED
    assert banger("vm", verb, "web").stdout.endswith(" in 4.70s\n")
    assert banger("vm", verb, "web", "--no-wait").stdout == "web: op-1\n"
    document = json.loads(banger("vm", verb, "web", "--json").stdout)
    assert document == {"op": "op-1", "vm": "vm-1", "name": "web", "fate": "done", "seconds": 4.7}


def test_what_is_so_already_is_told_so(banger: Banger, daemon: FakeDaemon) -> None:
    """Starting a VM that runs says that it runs already, to programs just that it is done."""
    checked = scenes.done(2, 0, "check")
    checked["event"]["data"]["last"] = True
    daemon.answers["vm.start"] = {"op": "op-1", "vm": "vm-1", "name": "web"}
    daemon.answers["ops.follow"] = [scenes.requested("check", "boot"), checked, scenes.ended()]
    assert banger("vm", "start", "web").stdout == "web runs already\n"
    assert json.loads(banger("vm", "start", "web", "--json").stdout)["fate"] == "done"


def test_several_names(banger: Banger, daemon: FakeDaemon) -> None:
    """Of several VMs each tells its own end; one that fails does not stop the others and sets the code."""

    def stop(params: Json) -> Json:
        if params["vm"] == "b":
            return {"error": {"code": "not-found", "message": "No b."}}
        return {"op": "op-1", "vm": f"vm-{params['vm']}", "name": params["vm"]}

    daemon.answers |= {"vm.stop": stop, "ops.follow": scenes.CREATED}
    ran = banger("vm", "stop", "a", "b", "c")
    assert (ran.returncode, ran.stdout) == (3, "a has stopped in 4.70s\nc has stopped in 4.70s\n")
    assert _methods(daemon)[:3] == ["vm.stop"] * 3
    ops = json.loads(banger("vm", "stop", "a", "b", "c", "--json").stdout)["ops"]
    assert [op.get("name", op.get("error", {}).get("code")) for op in ops] == ["a", "not-found", "c"]


def test_list_names(banger: Banger, daemon: FakeDaemon) -> None:
    """`ps -q` gives the names of those that are not stopped, `-aq` of all; --json the whole."""
    daemon.answers["vm.list"] = {"vms": [VM, {**VM, "name": "old", "state": "stopped"}]}
    assert banger("ps", "-q").stdout == "web\n"
    assert banger("ps", "-aq").stdout == "web\nold\n"
    assert [vm["name"] for vm in json.loads(banger("ps", "--json").stdout)["vms"]] == ["web"]


def test_show(banger: Banger, daemon: FakeDaemon) -> None:
    """`vm show` tells asked-for and actual state, resources and history, all escaped."""
    daemon.answers["vm.show"] = {"vm": VM}
    shown = banger("vm", "show", "web").stdout
    assert "running (asked for: stopped)" in shown
    assert "a\\x0ab" in shown
    assert "port      2222  held   op-1" in shown
    assert json.loads(banger("vm", "show", "web", "-o", "json").stdout) == {"vm": VM}


def test_logs(banger: Banger, daemon: FakeDaemon) -> None:
    """`vm logs` writes the console as it is; --json gives a line per chunk."""
    daemon.answers["vm.logs"] = [{"chunk": "a\x1b[1m"}, {"chunk": "b\n"}, {"result": {}}]
    assert banger("vm", "logs", "web", "--tail", "2").stdout == "a\x1b[1mb\n"
    assert daemon.calls == [("vm.logs", {"vm": "web", "tail": 2, "follow": False})]
    lines = banger("vm", "logs", "web", "--json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == [{"chunk": "a\x1b[1m"}, {"chunk": "b\n"}]


def test_run_on_a_terminal_goes_inside(maker: FakeDaemon, tmp_path: Path, terminals: list[Terminal]) -> None:
    """`vm run` on a terminal opens a shell; with --rm nothing is left after it, without a reminder."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nread line; echo "guest got $line"; exit 5\n')
    ssh.chmod(0o755)
    maker.answers["vm.ssh"] = {"argv": [str(ssh)]}
    for flags, farewell in ((["--rm"], "web is gone"), ([], "web still runs")):
        terminal = Terminal([*ARGV, "vm", "run", *flags])
        terminals.append(terminal)
        terminal.expect("ready in 4.70s")
        terminal.type(b"hello\r")
        terminal.expect("guest got hello")
        terminal.expect(farewell)
        assert terminal.end() == 5
    assert len(maker.asked("vm.delete")) == 1
