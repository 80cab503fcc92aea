"""What does not work says so: one sentence, one hint, the op's id, a documented code, and no trace."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import errors, proc
from banger.testing.home import Home

pytestmark = pytest.mark.guest

TMPFS_MIB = 4
"""Room for the log, and none for a VM's disks."""

REFUSED = [
    ("vm create a --vcpu 0", 2, "invalid", "0 is not in the range"),
    ("vm create a --vcpu many", 2, "invalid", "many"),
    ("vm create a --vcpu 65", 2, "invalid", "--vcpu 65 is not possible"),
    ("vm create a --memory 1", 2, "invalid", "--memory 1MiB is not possible"),
    ("vm create a --memory 9999T", 2, "invalid", "is not possible"),
    ("vm create a --memory little", 2, "invalid", "'little' is not a size"),
    ("vm create a --disk-size 0", 2, "invalid", "'0' is not a size"),
    ("vm create Web", 2, "invalid", "'Web' is not a valid VM name"),
    ("vm create -- -a", 2, "invalid", ""),
    ("vm create a..b", 2, "invalid", "'a..b' is not a valid VM name"),
    (f"vm create {'a' * 64}", 2, "invalid", "is not a valid VM name"),
    ("vm create ../../etc", 2, "invalid", "is not a valid VM name"),
    ("vm create a --image nope", 3, "not-found", "There is no image named 'nope'"),
    ("vm create a --image ../x", 2, "invalid", "is not the name of an image"),
    ("vm create a --kernel nope", 3, "not-found", "There is no kernel named 'nope'"),
    ("vm create taken", 4, "exists", "taken"),
    ("vm run --rm --name taken -- true", 4, "exists", "taken"),
    ("vm run --rm -d", 2, "invalid", "-d does not go with --rm"),
    ("vm run --rm", 2, "invalid", "--rm needs a command"),
    ("vm exec taken", 2, "invalid", "The command goes after --"),
    ("vm exec taken -- true", 4, "state", "taken is not running"),
    ("vm ssh taken", 4, "state", "taken is not running"),
    ("vm exec nobody -- true", 3, "not-found", "There is no VM named 'nobody'"),
    *(
        (f"vm {verb} nobody", 3, "not-found", "There is no VM named 'nobody'")
        for verb in ("ssh", "show", "logs", "start", "stop", "restart", "kill", "delete")
    ),
    ("vm start", 2, "invalid", "Missing argument"),
    ("vm frobnicate", 2, "invalid", "No such command 'frobnicate'"),
    ("ops show op-00000000", 3, "not-found", "There is no operation"),
    ("ops show ../..", 2, "invalid", "is not an operation id"),
    ("ops cancel op-00000000", 3, "not-found", "There is no operation"),
    ("image show nope", 3, "not-found", "There is no image named 'nope'"),
    ("image delete nope", 3, "not-found", "There is no image named 'nope'"),
    ("kernel pull nope", 3, "not-found", "No catalog has a kernel named 'nope'"),
]


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    """A banger with one VM, `taken`, that was never started."""
    with Home() as home:
        home.configure("memory_mib = 256\n")
        assert home.banger("vm", "create", "taken", "--no-start", "--wait").returncode == 0
        yield home


@pytest.fixture
def fresh() -> Iterator[Home]:
    """A banger of one test's own."""
    with Home() as home:
        home.configure("memory_mib = 256\n")
        yield home


def told(done: subprocess.CompletedProcess[str], code: int) -> tuple[str, str, str | None]:
    """Check an error's form on standard error; give its sentence, hint and op."""
    found = re.search(
        r"^banger: (.+)\n(?:  \| .*\n)*  hint: (.+)\n(?:  op: (\S+)\n)?\Z", done.stderr, re.MULTILINE
    )
    assert found, done.stderr
    assert done.returncode == code, done.stderr
    return found[1], found[2], found[3]


@pytest.mark.parametrize(("line", "code", "name", "words"), REFUSED, ids=[row[0][:40] for row in REFUSED])
def test_a_request_that_cannot_be(home: Home, line: str, code: int, name: str, words: str) -> None:
    """What cannot be is refused before there is an operation, to people and to programs alike."""
    before = home.json("ops", "list"), home.leftovers()
    done = home.banger(*line.split())
    sentence, _, op = told(done, code)
    assert words in sentence
    assert op is None
    assert done.stdout == ""
    cut = line.split().index("--") if "--" in line.split() else len(line.split())
    as_json = home.banger(*line.split()[:cut], "--json", *line.split()[cut:])
    error = json.loads(as_json.stdout)["error"]
    assert (as_json.returncode, error["code"], error["op"]) == (code, name, None)
    assert words in error["message"]
    assert error["hint"]
    assert as_json.stderr == ""
    assert (home.json("ops", "list"), home.leftovers()) == before


def test_every_code_is_documented(home: Home) -> None:
    """Each exit code that an error can have is a line of `banger help exit-codes`."""
    page = home.banger("help", "exit-codes").stdout
    for error in errors.all_codes().values():
        assert re.search(rf"^  {error.exit_code} +\S", page, re.MULTILINE), error


# -- the host ------------------------------------------------------------------------------


def run_inside(home: Home, prefix: tuple[str, ...], *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line behind a prefix that leads into another mount namespace."""
    return subprocess.run(
        [*prefix, *home.argv(*words)],
        env=home.environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def failed_create(home: Home, prefix: tuple[str, ...] = ()) -> tuple[dict[str, str], str]:
    """Create a VM that cannot become one, told to people and shown to programs; give error and sentence."""
    done = run_inside(home, prefix, "vm", "create", "doomed", "--wait")
    shown = run_inside(home, prefix, "ops", "list", "--json")
    (op,) = (op for op in json.loads(shown.stdout)["ops"] if op["kind"] == "vm.create")
    sentence, hint, named = told(done, errors.all_codes()[op["error"]["code"]].exit_code)
    assert (op["fate"], op["id"]) == ("undone", named)
    return {**op["error"], "hint": hint, "exit": str(done.returncode)}, sentence


def test_qemu_missing(fresh: Home, tmp_path: Path) -> None:
    """Without QEMU the host lacks something: its name, how to get it, code 8, and nothing is left."""
    for program in Path("/usr/bin").iterdir():
        if not program.name.startswith("qemu"):
            (tmp_path / program.name).symlink_to(program)
    fresh.environ["PATH"] = str(tmp_path)
    error, sentence = failed_create(fresh)
    assert (error["code"], error["exit"]) == ("host", "8")
    assert "qemu-system-x86_64 is not installed" in sentence
    assert "apt-get install qemu-system-x86" in error["hint"]
    assert fresh.leftovers() == []


def test_port_taken(fresh: Home, tmp_path: Path) -> None:
    """A program that takes the port between its choice and QEMU's start: said so, and nothing is left."""
    (tmp_path / "qemu-system-x86_64").write_text(
        """#!/usr/bin/python3
import os, re, socket, sys
for word in sys.argv:
    if found := re.search(r"hostfwd=tcp:127\\.0\\.0\\.1:(\\d+)", word):
        thief = socket.create_server(("127.0.0.1", int(found[1])))
        thief.set_inheritable(True)
os.execv("/usr/bin/qemu-system-x86_64", sys.argv)
"""
    )
    (tmp_path / "qemu-system-x86_64").chmod(0o755)
    fresh.environ["PATH"] = f"{tmp_path}:{fresh.environ['PATH']}"
    error, sentence = failed_create(fresh)
    assert (error["code"], error["exit"]) == ("port-taken", "6")
    assert re.fullmatch(r"Another program took port \d+ before doomed could\.", sentence)
    assert fresh.leftovers() == []


def left_inside(home: Home, prefix: tuple[str, ...]) -> str:
    """Print what is left of any VM, seen from where the prefix leads."""
    script = """
from banger import config
from banger.testing.home import leftovers
print(leftovers(config.find_dirs()))
"""
    argv = [*prefix, sys.executable, "-c", script]
    return subprocess.run(argv, env=home.environ, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount")
def test_disk_full(fresh: Home) -> None:
    """On a full disk: said so, code 8, everything undone; with room again the same command works."""
    state = fresh.environ["XDG_STATE_HOME"]
    Path(state).mkdir()
    mount = f"mount -t tmpfs -o size={TMPFS_MIB}M none {state} && echo mounted && exec cat"
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as small:
        assert small.stdout is not None
        assert small.stdout.readline() == b"mounted\n"
        inside = ("nsenter", f"--mount=/proc/{small.pid}/ns/mnt", "--")
        error, sentence = failed_create(fresh, inside)
        assert (error["code"], error["exit"]) == ("disk-full", "8")
        assert "no space left" in sentence
        assert left_inside(fresh, inside) == "[]\n"
        fill = f"cat /dev/zero > {state}/ballast; test -s {state}/ballast"
        subprocess.run([*inside, "sh", "-c", fill], stderr=subprocess.DEVNULL, check=True)
        refused = run_inside(fresh, inside, "vm", "create", "doomed")
        assert told(refused, 8)[0] == "The event log cannot grow: the disk is full."
        assert run_inside(fresh, inside, "ps", "-a").returncode == 0, "looking needs no room"
        subprocess.run([*inside, "mount", "-o", "remount,size=256M", state], check=True)
        done = run_inside(fresh, inside, "vm", "run", "--rm", "--", "echo", "room")
        assert done.stdout == "room\n", done.stderr
        assert left_inside(fresh, inside) == "[]\n"
        for process in fresh.processes():
            proc.kill(process)  # they keep the mount


# -- the daemon ----------------------------------------------------------------------------


def test_unknown_setting(fresh: Home) -> None:
    """A setting that banger does not know is named, with its file, and nothing is started."""
    fresh.configure("memory_mib = 256\nmemroy_mib = 512\n")
    sentence, hint, _ = told(fresh.banger("vm", "create", "a", "--wait"), 2)
    assert "memroy_mib" in sentence
    assert str(fresh.dirs.config / "config.toml") in sentence
    assert hint
    assert fresh.json("ps")["error"]["code"] == "invalid"
    assert fresh.processes() == []
    fresh.configure("memory_mib = 256\n")
    assert fresh.banger("ps").returncode == 0, "corrected, it works"


def test_no_daemon(fresh: Home) -> None:
    """`daemon status` tells that none runs, with code 5, and does not start one."""
    sentence, _, _ = told(fresh.banger("daemon", "status"), 5)
    assert sentence == "No daemon is running."
    assert fresh.processes() == []


def test_a_socket_without_a_daemon(fresh: Home) -> None:
    """A dead daemon's socket file is no obstacle: the next command starts a daemon."""
    fresh.dirs.make()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(fresh.dirs.socket))
    assert told(fresh.banger("daemon", "status"), 5)[0] == "No daemon is running."
    assert fresh.banger("ps", "-q").returncode == 0


def test_a_hung_daemon(fresh: Home) -> None:
    """A daemon that hangs is told apart from none; `daemon stop` ends it; the next command works."""
    assert fresh.banger("daemon", "start").returncode == 0
    daemon = fresh.daemon()
    assert daemon is not None
    os.kill(daemon, signal.SIGSTOP)
    clients = {words: fresh.start(*words.split()) for words in ("ps", "daemon status --json", "daemon stop")}
    said = {words: client.communicate(timeout=60) for words, client in clients.items()}
    codes = {words: client.returncode for words, client in clients.items()}
    assert codes == {"ps": 5, "daemon status --json": 5, "daemon stop": 0}, said
    sentence = "The daemon accepts connections but does not answer."
    assert f"banger: {sentence}\n  hint: " in said["ps"][1].decode()
    error = json.loads(said["daemon status --json"][0])["error"]
    assert (error["code"], error["message"]) == ("daemon-down", sentence)
    assert "`banger daemon stop`" in error["hint"]
    assert said["daemon stop"][0].decode() == f"The daemon has stopped: pid {daemon}\n"
    assert fresh.banger("ps").returncode == 0
    assert fresh.daemon() not in (None, daemon)
