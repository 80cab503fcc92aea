"""Commands in real guests: where and as whom they start, how they end, and jobs that go on alone."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest

from banger import proc
from banger.testing.home import Home
from tests.cli.conftest import Terminal

pytestmark = pytest.mark.guest

EVERY_BYTE = bytes(range(1, 256))
LONGEST_WORD = 131_071


def sleeping(home: Home, vm: str, seconds: int) -> bool:
    """Tell whether a process of the guest sleeps for so long, given a while to end."""
    script = 'for i in $(seq 50); do pgrep -fx "sleep $0" > /dev/null || exit 1; sleep 0.1; done; exit 0'
    return home.banger("vm", "exec", vm, "--", "sh", "-c", script, str(seconds)).returncode == 0


def test_every_byte_and_long_words(home: Home, web: str) -> None:
    """All bytes but NUL, line ends, the empty word and the longest that Linux takes arrive as they are."""
    words = [EVERY_BYTE, b"", b"a\nb\n", b"-n", b"x" * (LONGEST_WORD - 1)]
    asked: list[str | bytes] = [*home.argv("vm", "exec", web, "--", "printf", r"%s\0"), *words]
    done = subprocess.run(
        asked, env=home.environ, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=True
    )
    assert done.stdout.split(b"\0")[:-1] == words


def test_input_after_a_long_command_is_the_commands_own(home: Home, web: str) -> None:
    """A long command takes not a byte of standard input with it."""
    done = home.banger(
        "vm", "exec", web, "--", "sh", "-c", "echo $#; cat", "sh", *["two words"] * 5000, input="in\n"
    )
    assert done.stdout == "5000\nin\n"


def test_where_and_as_whom(home: Home, web: str) -> None:
    """-e, -w and -u set variables, the directory and the user; what is not there gives 126 and a sentence."""
    script = 'echo "$A|$B"; pwd; id -un; echo $HOME'
    words = ("-e", "A=it's", "-e", "B=", "-w", "/tmp", "-u", "nobody", web, "--", "sh", "-c", script)
    assert home.banger("vm", "exec", *words).stdout == "it's|\n/tmp\nnobody\n/nonexistent\n"
    for wrong, said in ((("-w", "/no such"), "/no such"), (("-u", "no'body"), "no user no'body")):
        done = home.banger("vm", "exec", *wrong, web, "--", "true")
        assert (done.returncode, done.stdout) == (126, "")
        assert said in done.stderr


def test_a_timeout_ends_the_whole_group(home: Home, web: str) -> None:
    """--timeout ends the command and its children, also those that ignore SIGTERM, with 124."""
    script = "trap '' TERM; sleep 71 & sleep 71"
    began = time.monotonic()
    assert home.banger("vm", "exec", "--timeout", "1", web, "--", "sh", "-c", script).returncode == 124
    assert time.monotonic() - began < 30
    assert not sleeping(home, web, 71)


def test_a_cut_client_leaves_nothing_running(home: Home, web: str) -> None:
    """When the client is killed, what it ran gets SIGHUP, children too; what an earlier one left stays."""
    assert home.banger("vm", "exec", web, "--", "sh", "-c", "sleep 73 > /dev/null 2>&1 &").returncode == 0
    with home.start("vm", "exec", web, "--", "sh", "-c", "sleep 72 & echo up; wait") as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"up\n"
        client.kill()
    assert not sleeping(home, web, 72)
    assert home.banger("vm", "exec", web, "--", "pkill", "-fx", "sleep 73").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_group(home: Home, web: str, number: signal.Signals) -> None:
    """A signal reaches the command's children too, as Ctrl-C on a terminal would."""
    with home.start("vm", "exec", web, "--", "sh", "-c", "sh -c 'echo up; exec sleep 74'; exit 9") as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"up\n"
        client.send_signal(number)
        assert client.wait(20) in (128 + number, 9)
    assert not sleeping(home, web, 74)


def test_a_terminal_when_there_is_one(home: Home, web: str) -> None:
    """On a terminal the command has one without being asked, and with -T it has none."""
    own = [f"{name}={value}" for name, value in home.environ.items() if name.startswith("XDG_")]
    for option, told in (((), "yes"), (("-T",), "no")):
        words = home.argv("vm", "exec", *option, web, "--", "sh", "-c", "[ -t 0 ] && echo yes || echo no")
        terminal = Terminal(["env", *own, *words])
        terminal.expect(told)
        assert terminal.end() == 0


def test_a_job_outlives_client_and_daemon(home: Home, web: str) -> None:
    """A job goes on when its client has left and the daemon is killed; its log and exit code are kept."""
    script = "echo begins; until [ -e /tmp/go ]; do sleep 0.1; done; echo ends >&2; exit 7"
    job = home.banger("vm", "exec", "-d", web, "--", "sh", "-c", script).stdout.strip()
    daemon = proc.identify(home.daemon() or 0)
    assert daemon is not None
    proc.kill(daemon)
    listed = home.json("vm", "jobs", web)["jobs"]
    assert [(each["id"], each["exit"]) for each in listed] == [(job, None)]
    with home.start("vm", "attach", web, job) as attached:
        assert attached.stdout is not None
        assert attached.stdout.readline() == b"begins\n"
        assert home.banger("vm", "exec", web, "--", "touch", "/tmp/go").returncode == 0
        assert attached.stdout.read() == b"ends\n"
        assert attached.wait(20) == 7
    assert home.banger("vm", "wait", web, job).returncode == 7
    assert home.banger("vm", "logs", web, "--job", job).stdout == "begins\nends\n"
    assert job in home.banger("vm", "jobs", web).stdout


def test_jobs_end_when_they_must(home: Home, web: str) -> None:
    """`kill-job` ends a job and its children, --timeout too with 124; there is no other job."""
    job = home.banger("vm", "exec", "-d", web, "--", "sh", "-c", "sleep 75 & wait").stdout.strip()
    assert home.banger("vm", "kill-job", web, job).returncode == 0
    assert home.banger("vm", "wait", web, job).returncode == 143
    assert not sleeping(home, web, 75)
    late = home.banger("vm", "exec", "-d", "--timeout", "0.5", web, "--", "sleep", "76").stdout.strip()
    assert home.banger("vm", "wait", web, late).returncode == 124
    assert home.json("vm", "wait", web, "job-none")["error"]["code"] == "not-found"


def test_a_job_s_log_is_bounded(home: Home, web: str) -> None:
    """Of a job that writes without end the newest is kept, in less than 17 MiB."""
    script = "yes 0123456789abcdef | head -c 30000000; echo last"
    job = home.banger("vm", "exec", "-d", web, "--", "sh", "-c", script).stdout.strip()
    assert home.banger("vm", "wait", web, job).returncode == 0
    log = home.banger("vm", "logs", web, "--job", job).stdout
    assert log.endswith("last\n")
    assert 8 << 20 < len(log) + (8 << 20) <= 17 << 20
