"""A damaged log: the daemon does not write to it, says so, and can still be asked."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from banger import config, proc
from banger.errors import LogDamaged
from banger.events import vocabulary as ev
from banger.events.log import EventLog
from banger.rpc import health
from banger.testing.home import Home

Damage = Callable[[Path], object]


def sql(statement: str) -> Damage:
    def damage(database: Path) -> None:
        with sqlite3.connect(database) as db:
            db.execute(statement)

    return damage


def cut_in_half(database: Path) -> None:
    with sqlite3.connect(database) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with database.open("r+b") as file:
        file.truncate(file.seek(0, 2) // 8192 * 4096)


@pytest.fixture
def home() -> Iterator[Home]:
    """A banger with a little history and no daemon."""
    with Home(pipelines="banger.testing.pipelines") as home:
        home.dirs.make()
        log = EventLog(home.dirs.database, home.dirs.work_bell, home.dirs.event_bell, "test")
        for lane in "abc":
            op = log.request(ev.OpRequested(kind="t", args={}, steps=("a",), titles=("a",), lane=lane))
            with log.transaction() as tx:
                tx.append(op, ev.OpEnded(fate="done"), op=op)
        log.close()
        yield home


def events(home: Home) -> list[tuple[Any, ...]]:
    with sqlite3.connect(home.dirs.database) as db:
        return db.execute("SELECT * FROM event").fetchall()


@pytest.mark.parametrize(
    ("damage", "row"),
    [
        (sql("UPDATE event SET data = replace(data, 'done', 'gone') WHERE seq = 4"), 4),
        (sql("DELETE FROM event WHERE seq > 4"), 5),
        (sql("DELETE FROM event WHERE seq = 2"), 2),
        (sql("UPDATE event SET seq = CASE seq WHEN 3 THEN -5 ELSE -3 END WHERE seq IN (3, 5)"), 1),
    ],
    ids=["flipped", "truncated", "cut out", "reordered"],
)
def test_the_daemon_does_not_write_to_a_damaged_log(home: Home, damage: Damage, row: int) -> None:
    """Every command that would start it names the first bad row, and the log stays as it was found."""
    damage(home.dirs.database)
    found = events(home)
    for words in (["vm", "list"], ["vm", "create", "web"], ["daemon", "start"]):
        refused = home.banger(*words)
        assert refused.returncode == 1
        assert f"Row {row} is the first bad one" in refused.stderr
        assert "--read-only" in refused.stderr
    assert home.json("events", "verify")["error"]["code"] == "log-damaged"
    assert home.daemon() is None
    assert events(home) == found


def test_a_damaged_log_can_be_looked_at(home: Home) -> None:
    """The read-only daemon answers what only reads, refuses what writes, and has no workers."""
    sql("UPDATE event SET data = replace(data, 'done', 'gone') WHERE seq = 4")(home.dirs.database)
    assert home.banger("daemon", "start", "--read-only").returncode == 0
    found = events(home)
    assert len(home.json("ops", "list")["ops"]) == 3
    assert home.json("vm", "list") == {"vms": []}
    assert home.json("daemon", "status")["read_only"] is True
    for words in (["vm", "create", "web"], ["state", "rebuild"], ["image", "build", "debian-12"]):
        refused = home.banger(*words)
        assert (refused.returncode, "only reads" in refused.stderr) == (4, True)
    assert len(home.processes()) == 1
    assert events(home) == found
    assert home.banger("daemon", "stop").returncode == 0
    sql("UPDATE event SET data = replace(data, 'gone', 'done') WHERE seq = 4")(home.dirs.database)
    assert home.banger("ps").returncode == 0, "a log that is good again is written to again"


def test_a_file_that_is_no_database_is_a_sentence(home: Home) -> None:
    """Half a file: no traceback, no write, and a hint."""
    cut_in_half(home.dirs.database)
    refused = home.banger("ps")
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert "hint:" in refused.stderr
    assert home.daemon() is None


def test_a_writing_daemon_is_not_taken_for_a_reading_one(home: Home) -> None:
    """--read-only beside a daemon that writes is refused, not ignored."""
    assert home.banger("daemon", "start").returncode == 0
    refused = home.banger("daemon", "start", "--read-only")
    assert (refused.returncode, "A daemon that writes is running" in refused.stderr) == (4, True)


def test_old_damage_in_a_long_log_is_found_beside_the_daemon(
    log: EventLog, dirs: config.Dirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows before the newest are checked after the start; what is found there holds for the next one."""
    monkeypatch.setattr(health, "NEWEST", 3)
    for lane in "abcdefgh":
        log.request(ev.OpRequested(kind="t", args={}, steps=("a",), titles=("a",), lane=lane))
    health.require_good(dirs)
    asyncio.run(health.check_the_rest(dirs))
    sql("UPDATE event SET time_us = time_us + 1 WHERE seq = 2")(dirs.database)
    health.require_good(dirs)
    with pytest.raises(LogDamaged, match="Row 2 "):
        asyncio.run(health.check_the_rest(dirs))
    with pytest.raises(LogDamaged, match="Row 2 "):
        health.require_good(dirs)
    sql("UPDATE event SET time_us = time_us - 1 WHERE seq = 2")(dirs.database)
    health.require_good(dirs)
    assert not dirs.damaged.exists()


def test_a_damaged_log_is_gone_on_with_from_its_good_rows(home: Home) -> None:
    """`state salvage` keeps the damaged file, and banger works again with what is good."""
    sql("UPDATE event SET data = replace(data, 'done', 'gone') WHERE seq = 4")(home.dirs.database)
    found = events(home)
    salvaged = home.json("state", "salvage")
    assert (salvaged["rows"], events(home)) == (3, found[:3])
    with sqlite3.connect(salvaged["kept"]) as db:
        assert db.execute("SELECT * FROM event").fetchall() == found
    ops = home.json("ops", "list")["ops"]
    assert {op["id"] for op in ops} == {found[0][1], found[2][1]}
    assert home.json("events", "verify")["ok"] is True
    busy = home.banger("state", "salvage")
    assert (busy.returncode, "banger daemon stop" in busy.stderr) == (4, True)
    assert home.banger("daemon", "stop").returncode == 0
    assert home.json("state", "salvage")["kept"] is None, "a good log is left alone"


def test_damage_under_a_running_daemon_ends_it(
    log: EventLog, dirs: config.Dirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest rows are looked at again and again, and what is found holds for the next start."""
    monkeypatch.setattr(health, "LIVE_S", 0.05)
    for lane in "abcd":
        log.request(ev.OpRequested(kind="t", args={}, steps=("a",), titles=("a",), lane=lane))

    async def watched() -> None:
        checking = asyncio.create_task(health.keep_checking(dirs))
        await asyncio.sleep(0.3)
        assert not checking.done(), "a good log is left alone"
        sql("UPDATE event SET time_us = time_us + 1 WHERE seq = 3")(dirs.database)
        await checking

    with pytest.raises(LogDamaged, match="Row 3 "):
        asyncio.run(asyncio.wait_for(watched(), 10))
    assert dirs.damaged.exists()


def test_a_daemon_whose_log_is_removed_ends(home: Home) -> None:
    """It does not go on writing to a file without a name: the next command begins with what is there."""
    assert home.banger("daemon", "start").returncode == 0
    first = home.daemon()
    assert first is not None
    process = proc.identify(first)
    assert process is not None
    home.dirs.database.unlink()
    assert proc.wait_gone(process, 10)
    assert home.json("ops", "list") == {"ops": []}


def test_doctor_and_status_name_the_damage(home: Home) -> None:
    """Neither says that all is well while the log is damaged."""
    sql("UPDATE event SET data = replace(data, 'done', 'gone') WHERE seq = 4")(home.dirs.database)
    checks = {check["name"]: check for check in home.json("doctor")["checks"]}
    assert (checks["event log"]["status"], "Row 4 " in checks["event log"]["detail"]) == ("fail", True)
    assert home.banger("daemon", "start", "--read-only").returncode == 0
    assert "damaged: " in home.banger("daemon", "status").stdout
