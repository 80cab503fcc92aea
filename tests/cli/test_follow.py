from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import threading
import time
from typing import Any

import pytest

from banger.errors import BangerError
from banger_cli.follow import settle
from banger_cli.screen import Screen
from banger_cli.stages import Stages
from tests.cli import scenes
from tests.cli.conftest import ARGV, Banger
from tests.cli.fake_daemon import FakeDaemon

Json = dict[str, Any]


def _drawn(*lines: Json) -> str:
    stream = io.StringIO()
    stages = Stages("op-1", Screen(stream))
    for line in lines:
        if "event" in line:
            stages.feed(line["event"])
    stages.close()
    return stream.getvalue()


def test_a_line_per_step() -> None:
    """Each step that ends is one plain line with its time."""
    assert _drawn(*scenes.CREATED) == "  ✓ disks            0.02s\n"


def test_undo_is_shown() -> None:
    """A failed step, what is undone because of it, and each undone step have a line."""
    assert _drawn(*scenes.UNDONE).splitlines() == [
        "  ✓ disks            0.02s",
        "  ✗ boot: mkfs is on fire",
        "  ↩ undoing: mkfs is on fire",
        "  ↩ disks            0.01s",
    ]


def test_nested_operation_is_indented() -> None:
    """The steps of an operation that is waited for are shown, further in, with their progress."""
    drawn = _drawn(
        scenes.requested("image"),
        scenes.event(2, "op.parked", on="op-2", reason="waits for image debian-12"),
        scenes.requested("packages", op="op-2", kind="image.build", image="debian-12"),
        scenes.started(4, 0, "packages", op="op-2"),
        scenes.event(5, "step.progress", "op-2", step=0, message="120 of 200\x1b[2J"),
        scenes.done(6, 0, "packages", 20.0, op="op-2"),
        scenes.done(7, 0, "image", 0.0),
    )
    assert drawn.splitlines() == [
        "  … waits for image debian-12",
        "  › image.build debian-12",
        "      120 of 200\\x1b[2J",
        "    ✓ packages         20.0s",
        "  ✓ image            0.00s",
    ]


def test_retry_is_told() -> None:
    """A step that will be tried again says when."""
    error = {"code": "guest-silent", "message": "No word."}
    event = scenes.event(2, "step.failed", step=0, name="boot", error=error, retry_in_s=0.5)
    assert _drawn(scenes.requested("boot"), event) == "  ✗ boot: No word. (again in 0.50s)\n"


@pytest.mark.parametrize(
    ("fate", "code", "exit_code"),
    [
        ("undone", "program", 6),
        ("undone", "internal", 6),
        ("undone", "disk-full", 8),
        ("undone", "from-the-future", 6),
        ("stuck", "program", 7),
    ],
)
def test_fate_decides_the_exit_code(fate: str, code: str, exit_code: int) -> None:
    """Failed and undone is 6 unless the error says more; stuck is 7 whatever the error was."""
    error = {"code": code, "message": "It broke.", "hint": None}
    with pytest.raises(BangerError, match="It broke") as caught:
        settle(scenes.ended(fate, error)["result"])
    assert (caught.value.exit_code, caught.value.op) == (exit_code, "op-1")


@pytest.mark.parametrize("error", [None, {"code": "cancelled", "message": "The operation was cancelled."}])
def test_a_cancelled_operation_is_told_as_undone(error: Json | None) -> None:
    """Whatever it carries, its end says that it was cancelled and undone."""
    with pytest.raises(BangerError, match="was cancelled and undone") as caught:
        settle(scenes.ended("cancelled", error)["result"])
    assert (caught.value.code, caught.value.exit_code) == ("cancelled", 6)


def test_stuck_tells_what_could_not_be_undone() -> None:
    """Not why it turned back, which is no news, but what the undo failed of, and the ways out."""
    error = {
        "code": "cancelled",
        "message": "The operation was cancelled.",
        "undo_errors": ["No.", "Not permitted."],
    }
    with pytest.raises(BangerError, match="Stuck: Not permitted") as caught:
        settle(scenes.ended("stuck", error)["result"])
    assert "retry-undo" in str(caught.value.hint)


def test_an_operation_that_was_reopened_is_drawn(banger: Banger, daemon: FakeDaemon) -> None:
    """A field that has its default is not in the event: going on forward is one."""
    reopened = scenes.event(2, "op.reopened", lane="l", epoch=3)
    assert "again" in _drawn(
        scenes.requested("again"), reopened, scenes.event(3, "step.done", step=0, seconds=0.1)
    )


def test_follow_survives_any_number_of_daemons(
    banger: Banger, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One daemon after another that has served for a while and dies costs no event and no patience."""
    deaths = iter(range(5))

    def follow(_: Json) -> list[Json | None]:
        if next(deaths, None) is not None:
            time.sleep(0.6)
            return [None]
        return [scenes.ended("done")]

    daemon.answers["ops.follow"] = follow
    assert banger("ops", "follow", "op-1").returncode == 0
    assert len(daemon.asked("ops.follow")) == 6


def test_follow_survives_the_daemon(banger: Banger, daemon: FakeDaemon) -> None:
    """When the daemon dies under a follower, it says so and goes on from the last event, repeating none."""

    def follow(params: Json) -> list[Json | None]:
        after = params["after"]
        lines: list[Json | None] = [
            line for line in scenes.CREATED if line.get("event", {"seq": 99})["seq"] > after
        ]
        return [*lines[:1], None] if after == 0 else lines

    daemon.answers["ops.follow"] = follow
    ran = banger("ops", "follow", "op-1", "--json")
    assert [json.loads(line) for line in ran.stdout.splitlines()] == scenes.CREATED
    assert [params["after"] for params in daemon.asked("ops.follow")] == [0, 1]
    assert ran.stderr == "banger: the daemon went away; following on after event 1\n"
    assert ran.returncode == 0


def test_follow_gives_up(banger: Banger, daemon: FakeDaemon) -> None:
    """A daemon that dies again and again without a word is given up, naming the operation's place."""
    daemon.answers["ops.follow"] = None
    ran = banger("ops", "follow", "op-1")
    assert ran.returncode == 5
    assert len(daemon.asked("ops.follow")) == 3


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_follow_exits_by_fate(banger: Banger, daemon: FakeDaemon, flags: list[str]) -> None:
    """Following an operation that fails gives its exit code, for people and for programs."""
    daemon.answers["ops.follow"] = scenes.UNDONE
    assert banger("ops", "follow", "op-1", *flags).returncode == 6


def test_ctrl_c_detaches(daemon: FakeDaemon) -> None:
    """Ctrl-C leaves a running operation alone, says how to see and how to end it, and gives 130."""
    held = threading.Event()

    def follow(_: Json) -> Any:
        yield scenes.requested("boot")
        yield scenes.done(2, 0, "boot")
        held.wait(10)

    daemon.answers["ops.follow"] = follow
    with subprocess.Popen(
        [*ARGV, "ops", "follow", "op-1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as client:
        assert client.stdout
        assert "boot" in client.stdout.readline()
        client.send_signal(signal.SIGINT)
        _, err = client.communicate(timeout=10)
    held.set()
    assert client.returncode == 130
    assert err == (
        "banger: Detached; the operation goes on.\n"
        "  hint: `banger ops follow op-1` shows it, `banger ops cancel op-1` undoes it.\n"
        "  op: op-1\n"
    )
    assert "ops.cancel" not in dict(daemon.calls)


def test_live_line_ticks(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the running step's time is rewritten in place, and nothing of it stays."""
    monkeypatch.setenv("TERM", "xterm")

    def follow(_: Json) -> Any:
        yield scenes.requested("boot")
        now_us = int(time.clock_gettime(time.CLOCK_BOOTTIME) * 1e6)
        running = scenes.started(2, 0, "boot")
        running["event"]["boot_us"] = now_us
        yield running
        time.sleep(0.5)
        yield scenes.done(3, 0, "boot", 0.5)
        yield scenes.ended()

    daemon.answers["ops.follow"] = follow
    shown = _on_a_terminal([*ARGV, "ops", "follow", "op-1"])
    times = re.findall(r"\r\x1b\[K\x1b\[2m  · boot +(\d\.\d)s\x1b\[0m", shown)
    assert times == sorted(times)
    assert len(set(times)) >= 3
    assert shown.endswith("\r\x1b[K\x1b[32m  ✓ boot             0.50s\x1b[0m\r\ndone in 4.70s\r\n")


def test_no_color(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_COLOR takes the colours away on a terminal."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    daemon.answers["ops.follow"] = scenes.CREATED
    assert "\x1b[3" not in _on_a_terminal([*ARGV, "ops", "follow", "op-1"])


def _on_a_terminal(argv: list[str]) -> str:
    master, slave = pty.openpty()
    with subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave) as client:
        os.close(slave)
        shown = b""
        while True:
            try:
                shown += os.read(master, 4096)
            except OSError:  # EIO: the last process on it has ended
                break
    os.close(master)
    assert client.returncode == 0, shown
    return shown.decode()


def test_cancel_shows_the_undo(banger: Banger, daemon: FakeDaemon) -> None:
    """`ops cancel` waits, shows what is undone, and succeeds when the operation is cancelled."""
    daemon.answers["ops.cancel"] = {"op": "op-1"}
    daemon.answers["ops.follow"] = [*scenes.UNDONE[:-1], scenes.ended("cancelled")]
    ran = banger("ops", "cancel", "op-1")
    assert (ran.returncode, ran.stdout) == (0, "op-1 is undone\n")
    assert "↩ disks" in ran.stderr


def test_cancel_too_late(banger: Banger, daemon: FakeDaemon) -> None:
    """Cancelling an operation that was done meanwhile is an error: what it made is still there."""
    daemon.answers["ops.cancel"] = {"op": "op-1"}
    daemon.answers["ops.follow"] = scenes.CREATED
    assert banger("ops", "cancel", "op-1").returncode == 4
