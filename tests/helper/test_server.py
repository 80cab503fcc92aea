"""Keys, epochs, the audit log, and a helper that dies: a request has one effect and one answer."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from banger.errors import BangerError, HelperDown, Refused
from banger.helper import store, table
from banger.helper.client import Answer
from banger.helper.pool import Pool
from banger.helper.requests import (
    Ask,
    AuditOf,
    Hello,
    JailSignal,
    Listing,
    NatDisable,
    NatEnable,
    Request,
    SnapshotEnsure,
    SnapshotRemove,
    TapEnsure,
    TapRemove,
)
from banger.helper.store import Store
from banger.helper.verbs import Caller
from banger.helper.wire import Packet
from banger.testing.root_pool import RootPool, recording_host
from tests.helper.conftest import NEEDS_ROOT, audit, raw, recorded

pytestmark = NEEDS_ROOT

NETWORK = "172.30.0.0/24"


def tap(vm: str) -> TapEnsure:
    return TapEnsure(vm=vm, bridge="br-fc", network=NETWORK)


class Later:
    """A question asked in a thread."""

    def __init__(self, ask: Callable[[], object]):
        self.said: object = None
        self._ask = ask
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def result(self) -> object:
        """Wait for the answer, or the error."""
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.said

    def _run(self) -> None:
        try:
            self.said = self._ask()
        except BangerError as error:
            self.said = error


@pytest.fixture
def fresh() -> Iterator[RootPool]:
    """A root helper of this test's own."""
    with RootPool() as running:
        yield running


def running_rows(pool: RootPool) -> int:
    db = store.connect(str(pool.state))
    try:
        return int(db.execute("SELECT count(*) FROM running").fetchone()[0])
    finally:
        db.close()


def wait_for_running(pool: RootPool, count: int) -> None:
    for _ in range(1000):
        if running_rows(pool) == count:
            return
        threading.Event().wait(0.005)
    raise AssertionError("it does not get there")


# -- keys ------------------------------------------------------------------------------------------


def test_h9_a_key_with_other_arguments_is_refused(pool: RootPool, refused: Callable[..., None]) -> None:
    """An old key brings no new effect: with another ask it is refused, whatever differs."""
    pool.ask(tap("keyed"), key="key/1")
    effects = recorded(pool)
    others: list[Ask] = [
        tap("keyed-2"),
        TapEnsure(vm="keyed", bridge="br-fc-x", network=NETWORK),
        TapRemove(vm="keyed"),
    ]
    for other in others:
        with pytest.raises(Refused, match="key") as caught:
            pool.ask(other, key="key/1")
        refused("H9 key with another request", caught.value)
    assert recorded(pool) == effects


def test_a_repeated_request_is_answered_once(pool: RootPool) -> None:
    """The same key with the same ask gives the first answer, and no second effect, also after a restart."""
    first = pool.ask(tap("again"), key="again/1")
    pool.ask(TapRemove(vm="again"))
    effects = recorded(pool)
    assert pool.ask(tap("again"), key="again/1").facts == first.facts
    pool.kill()
    pool.start()
    assert pool.ask(tap("again"), key="again/1").facts == first.facts
    assert recorded(pool) == effects
    assert [line.message for line in audit(pool)[-2:]] == ["Asked again; answered as the first time."] * 2


def test_after_a_boot_of_the_host_nothing_is_taken_for_done(
    fresh: RootPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of another boot are forgotten: what they tell of, the kernel has forgotten, too."""
    fresh.ask(tap("booted"), key="booted/1")
    fresh.kill()
    monkeypatch.setattr(store, "_boot", lambda: "another")
    rebooted = Store(str(fresh.state))
    rebooted.recover()
    rebooted.close()
    for file in fresh.kernel.iterdir():
        file.unlink()
    fresh.start()
    fresh.ask(tap("booted"), key="booted/1")
    assert [thing["kind"] for thing in fresh.ask(Listing()).facts["found"]] == ["bridge", "tap"]


def test_asked_twice_at_once_it_is_done_once(fresh: RootPool) -> None:
    """A second caller with the same key waits for the first one's answer; with another ask it is refused."""
    fresh.hold()
    first = Later(lambda: fresh.ask(tap("twice"), key="twice/1"))
    wait_for_running(fresh, 1)
    second = Later(lambda: fresh.ask(tap("twice"), key="twice/1", epoch=2))
    with pytest.raises(Refused, match="in use for another request"):
        fresh.ask(TapRemove(vm="twice"), key="twice/1", epoch=2)
    fresh.let_go()
    answers = [first.result(), second.result()]
    assert answers[0].facts == answers[1].facts  # type: ignore[attr-defined]
    lines = [(line.verb, line.outcome) for line in audit(fresh)]
    assert sorted(lines) == [("tap.ensure", "ok"), ("tap.ensure", "ok"), ("tap.remove", "refused")]
    with pytest.raises(Refused, match="fenced"):
        fresh.ask(TapRemove(vm="twice"), epoch=1)


def test_a_request_that_failed_may_be_tried_again(pool: RootPool) -> None:
    """A failure is no answer to keep: the same key is carried out again."""
    for _ in range(2):
        with pytest.raises(Refused):
            pool.ask(NatEnable(vm="natted", address="172.30.0.7"), key="nat/1")
    pool.ask(tap("natted"))
    pool.ask(NatEnable(vm="natted", address="172.30.0.7"), key="nat/1")


def test_keys_are_one_owners(rooted: Path) -> None:
    """Another owner's key of the same text is another key, and its epochs are others."""
    kept = make_store(rooted)
    for uid in (1, 2):
        request = make_request(tap(f"vm-{uid}"), op="op-1", key="same")
        admitted = kept.admit(store.entry_of(uid, request), request, reads=False)
        assert admitted.facts is None
        kept.finish(admitted, "ok", "", 0.0, answer=("same", {"n": uid}))
    again = make_request(tap("vm-1"), op="op-1", key="same")
    assert kept.admit(store.entry_of(1, again), again, reads=False).facts == {"n": 1}
    kept.close()


def test_keys_and_epochs_are_kept_up_to_a_number(rooted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest key of an owner goes when there are too many; others' stay."""
    monkeypatch.setattr(store, "MAX_KEYS", 3)
    kept = make_store(rooted)
    for uid, count in ((1, 1), (2, 5)):
        for number in range(count):
            request = make_request(tap(f"vm-{number}"), op=f"op-{number}", key=f"key-{number}")
            admitted = kept.admit(store.entry_of(uid, request), request, reads=False)
            kept.finish(admitted, "ok", "", 0.0, answer=(request.key, {"n": number}))
    rows = kept._db.execute("SELECT uid, key FROM answered ORDER BY id").fetchall()
    assert rows == [(1, "key-0"), (2, "key-2"), (2, "key-3"), (2, "key-4")]
    assert kept._db.execute("SELECT uid, count(*) FROM epochs GROUP BY uid").fetchall() == [(1, 1), (2, 3)]
    kept.close()


# -- epochs ----------------------------------------------------------------------------------------


def test_a_lower_epoch_is_fenced_off(pool: RootPool, refused: Callable[..., None]) -> None:
    """Once a newer claim of an operation was heard, an older one has no effect; other operations do."""
    pool.ask(tap("fenced"), op="op-fence", epoch=7)
    effects = recorded(pool)
    for ask in (TapRemove(vm="fenced"), tap("fenced-2"), Hello(), Listing()):
        with pytest.raises(Refused, match="fenced") as caught:
            pool.ask(ask, op="op-fence", epoch=6)
    assert recorded(pool) == effects
    pool.ask(TapRemove(vm="fenced"), op="op-fence", epoch=7)
    pool.ask(TapRemove(vm="fenced"), op="op-fence2", epoch=1)
    refused("D.5 lower epoch", caught.value)


def test_an_epoch_outlives_the_helper(pool: RootPool) -> None:
    """A restart does not let a fenced-off worker back in."""
    pool.ask(tap("fenced-3"), op="op-fence3", epoch=3)
    pool.kill()
    pool.start()
    with pytest.raises(Refused, match="fenced"):
        pool.ask(TapRemove(vm="fenced-3"), op="op-fence3", epoch=2)


# -- the state machine -----------------------------------------------------------------------------


def test_h10_a_verb_out_of_turn_changes_nothing(fresh: RootPool, refused: Callable[..., None]) -> None:
    """Removing what was never made is done already; what needs something that is not there is refused."""
    for ask in (TapRemove(vm="never"), NatDisable(vm="never"), SnapshotRemove(vm="never")):
        assert fresh.ask(ask).facts == {}
    with pytest.raises(Refused) as caught:
        fresh.ask(NatEnable(vm="never", address="172.30.0.9"))
    refused("H10 verb out of state", caught.value)
    with pytest.raises(BangerError) as signalled:
        fresh.ask(JailSignal(vm="never", signal="KILL"))
    refused("H10 verb out of state", signalled.value)
    facts = fresh.ask(Listing()).facts
    assert facts == {"held": [], "found": []}


# -- the audit log ---------------------------------------------------------------------------------


def test_each_request_that_changes_something_has_one_line(fresh: RootPool) -> None:
    """Done, failed or refused: one line each, in the order of their ends; reading alone leaves none."""
    fresh.ask(tap("lined"), op="op-9", step="make", epoch=2)
    fresh.ask(Hello())
    fresh.ask(Listing())
    with pytest.raises(Refused):
        fresh.ask(NatEnable(vm="other", address="172.30.0.9"), op="op-9")
    null = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(BangerError):
        fresh.ask(SnapshotEnsure(vm="lined"), op="op-9", epoch=2, fds=[null])
    os.close(null)
    lines = [(line.op, line.step, line.epoch, line.verb, line.outcome) for line in audit(fresh)]
    assert lines == [
        ("op-9", "make", 2, "tap.ensure", "ok"),
        ("op-9", "step", 1, "nat.enable", "refused"),
        ("op-9", "step", 2, "snapshot.ensure", "refused"),
    ]


def test_an_owner_sees_the_lines_of_an_operation_of_its_own(pool: RootPool) -> None:
    """`audit` gives what was asked for one operation, and nothing of other owners'."""
    pool.ask(tap("seen"), op="op-seen")
    (line,) = pool.ask(AuditOf(of="op-seen")).facts["lines"]
    assert (line["verb"], line["outcome"], json.loads(line["ask"])["vm"]) == ("tap.ensure", "ok", "seen")
    assert not {"prev", "hash", "uid"} & line.keys()
    keeper = Store(str(pool.state))
    keeper.note(store.Entry(1, 1000, "op-others"), "ok", "")
    keeper.close()
    assert pool.ask(AuditOf(of="op-others")).facts == {"lines": []}


@pytest.mark.parametrize(
    "tamper",
    [
        "UPDATE audit SET outcome = 'ok' WHERE seq = 3",
        "UPDATE audit SET uid = 1 WHERE seq = 5",
        "DELETE FROM audit WHERE seq = 2",
        "UPDATE audit SET hash = prev WHERE seq = 1",
        "UPDATE audit SET seconds = 1.5 WHERE seq = 4",
    ],
)
def test_a_changed_line_is_found(rooted: Path, tamper: str) -> None:
    """The chain of hashes is whole as written, also over a restart, and broken by any change in it."""
    kept = make_store(rooted)
    for number in range(4):
        kept.note(store.Entry(number, 7, ask="x\n\x1b"), "refused", f"line {number}\r\x1b[2J")
    kept.close()
    again = make_store(rooted)
    again.note(store.Entry(9, 7), "ok", "")
    assert again.verify() == (5, None)
    again._db.execute(tamper)
    assert again.verify()[1] is not None
    again.close()


def test_what_is_written_of_a_message_is_plain(rooted: Path) -> None:
    """Escape sequences, line ends and other scripts' marks are escaped; it is cut at a length."""
    kept = make_store(rooted)
    kept.note(store.Entry(1, 7), "failed", "a\n\r\x1b]0;x\x07\x7f\x9b\u202e" + "x" * 5000)
    (message,) = kept._db.execute("SELECT message FROM audit").fetchone()
    kept.close()
    assert message.startswith(r"a\n\r\u001b]0;x\u0007\u007f\u009b\u202exxx")
    assert len(message) == store.MAX_MESSAGE


def test_old_lines_go_when_there_are_too_many(rooted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log has an end, and what is left of it is still a whole chain."""
    monkeypatch.setattr(store, "MAX_LINES", 10)
    monkeypatch.setattr(store, "_TRIM_EVERY", 5)
    kept = make_store(rooted)
    for number in range(100):
        kept.note(store.Entry(number, 7), "refused", "")
    count, bad = kept.verify()
    kept.close()
    assert (count, bad) == (10, None)


def test_refusals_without_end_are_counted(fresh: RootPool) -> None:
    """An owner that only sends refused requests gets a hundred lines a second, the rest in one."""
    for _ in range(1500):
        raw(fresh, b"nonsense")

    def all_counted() -> bool:
        messages = [line.message for line in audit(fresh)]
        more = [int(text.split()[0]) for text in messages if "more requests" in text]
        return bool(more) and len(messages) - len(more) + sum(more) == 1500

    for _ in range(500):
        if all_counted():
            break
        threading.Event().wait(0.01)
    assert all_counted()
    assert len(audit(fresh)) < 1500


def test_a_full_disk_is_an_error_and_no_end(rooted: Path) -> None:
    """A request that cannot be written down is not carried out, and later ones are."""
    kept = make_store(rooted)
    pages = kept._db.execute("PRAGMA page_count").fetchone()[0]
    kept._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(BangerError, match="no space left"):
        [kept.note(store.Entry(number, 7, ask="x" * 4000), "refused", "") for number in range(1000)]
    kept._db.execute("PRAGMA max_page_count = 100000")
    kept.note(store.Entry(1, 7), "ok", "")
    assert kept.verify()[1] is None
    kept.close()


def test_a_full_disk_fails_a_request_and_not_the_helper(rooted: Path) -> None:
    """What the ledger has no room for is not made and told as such; with room again it is."""
    (rooted / "state").mkdir(mode=0o700)
    host = recording_host()
    pool = Pool(str(rooted / "state"), table.verbs, host)
    worker = threading.Thread(target=pool.work)
    worker.start()
    caller = Caller(uid=7, gid=7)

    def ask(number: int) -> str:
        request = make_request(tap(f"vm-{number}"), op="op-1", key=f"key-{number}")
        answer, _ = pool.answer(caller, Packet(msgspec.json.encode(request), (), True))
        return answer.error["code"] if answer.error else "ok"

    try:
        (pages,) = pool._ledger_db.execute("PRAGMA page_count").fetchone()
        pool._ledger_db.execute(f"PRAGMA max_page_count = {pages}")
        full = next(number for number in range(500) if ask(number) == "disk-full")
        assert ask(full) == "disk-full"
        assert len([link for link in host.net.links() if link.kind == "tun"]) == full
        pool._ledger_db.execute("PRAGMA max_page_count = 100000")
        assert ask(full) == "ok"
    finally:
        pool.stop()
        worker.join()
        pool.close()


# -- death -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("at", range(1, 17))
@pytest.mark.parametrize("ask", [tap("dies"), TapRemove(vm="was")], ids=lambda ask: type(ask).__name__)
def test_killed_in_a_handler_it_is_completed_when_asked_again(ask: Ask, at: int) -> None:
    """Killed before or after any call to the kernel, the request asked again ends as if nothing was."""
    with RootPool() as clean:
        clean.ask(tap("was"))
        clean.ask(ask)
        wanted = [thing | {"op": ""} for thing in clean.ask(Listing()).facts["found"]]
    with RootPool() as pool:
        pool.ask(tap("was"))
        pool.kill()
        pool.start("--die-at", str(at))
        with contextlib.suppress(HelperDown):
            pool.ask(ask, key="dying/1")
            pool.kill()  # it has fewer boundaries than that: killed after its answer
        assert pool.wait() == -signal.SIGKILL
        pool.start()
        assert audit(pool)[-1].outcome in ("ok", "interrupted")
        pool.ask(ask, key="dying/1")
        facts = pool.ask(Listing()).facts
        assert [thing | {"op": ""} for thing in facts["found"]] == wanted
        assert {(t["kind"], t["id"]) for t in facts["held"]} == {(t["kind"], t["id"]) for t in wanted}
        assert {thing["state"] for thing in facts["held"]} <= {"held"}
        keeper = Store(str(pool.state))
        assert keeper.verify()[1] is None
        keeper.close()


def test_killed_with_requests_in_the_queue_none_of_them_is_carried_out(fresh: RootPool) -> None:
    """What waited has no effect after the restart, has a line that says so, and its callers are told."""
    fresh.hold()
    asked = [Later(lambda n=n: fresh.ask(tap(f"queued-{n}"), key=f"queued/{n}")) for n in range(4)]  # type: ignore[misc]
    wait_for_running(fresh, 4)
    fresh.kill()
    assert [type(later.result()) for later in asked] == [HelperDown] * 4
    fresh.let_go()
    fresh.start()
    assert fresh.ask(Listing()).facts["found"] == []
    assert [line.outcome for line in audit(fresh)] == ["interrupted"] * 4
    assert running_rows(fresh) == 0
    for number in range(4):
        fresh.ask(tap(f"queued-{number}"), key=f"queued/{number}")
    assert len(fresh.ask(Listing()).facts["found"]) == 5


def test_sigterm_lets_what_is_being_done_end(fresh: RootPool) -> None:
    """A stopped helper finishes the request at hand, answers it, and leaves those that wait undone."""
    fresh.hold()
    asked = Later(lambda: fresh.ask(tap("last"), key="last/1"))
    fresh.wait_held_up()
    waits = Later(lambda: fresh.ask(tap("late"), key="late/1"))
    wait_for_running(fresh, 2)
    fresh.process.terminate()
    threading.Event().wait(0.3)  # for the signal: nothing tells when it is taken
    fresh.let_go()
    assert fresh.wait() == 0
    assert isinstance(asked.result(), Answer)
    assert isinstance(waits.result(), HelperDown)
    fresh.start()
    assert [thing["vm"] for thing in fresh.ask(Listing()).facts["held"]] == ["last", ""]
    assert [line.outcome for line in audit(fresh)] == ["ok", "interrupted"]


def test_two_helpers_never_share_a_directory(fresh: RootPool) -> None:
    """A second helper over the same directories ends with a sentence, and the first goes on."""
    words = [sys.executable, "-I", "-m", "banger.workers.root", "--from-checkout", "--owner", "0"]
    for state, runtime in (
        (fresh.state, fresh.path / "run-2"),
        (fresh.path / "state-2", fresh.socket.parent),
    ):
        second = subprocess.run(
            [*words, "--state", state, "--runtime", runtime],
            capture_output=True,
            check=False,
            text=True,
            timeout=30,
        )
        assert (second.returncode, "Another root helper uses" in second.stderr) == (1, True), second
    fresh.ask(Hello())


# -- the queue -------------------------------------------------------------------------------------


def test_h12_a_row_that_somebody_put_into_the_queue_is_not_run(
    fresh: RootPool, refused: Callable[..., None]
) -> None:
    """Pickles, foreign tasks and made-up numbers in the queue's file do nothing; the next request is done."""
    marker = fresh.path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {marker}",)

    message = [f"id-{marker}", "carry-out", None, None, 0, 0, 0, None, None, None, None, None, None, None]
    with sqlite3.connect(fresh.state / "queue.db") as db:
        for data in (
            pickle.dumps(Evil()),
            b"nonsense",
            b"[]",
            json.dumps(["id", "os.system", *message[2:]]).encode(),
            json.dumps([*message[:6], [123456], *message[7:]]).encode(),
            json.dumps(message).encode(),
        ):
            db.execute("INSERT INTO task (queue, data, priority) VALUES ('root', ?, 1)", (data,))
    db.close()
    fresh.ask(tap("after"))
    assert not marker.exists()
    assert len(fresh.ask(Listing()).facts["found"]) == 2
    refused("H11 row in root's queue", "dropped")


def test_the_queue_is_empty_at_rest(pool: RootPool) -> None:
    """No message stays behind a request."""
    for number in range(5):
        pool.ask(tap(f"rest-{number}"))
    with sqlite3.connect(pool.state / "queue.db") as db:
        counts = [
            db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("task", "schedule", "kv")
        ]
    db.close()
    assert counts == [0, 0, 0]


# -- helpers ---------------------------------------------------------------------------------------


def make_store(rooted: Path) -> Store:
    (rooted / "state").mkdir(mode=0o700, exist_ok=True)
    return Store(str(rooted / "state"))


def make_request(ask: TapEnsure, *, op: str, key: str) -> Request:
    return Request(op=op, step="step", epoch=1, key=key, ask=ask)
