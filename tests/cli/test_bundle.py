"""An operation in a file, from the real daemon and workers to a machine that has neither."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.events import queries
from banger.events.fold import fold_op
from banger.events.log import EventLog
from banger.events.redact import Redactor, private_here
from banger.testing.home import Home
from banger.testing.pipelines import FILES
from tests.cli.conftest import ARGV, Banger

Json = dict[str, Any]

SECRET = "Zq9hunter2"  # noqa: S105  planted
TRAPS = {
    "done": {},
    "undone": {"three/after": "fail"},
    "stuck": {"three/after": "fail", "two/undo-before": "fail"},
}
REPLAY = """
import sys, msgspec
from pathlib import Path
from banger.events import bundle
replay = bundle.replay(bundle.read(Path(sys.argv[1])))
print(msgspec.json.encode(replay.ops[replay.op]).decode())
"""


class Ended:
    """Operations that have ended in each way, and their home."""

    def __init__(self, home: Home, log: EventLog):
        self.home = home
        self.log = log
        self.ops = {fate: self._request(fate, traps) for fate, traps in TRAPS.items()}
        for fate, op in self.ops.items():
            self._wait(op, fate)

    def _request(self, fate: str, traps: dict[str, str]) -> str:
        directory = self.home.dirs.state / fate
        directory.mkdir()
        args = {
            "directory": str(directory),
            "traps": traps,
            "always": True,
            "url": f"https://mallory:{SECRET}@example.org/",
            "note": f"mallory said password={SECRET}",
        }
        return self.log.request(FILES.request(lane=fate, args=args))

    def _wait(self, op: str, fate: str) -> None:
        deadline = time.monotonic() + 30
        while (row := queries.op(self.log, op)) is None or row.state != "ended":
            assert time.monotonic() < deadline, f"{op} has not ended"
            time.sleep(0.01)
        assert row.fate == fate


@pytest.fixture(scope="module")
def ended() -> Iterator[Ended]:
    with Home(pipelines="banger.testing.pipelines") as home:
        home.environ["USER"] = "mallory"
        started = home.banger("daemon", "start")
        assert started.returncode == 0, started.stderr
        log = EventLog(home.dirs.database, home.dirs.work_bell, home.path / "own.fifo", "test")
        yield Ended(home, log)
        log.close()


@pytest.mark.parametrize("fate", list(TRAPS))
def test_another_machine_sees_what_this_one_sees(
    ended: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    """Folded and shown without a daemon, a log or a state, it is the live operation with stand-ins."""
    op, home = ended.ops[fate], ended.home
    made = home.banger("ops", "bundle", op[-6:], cwd=tmp_path)
    file = tmp_path / f"{op}.bundle.json"
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout.startswith(f"{file.name}: ")
    assert all(word in made.stdout for word in ("× $STATE", "× <user>", "× <login>", "× <secret>"))
    assert made.stdout.count("\n") == 1
    assert file.stat().st_mode & 0o777 == 0o600
    text = file.read_text()
    assert not [word for word in (SECRET, "mallory", str(home.path), '"uid"') if word in text]

    monkeypatch.setenv("USER", "mallory")
    redactor = Redactor(private_here(home.dirs))
    live = fold_op(ended.log.read(stream=op))
    nowhere = tmp_path / "nowhere"
    environ = {**os.environ, **{f"XDG_{name}_HOME": str(nowhere) for name in ("STATE", "CACHE", "CONFIG")}}
    environ["XDG_RUNTIME_DIR"] = str(nowhere)
    replayed = _run([sys.executable, "-c", REPLAY, str(file)], environ)
    assert json.loads(replayed) == redactor.redact(json.loads(msgspec.json.encode(live)))
    shown = _run([*ARGV, "ops", "show", "--bundle", str(file), "--json"], environ)
    assert json.loads(shown) == redactor.redact(home.json("ops", "show", op))
    story = _run([*ARGV, "ops", "show", "--bundle", str(file)], environ)
    assert f"state: {fate}" in " ".join(story.split())
    assert not nowhere.exists()


def _run(argv: list[str], environ: dict[str, str]) -> str:
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_the_same_each_time_and_has_its_log_lines(ended: Ended) -> None:
    """Standard output has the document and nothing else; the line about it goes beside it."""
    op = ended.ops["stuck"]
    with ended.home.dirs.log_file.open("a") as file:
        file.write(
            json.dumps({"op": op, "event": "by hand", "key": f"{ended.home.path}/state/banger"}) + "\n"
        )
    first, second = (ended.home.banger("ops", "bundle", op, "--output", "-") for _ in range(2))
    assert first.stdout == second.stdout
    assert first.stderr.startswith("standard output: ")
    document = json.loads(first.stdout)
    assert document["logs"][-1] == {"op": op, "event": "by hand", "key": "$STATE"}
    assert {"banger", "python", "kernel", "machine", "qemu", "schema", "accelerator"} <= set(
        document["about"]
    )


def test_it_overwrites_nothing_unless_told(ended: Ended, tmp_path: Path) -> None:
    """A file that is there stays as it is; with --force it is replaced and is its owner's only."""
    file = tmp_path / "b.json"
    file.write_text("mine")
    file.chmod(0o644)
    words = ("ops", "bundle", ended.ops["done"], "--output", str(file))
    refused = ended.home.banger(*words)
    assert (refused.returncode, file.read_text()) == (4, "mine")
    assert "--force" in refused.stderr
    reply = ended.home.json(*words, "--force")
    assert (reply["path"], reply["op"], file.stat().st_mode & 0o777) == (str(file), ended.ops["done"], 0o600)
    assert reply["events"] == len(json.loads(file.read_text())["events"])
    for bad, code in ((tmp_path / "none" / "b.json", 1), (tmp_path, 4), (Path("/dev/full"), 8)):
        failed = ended.home.banger(
            "ops", "bundle", ended.ops["done"], "--output", str(bad), *["--force"][: code == 8]
        )
        assert failed.returncode == code, failed.stderr
        assert failed.stderr.startswith("banger: ")
    assert Path("/dev/full").is_char_device()


def test_no_daemon_is_asked(ended: Ended, banger: Banger, home: Path) -> None:
    """Where there is no log there is a sentence, and afterwards still neither a log nor a daemon."""
    missing = banger("ops", "bundle", "op-1")
    assert (missing.returncode, missing.stdout) == (3, "")
    assert "There is no event log" in missing.stderr
    assert list(home.iterdir()) == []
    assert banger("ops", "show").returncode == 2
    assert "Missing argument 'OP'" in banger("ops", "show").stderr
    unknown = ended.home.banger("ops", "bundle", "zzzzzz")
    assert (unknown.returncode, "There is no operation zzzzzz." in unknown.stderr) == (3, True)


def test_a_bad_bundle_is_one_sentence(ended: Ended, banger: Banger, tmp_path: Path) -> None:
    """Cut off, of another format, of a newer schema or too large: exit code 2, never a traceback."""
    good = json.loads(ended.home.banger("ops", "bundle", ended.ops["done"], "--output", "-").stdout)
    newer = {**good, "about": {**good["about"], "schema": 99}}
    file = tmp_path / "bad.json"
    for text in (json.dumps(good)[:-100], json.dumps({**good, "format": 2}), json.dumps(newer), "{}", ""):
        file.write_text(text)
        _refused(banger("ops", "show", "--bundle", str(file)))
    with file.open("wb") as sparse:
        sparse.truncate((64 << 20) + 1)
    _refused(banger("ops", "show", "--bundle", str(file)))


def _refused(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("banger: ")
    assert "Traceback" not in done.stderr


def test_a_bundle_cannot_paint_on_the_terminal(ended: Ended, banger: Banger, tmp_path: Path) -> None:
    """Escape sequences in its strings are shown, not sent; an operation in it can be chosen."""
    op = ended.ops["done"]
    file = tmp_path / "b.json"
    text = ended.home.banger("ops", "bundle", op, "--output", "-").stdout
    file.write_text(text.replace("make two", "make \\u001b[31mtwo"))
    shown = banger("ops", "show", "--bundle", str(file), op[-5:])
    assert "make \\x1b[31mtwo" in shown.stdout
    assert "\x1b" not in shown.stdout
    assert banger("ops", "show", "--bundle", str(file), "zzzz").returncode == 3
