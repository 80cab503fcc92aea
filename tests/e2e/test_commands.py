"""The commands as a person types them, on real guests."""

from __future__ import annotations

import hashlib
import json
import random
import re
import signal
import subprocess
import time
from typing import Any

import pytest

from banger import proc
from banger.rpc.watch import GRACE_S
from banger.testing.home import Home
from tests.cli.conftest import Terminal
from tests.e2e.conftest import readme_commands

pytestmark = pytest.mark.guest

MIB = 1 << 20
HARD_WORDS = (
    "two words",
    "",
    "it's",
    'say "hi"',
    "line\nfeed",
    "trailing\n",
    "tab\tand\\back\\slash",
    "$HOME `id` $(id)",
    "* ? [a] ~ !",
    ";|&<>(){}#",
    "--",
    "-n",
    "naïve 漢字 🦀",
)
ANY_OP = re.compile(r"op-[0-9a-z]{8}")


def lines(stream: Any) -> list[str]:
    return [line.strip() for line in stream.splitlines()]


def ops_of(home: Home, vm: str, kind: str) -> list[dict[str, Any]]:
    return [op for op in home.json("ops", "list", "--vm", vm, "--limit", "100")["ops"] if op["kind"] == kind]


def in_terminal(home: Home, *words: str) -> Terminal:
    own = [f"{name}={value}" for name, value in home.environ.items() if name.startswith("XDG_")]
    return Terminal(["env", *own, *home.argv(*words)])


# -- the README ----------------------------------------------------------------------------


def test_readme() -> None:
    """Each command of the README does, in the order printed, what the README says; then nothing is left."""
    with Home() as home:
        home.configure("memory_mib = 256\n")
        op = ""
        for words in readme_commands():
            line = " ".join(words)
            if line == "vm ssh web":
                shell = in_terminal(home, *words)
                shell.expect("# ")
                shell.type(b"echo inside-$((6 * 7)); exit\n")
                shell.expect("inside-42")
                shell.expect("web still runs: `banger vm ssh web` goes back")
                assert shell.end() == 0
                continue
            short = op.removeprefix("op-")[-5:]
            done = home.banger(*(word.replace("op-XXXXXX", short) for word in words))
            out, err = done.stdout, done.stderr
            assert done.returncode == (42 if "exit 42" in line else 0), (line, out, err)
            match line:
                case "vm create web --wait":
                    assert re.search(r"^spec: name=web image=debian-12 vcpu=\d+ memory=256MiB disk=", out)
                    assert re.search(r"^ready in \d+\.\d\ds$", out, re.MULTILINE)
                    assert "guest boots" in err
                    op = ANY_OP.findall(out)[0]
                case "vm exec web -- cat /etc/os-release":
                    assert 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n' in out
                case "ps":
                    assert re.search(r"^web +running +debian-12 .* 127\.0\.0\.1:\d+ +-$", out, re.MULTILINE)
                case "ops list":
                    assert re.search(rf"^{op} +vm\.create +web +done ", out, re.MULTILINE)
                case "ops show op-XXXXXX":
                    assert re.search(rf"^op: +{op}$", out, re.MULTILINE)
                    assert re.search(r"^✓ guest boots .*ready_seconds=", out, re.MULTILINE)
                case "vm stop web":
                    assert re.fullmatch(r"web has stopped in .*s\n", out)
                case "vm start web":
                    assert re.fullmatch(r"web is ready in .*s\n", out)
                case "vm delete web":
                    assert re.fullmatch(r"web is gone in .*s\n", out)
                case "vm run --rm -- sh -c exit 42":
                    assert out == "", "standard output is the command's alone"
                    assert re.search(r" is gone in .*s$", err.strip())
                case _:
                    pytest.fail(f"the README has a command that this test does not know: {line}")
        assert home.leftovers() == []
        daemons = {home.daemon(), *(one["pid"] for one in home.json("daemon", "status")["workers"])}
        assert None not in daemons


# -- the life of a VM ----------------------------------------------------------------------


def test_a_graceful_stop_keeps_what_was_just_written(home: Home, web: str) -> None:
    """`vm stop` lets the guest switch itself off: a file written just before is there after `vm start`."""
    script = "echo on the work disk > /root/last; echo on the overlay > /etc/last"
    assert home.banger("vm", "exec", web, "--", "sh", "-c", script).returncode == 0
    stopped = home.json("vm", "stop", web)
    assert "how=power-off over SSH" in home.banger("ops", "show", stopped["op"]).stdout
    assert home.json("vm", "show", web)["vm"]["state"] == "stopped"
    assert home.banger("ps", "-q").stdout == ""
    assert home.banger("ps", "-a", "-q").stdout == "web\n"
    assert home.banger("vm", "start", web).returncode == 0
    done = home.banger("vm", "exec", web, "--", "cat", "/root/last", "/etc/last")
    assert done.stdout == "on the work disk\non the overlay\n"


def test_restart_boots_anew(home: Home, web: str) -> None:
    """`vm restart` gives another VMM and another boot, with the same disks."""
    boot = ("vm", "exec", web, "--", "cat", "/proc/sys/kernel/random/boot_id")
    before, first = home.vmm(web), home.banger(*boot).stdout
    done = home.banger("vm", "restart", web)
    assert re.fullmatch(r"web is ready again in .*s\n", done.stdout)
    assert home.vmm(web) != before
    assert len({first, home.banger(*boot).stdout, ""}) == 3


def test_kill_is_at_once_and_start_comes_back(home: Home, web: str) -> None:
    """`vm kill` ends the VMM without asking the guest, and the VM starts again."""
    vmm = home.vmm(web)
    assert re.fullmatch(r"web is off in .*s\n", home.banger("vm", "kill", web).stdout)
    assert not proc.alive(vmm)
    shown = home.json("vm", "show", web)["vm"]
    assert (shown["state"], shown["desired"], shown["reason"]) == ("stopped", "stopped", "killed")
    assert home.banger("vm", "start", web).returncode == 0
    assert home.banger("vm", "exec", web, "--", "true").returncode == 0


def test_show_and_logs(home: Home, web: str) -> None:
    """`vm show` tells what the VM holds and what was done to it; `vm logs` what its console said."""
    shown = home.banger("vm", "show", web).stdout
    for words in (
        "state: +running",
        f"pid: +{home.vmm(web).pid}",
        "process +vm-",
        "port +\\d+ +held",
        "vm.create +done",
    ):
        assert re.search(words, shown), words
    whole = home.banger("vm", "logs", web).stdout
    assert whole.splitlines()
    assert home.banger("vm", "logs", web, "--tail", "1").stdout == whole.splitlines(keepends=True)[-1]


def test_create_without_start(home: Home) -> None:
    """`vm create --no-start` makes disks and no process; `vm start` boots it later."""
    done = home.banger("vm", "create", "cold", "--no-start", "--wait")
    assert re.search(r"^created in .*s$", done.stdout, re.MULTILINE), done.stderr
    shown = home.json("vm", "show", "cold")["vm"]
    assert (shown["state"], shown["pid"], shown["ssh_port"]) == ("stopped", None, None)
    assert home.banger("vm", "start", "cold").returncode == 0
    assert home.banger("vm", "exec", "cold", "--", "hostname").stdout == "cold\n"
    assert home.banger("vm", "delete", "cold").returncode == 0


def test_create_without_wait_returns_at_once(home: Home) -> None:
    """`vm create` prints its operation and returns while it boots; `ops follow` sees it to its good end."""
    done = home.banger("vm", "create", "quick")
    op = ANY_OP.findall(done.stdout)[0]
    assert home.json("ops", "show", op)["op"]["state"] == "running"
    early = home.banger("vm", "exec", "quick", "--", "true")
    assert early.returncode == 4
    assert f"banger ops follow {op}" in early.stderr
    followed = home.banger("ops", "follow", op.removeprefix("op-"))
    assert followed.returncode == 0, followed.stderr
    assert "✓ guest boots" in followed.stdout
    assert re.fullmatch(r"done in .*s", lines(followed.stdout)[-1])
    assert home.banger("vm", "exec", "quick", "--", "true").returncode == 0
    assert home.banger("vm", "delete", "quick").returncode == 0


def test_cancel_during_boot_leaves_nothing() -> None:
    """`ops cancel` while the guest boots undoes everything; who follows the operation learns of it."""
    with Home() as home:
        home.configure("memory_mib = 256\n")
        op = home.json("vm", "create", "never")["op"]
        with home.start("ops", "follow", op, "--json") as follower:
            assert follower.stdout is not None
            for line in follower.stdout:
                event = json.loads(line).get("event", {"type": "", "data": {}})
                if event["type"] == "step.started" and event["data"]["name"] == "ready":
                    break
            cancelled = home.banger("ops", "cancel", op)
            assert (cancelled.returncode, cancelled.stdout) == (0, f"{op} is undone\n"), cancelled.stderr
            last = json.loads(follower.stdout.read().splitlines()[-1])
            assert last["result"]["fate"] == "cancelled"
        assert follower.returncode == 6
        assert home.leftovers() == []
        again = home.json("ops", "cancel", op)
        assert again["error"]["code"] == "state"


# -- commands inside -----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["exec", "ssh"])
def test_words_arrive_exactly(home: Home, web: str, way: str) -> None:
    """Spaces, quotes, newlines, shell characters and Unicode reach the guest as they were typed."""
    done = home.start("vm", way, web, "--", "printf", r"%s\0", *HARD_WORDS)
    out, err = done.communicate(b"")
    assert out.decode().split("\0")[:-1] == list(HARD_WORDS), err


@pytest.mark.parametrize("way", ["exec", "ssh"])
@pytest.mark.parametrize(
    ("script", "code"), [("exit 42", 42), ("kill -TERM $$", 143), ("kill -KILL $$", 137)]
)
def test_exit_codes(home: Home, web: str, way: str, script: str, code: int) -> None:
    """A command's exit code is banger's; a death by signal n is 128+n."""
    assert home.banger("vm", way, web, "--", "sh", "-c", script).returncode == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_reach_the_command(home: Home, web: str, number: signal.Signals, code: int) -> None:
    """A signal to `vm exec` goes to the command inside, which dies of it."""
    with home.start("vm", "exec", web, "--", "sh", "-c", "echo up; exec sleep 100") as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"up\n"
        client.send_signal(number)
        assert client.wait(20) == code
    assert home.banger("vm", "exec", web, "--", "pgrep", "-f", "sleep 100").stdout == ""


def test_large_streams_are_intact(home: Home, web: str) -> None:
    """8 MiB of random bytes through standard input, and back through standard output, are the same."""
    data = random.Random(7).randbytes(8 * MIB)
    client = home.start("vm", "exec", web, "--", "sh", "-c", "tee /root/blob | sha256sum")
    out, err = client.communicate(data, timeout=60)
    assert out.decode().split()[0] == hashlib.sha256(data).hexdigest(), err
    out, err = home.start("vm", "exec", web, "--", "cat", "/root/blob").communicate(b"", timeout=60)
    assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest(), (len(out), err)


def test_standard_error_is_apart(home: Home, web: str) -> None:
    """The command's two streams arrive on banger's two, also caught in JSON."""
    words = ("vm", "exec", web, "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    done = home.banger(*words)
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 3)
    caught = home.banger(*words[:3], "--json", *words[3:])
    assert json.loads(caught.stdout) == {"exit": 3, "stdout": "out\n", "stderr": "err\n"}
    assert caught.returncode == 3


def test_exec_with_a_terminal(home: Home, web: str) -> None:
    """`vm exec -t` gives the command a terminal of our size and our keys; Ctrl-C goes to the command."""
    shell = in_terminal(home, "vm", "exec", "-t", web, "--", "sh", "-c", "stty size; exec sleep 100")
    shell.expect("33 99")
    shell.type(b"\x03")
    assert shell.end() == 130


# -- vm run --------------------------------------------------------------------------------


def test_run_without_rm_keeps_the_vm(home: Home) -> None:
    """`vm run -- CMD` gives the command's code, leaves the VM running and says so."""
    done = home.banger("vm", "run", "--name", "stays", "--", "sh", "-c", "echo only this; exit 7")
    assert (done.stdout, done.returncode) == ("only this\n", 7), done.stderr
    assert "stays still runs" in done.stderr
    assert "stays" in home.banger("ps", "-q").stdout.split()
    assert home.banger("vm", "delete", "stays").returncode == 0


def test_run_in_the_background(home: Home) -> None:
    """`vm run -d` prints the VM's name when it is ready, and nothing else on standard output."""
    done = home.banger("vm", "run", "-d", "--name", "db")
    assert (done.stdout, done.returncode) == ("db\n", 0), done.stderr
    assert home.banger("vm", "exec", "db", "--", "true").returncode == 0
    assert home.banger("vm", "delete", "db").returncode == 0


def test_two_runs_side_by_side(home: Home) -> None:
    """Two `vm run --rm` at once each give their own output and code, and both machines are gone."""
    runs = [
        home.start("vm", "run", "--rm", "--name", f"pair-{code}", "--", "sh", "-c", f"hostname; exit {code}")
        for code in (11, 12)
    ]
    for code, run in zip((11, 12), runs, strict=True):
        out, err = run.communicate(timeout=120)
        assert (out.decode(), run.returncode) == (f"pair-{code}\n", code), err
        assert home.json("vm", "show", f"pair-{code}")["error"]["code"] == "not-found"


# -- deaths --------------------------------------------------------------------------------


def test_a_killed_client_takes_its_machine_along() -> None:
    """After kill -9 of `vm run --rm` while its command runs, the daemon deletes the VM."""
    with Home() as home:
        home.configure("memory_mib = 256\n")
        script = "echo up; exec sleep 100"
        with home.start("vm", "run", "--rm", "--name", "brief", "--", "sh", "-c", script) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == b"up\n"
            vmm = home.vmm("brief")
            client.kill()
        assert proc.wait_gone(vmm, 15)
        deletion = next(op for op in home.json("ops", "list")["ops"] if op["kind"] == "vm.delete")
        assert home.banger("ops", "follow", deletion["id"]).returncode == 0
        assert home.leftovers() == []


def test_a_killed_daemon_leaves_its_guests_alone(home: Home, web: str) -> None:
    """After kill -9 of the daemon the next command starts another, which adopts the same VMM."""
    before, daemon = home.vmm(web), home.daemon()
    assert daemon is not None
    died = proc.identify(daemon)
    assert died is not None
    proc.kill(died)
    assert home.banger("ps", "-q").stdout.split() == [web]
    assert home.vmm(web) == before
    assert home.daemon() not in (None, daemon)
    assert home.banger("vm", "exec", web, "--", "echo", "still here").stdout == "still here\n"


def test_a_killed_vmm_is_noticed(home: Home, web: str) -> None:
    """After kill -9 of QEMU the VM becomes stopped, with a reason, and `vm start` boots it again."""
    # `logs -f` ends when the daemon has recorded the VM's end: the event to wait for.
    with home.start("vm", "logs", "-f", web, stdout=subprocess.DEVNULL) as watcher:
        proc.kill(home.vmm(web))
        assert watcher.wait(30) == 0
    for op in ops_of(home, web, "vm.bury"):
        assert home.banger("ops", "follow", op["id"]).returncode == 0
    shown = home.json("vm", "show", web)["vm"]
    assert (shown["state"], shown["pid"]) == ("stopped", None)
    assert shown["reason"]
    assert home.banger("vm", "start", web).returncode == 0
    assert home.banger("vm", "exec", web, "--", "true").returncode == 0


# -- for programs --------------------------------------------------------------------------


def test_every_command_speaks_json(home: Home, web: str) -> None:
    """Each command given --json prints JSON documents on standard output and nothing else there."""
    op = ops_of(home, web, "vm.create")[0]["id"]
    for line in (
        "ps", "ps -a -q", "vm list", f"vm show {web}", f"vm start {web}", f"vm logs {web} --tail 1",
        f"vm ssh {web}", f"ops list --vm {web}", f"ops show {op}", f"ops follow {op}", "image list",
        "image show debian-12", "kernel list", "kernel show debian-12", "daemon status", "daemon start",
    ):  # fmt: skip
        done = home.banger(*line.split(), "--json")
        documents = [json.loads(document) for document in done.stdout.splitlines()]
        assert documents, line
        assert all(isinstance(document, dict) for document in documents), line
        assert done.returncode == 0, line


def test_nothing_is_left_of_all_this(home: Home, web: str) -> None:
    """When the last VM of this module is deleted, no row, file, process or listener is left."""
    assert home.leftovers() != [], "a VM that runs is seen"
    assert home.banger("vm", "delete", *home.banger("ps", "-aq").stdout.split()).returncode == 0
    assert home.leftovers() == []


def test_a_shell_with_rm_outlives_the_daemon() -> None:
    """The daemon dies and another starts: the VM is tied to that one, and still gone at the end."""
    with Home() as home:
        home.configure("memory_mib = 256\n")
        terminal = in_terminal(home, "vm", "run", "--rm", "--name", "brief")
        terminal.expect("root@brief")
        daemon = home.daemon()
        assert daemon is not None
        died = proc.identify(daemon)
        assert died is not None
        proc.kill(died)
        assert home.banger("ps", "-q").stdout == "brief\n"
        # Longer than the new daemon waits for the clients of the old one.
        time.sleep(GRACE_S + 2)
        assert home.banger("ps", "-q").stdout == "brief\n"
        terminal.type(b"exit\n")
        assert terminal.end() == 0
        assert home.banger("ps", "-aq").stdout == ""
        assert home.leftovers() == []
