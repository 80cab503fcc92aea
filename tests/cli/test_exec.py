from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.cli.conftest import ARGV, Banger, Terminal
from tests.cli.fake_daemon import FakeDaemon

EXEC = [*ARGV, "vm", "exec", "web"]


@pytest.fixture(autouse=True)
def _without_workspace(daemon: FakeDaemon) -> None:
    daemon.answers["vm.show"] = {"vm": {"workspace": None}}


def test_words_arrive_exactly(banger: Banger, daemon: FakeDaemon) -> None:
    """Words after -- reach the guest as they were typed, ours-looking ones and dashes too."""
    words = ["printf", "%s|", "a b", "", "--json", "-t", "--", "$HOME", "'\"", "é\n"]
    ran = banger("vm", "exec", "web", "--", *words)
    assert ran.stdout == "a b||--json|-t|--|$HOME|'\"|é\n|"
    assert daemon.asked("vm.exec") == [{"vm": "web", "argv": words, "plain": True}]


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 37", 37), ("kill -TERM $$", 143)])
def test_exit_code_passes(banger: Banger, daemon: FakeDaemon, script: str, code: int) -> None:
    """The command's exit code is ours, 128+n when it died of signal n."""
    assert banger("vm", "exec", "web", "--", "sh", "-c", script).returncode == code


def test_streams_stay_apart(banger: Banger, daemon: FakeDaemon) -> None:
    """Standard output and standard error of the command stay apart."""
    ran = banger("vm", "exec", "web", "--", "sh", "-c", "echo out; echo err >&2")
    assert (ran.stdout, ran.stderr) == ("out\n", "err\n")


def test_eight_megabytes_both_ways(daemon: FakeDaemon) -> None:
    """A large input through `cat` comes back whole: neither direction waits for the other."""
    sent = os.urandom(8 << 20)
    ran = subprocess.run([*EXEC, "--", "cat"], input=sent, capture_output=True, check=True, timeout=60)
    assert ran.stdout == sent


def test_stdin_from_a_file_and_closed(banger: Banger, daemon: FakeDaemon, tmp_path: Path) -> None:
    """Standard input may be a regular file, or not be there at all."""
    (tmp_path / "in").write_text("hello")
    script = f"{sys.executable} -m banger_cli.main vm exec web -- cat"
    with (tmp_path / "in").open() as file:
        assert subprocess.check_output(script, shell=True, stdin=file, timeout=30) == b"hello"  # noqa: S602
    assert subprocess.check_output(f"{script} <&-", shell=True, timeout=30) == b""  # noqa: S602


def test_json_catches_the_output(banger: Banger, daemon: FakeDaemon) -> None:
    """--json gives exit code and both streams as one document, with the same exit code."""
    ran = banger("vm", "exec", "--json", "web", "--", "sh", "-c", "cat; echo err >&2; exit 5", stdin="in")
    assert (ran.returncode, json.loads(ran.stdout)) == (5, {"exit": 5, "stdout": "in", "stderr": "err\n"})


def test_failure_in_the_session(banger: Banger, daemon: FakeDaemon) -> None:
    """A failure that comes as a frame is raised as any error is."""
    error = json.dumps({"code": "guest-unreachable", "message": "It went silent."}).encode()
    daemon.answers["vm.exec"] = b'{"result": {}}\nf' + len(error).to_bytes(4, "big") + error
    ran = banger("vm", "exec", "web", "--", "true")
    assert (ran.returncode, ran.stderr) == (9, "banger: It went silent.\n")


def test_daemon_dies_in_the_session(banger: Banger, daemon: FakeDaemon) -> None:
    """A daemon that dies under a command gives 5 and says that the command may still run."""
    daemon.answers["vm.exec"] = b'{"result": {}}\n'
    ran = banger("vm", "exec", "web", "--", "true")
    assert ran.returncode == 5
    assert "the command in the guest may still run" in ran.stderr


def test_reader_that_leaves(daemon: FakeDaemon) -> None:
    """When nobody reads the output any more the command ends quietly with SIGPIPE's code."""
    with subprocess.Popen(
        [*EXEC, "--", "yes"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as client:
        assert client.stdout
        assert client.stderr
        client.stdout.readline()
        client.stdout.close()
        assert (client.wait(20), client.stderr.read()) == (141, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_the_command(daemon: FakeDaemon, number: signal.Signals) -> None:
    """SIGINT, SIGTERM and SIGHUP go to the command; what it makes of them is our exit code."""
    trap = f"trap 'echo caught; exit 9' {number.name.removeprefix('SIG')}; echo up; sleep 20 >&- 2>&- & wait"
    with subprocess.Popen([*EXEC, "--", "sh", "-c", trap], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout
        assert client.stdout.readline() == "up\n"
        client.send_signal(number)
        assert client.stdout.readline() == "caught\n"
        assert client.wait(10) == 9


def test_third_ctrl_c_leaves(daemon: FakeDaemon) -> None:
    """A command that ignores Ctrl-C cannot hold us: the third one leaves with 130."""
    ignore = "trap 'echo no' INT; echo up; while :; do sleep 20 >&- 2>&- & wait; done"
    with subprocess.Popen([*EXEC, "--", "sh", "-c", ignore], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout
        assert client.stdout.readline() == "up\n"
        for _ in range(2):
            client.send_signal(signal.SIGINT)
            assert client.stdout.readline() == "no\n"
        client.send_signal(signal.SIGINT)
        assert client.wait(10) == 130


def test_terminal_is_the_guests(daemon: FakeDaemon, terminals: list[Terminal]) -> None:
    """On a terminal the command has one of our size, and all keys; ours is put back as it was."""
    script = "trap 'echo; stty size; exit 7' INT; stty size; read line; echo \"got $line\"; sleep 20"
    terminal = Terminal([*EXEC, "--", "bash", "-c", script])
    terminals.append(terminal)
    terminal.expect("33 99\r\n")
    terminal.type(b"hello\r")
    terminal.expect("got hello\r\n")
    termios.tcsetwinsize(terminal.master, (20, 60))
    time.sleep(0.3)  # the two ends of a terminal order nothing: the size must arrive before the key
    terminal.type(b"\x03")
    terminal.expect("20 60\r\n")
    assert terminal.end() == 7


def test_terminal_is_restored_by_sigterm(daemon: FakeDaemon, terminals: list[Terminal]) -> None:
    """A `vm exec -t` that is terminated leaves the terminal as it was."""
    terminal = Terminal([*EXEC, "-t", "--", "sh", "-c", "echo up; exec sleep 20"])
    terminals.append(terminal)
    terminal.expect("up")
    terminal.child.send_signal(signal.SIGTERM)
    assert terminal.end() == 143


def test_terminal_is_not_read_unasked(daemon: FakeDaemon, terminals: list[Terminal]) -> None:
    """With -T and without -i the keys on a terminal stay there: the command's input is at its end."""
    terminal = Terminal([*ARGV, "vm", "exec", "-T", "web", "--", "sh", "-c", "cat; echo end"])
    terminals.append(terminal)
    terminal.expect("end")
    assert terminal.end() == 0


def test_hard_words_arrive_exactly(banger: Banger, daemon: FakeDaemon) -> None:
    """Words with line ends and with bytes that are no UTF-8 arrive as they are."""
    words = [b"printf", b"%s|", b"a\nb\n", bytes(range(1, 256)), b""]
    ran = subprocess.run([*EXEC, "--", *words], capture_output=True, check=True, timeout=30)
    assert ran.stdout == b"a\nb\n|" + bytes(range(1, 256)) + b"||"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--", "a" * 100_000, *["b" * 100_000] * 5], "too long"),
        (["-e", "A-B=1", "--", "true"], "no name of a variable"),
        (["-e", "A", "--", "true"], "-e NAME=VALUE"),
        (["--timeout", "soon", "--", "true"], "no time"),
        (["--timeout", "0", "--", "true"], "no time"),
        (["-d", "-t", "--", "true"], "-d does not go with -t"),
    ],
)
def test_nonsense_is_refused(banger: Banger, daemon: FakeDaemon, words: list[str], complaint: str) -> None:
    """What cannot be meant is refused with 2 before anything is asked of the daemon."""
    ran = banger("vm", "exec", "web", *words)
    assert (ran.returncode, daemon.asked("vm.exec")) == (2, [])
    assert complaint in ran.stderr


def test_start_is_passed_on(banger: Banger, daemon: FakeDaemon) -> None:
    """Variables, directory, user and time limit reach the daemon."""
    banger(
        "vm",
        "exec",
        "-e",
        "A=1=2",
        "-e",
        "B=",
        "-w",
        "/srv",
        "-u",
        "me",
        "--timeout",
        "2m",
        "web",
        "--",
        "true",
    )
    given = {"environ": [["A", "1=2"], ["B", ""]], "directory": "/srv", "user": "me", "timeout_s": 120.0}
    assert daemon.asked("vm.exec") == [{"vm": "web", "argv": ["true"], "tty": False, **given}]


def test_ssh(banger: Banger, daemon: FakeDaemon, tmp_path: Path, terminals: list[Terminal]) -> None:
    """`vm ssh` runs ssh, words quoted once, gives its exit code, and after a visit reminds of the VM."""
    fake = tmp_path / "ssh"
    fake.write_text('#!/bin/sh\nprintf "<%s>" "$@"\nexit 12\n')
    fake.chmod(0o755)
    daemon.answers["vm.ssh"] = {"argv": [str(fake), "-i", "key", "root@127.0.0.1"]}
    ran = banger("vm", "ssh", "web", "--", "echo", "a b")
    assert (ran.returncode, ran.stdout) == (12, "<-i><key><root@127.0.0.1><--><echo 'a b'; exit $?>")
    ran = banger("vm", "ssh", "web")
    assert (ran.returncode, ran.stdout) == (12, "<-i><key><root@127.0.0.1>")
    assert "web still runs" in ran.stderr
    terminal = Terminal([*ARGV, "vm", "ssh", "web", "--", "top"])
    terminals.append(terminal)
    terminal.expect("<-t><-i><key><root@127.0.0.1><--><top; exit $?>")
