from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import string
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.config import Dirs
from banger.errors import InvalidRequest, LogDamaged, NotFound
from banger.events import bundle
from banger.events import vocabulary as ev
from banger.events.fold import fold_op, fold_vm
from banger.events.log import EventLog
from banger.events.redact import Private, Redactor, common_words, private_here
from banger.model import Resource, VmSpec

Json = dict[str, Any]

PRIVATE = Private(
    paths=(
        ("/home/anna", "~"),
        ("/home/anna/.local/state/banger", "$STATE"),
        ("/home/anna/.cache/banger", "$CACHE"),
        ("/run/user/1000/banger", "$RUNTIME"),
        ("/run/user/1000", "/run/user/<uid>"),
    ),
    users=("anna",),
    hosts=("laptop.example.org", "laptop"),
)


def redacted(value: Any) -> Any:
    return Redactor(PRIVATE).redact(value)


@pytest.mark.parametrize(
    ("given_", "kept"),
    [
        ("/home/anna/src: not there", "~/src: not there"),
        ("cannot open '/home/anna'.", "cannot open '~'."),
        ("file:///home/anna/x -I/home/anna/inc", "file://~/x -I~/inc"),
        ("/home/annabel /home/anna-old /home/anna.bak", "/home/annabel /home/<user>-old /home/<user>.bak"),
        ("/mnt/home/anna", "/mnt/home/<user>"),
        ("/home/anna/.local/state/banger/vms/vm-1", "$STATE/vms/vm-1"),
        ("/home/anna/.local/state/banger2", "~/.local/state/banger2"),
        ("/run/user/1000/banger/a.sock /run/user/1000/bus", "$RUNTIME/a.sock /run/user/<uid>/bus"),
        ("anna@laptop: Anna, annabel, x_anna", "<user>@<host>: <user>, annabel, x_<user>"),
        ("laptop.example.org laptop laptops", "<host> <host> laptops"),
        ("GET https://me:pw@host/x", "GET https://<login>@host/x"),
        ("https://ghp_abc@host:8/a@b", "https://<login>@host:8/a@b"),
        ("password=hunter2 ok", "password=<secret> ok"),
        ("DB_PASSWD: hunter2", "DB_PASSWD: <secret>"),
        ('{"api_token": "a \\"b", "n": 1}', '{"api_token": <secret>, "n": 1}'),
        ('{\\"secret\\": \\"a b\\", \\"n\\": 1}', '{\\"secret\\": <secret>, \\"n\\": 1}'),
        ("/x?access_token=abc", "/x?access_token=<secret>"),
        ("curl --password hunter2 /x", "curl --password <secret> /x"),
        ("['--token', 'a b', 'x']", "['--token', <secret>, 'x']"),
        ("Authorization: Digest a=b, c=d\nnext", "Authorization: <secret>\nnext"),
        ("token: Bearer abc", "token: <secret>"),
        ("token: --password abc", "token: <secret> <secret>"),
        ("secret=a;password: abc", "secret=<secret> <secret>"),
        ("bearer abc.def-ghi, then", "bearer <secret> then"),
        ("host_key=abc public_key=abc key_id=abc", "host_key=<secret> public_key=abc key_id=abc"),
        ("a ssh-ed25519 AAAAC3Nz/+= anna@laptop b", "a <key> b"),
        ("x\n-----BEGIN EC PRIVATE KEY-----\nMIIE\n-----END EC PRIVATE KEY-----\ny", "x\n<key>\ny"),
        ("x -----BEGIN PRIVATE KEY-----\nMIIE and the rest is cut", "x <key>"),
        ("of it:\nMIIE=\nabc\n-----END PRIVATE KEY----- y", "of it:<key> y"),
        ("op-27f3k9qd took port 4022 of vm-27f3k9qd", "op-27f3k9qd took port 4022 of vm-27f3k9qd"),
        ("", ""),
    ],
)  # fmt: skip
def test_what_a_string_becomes(given_: str, kept: str) -> None:
    """Directories, names and secrets have stand-ins; everything else stays to the letter."""
    assert redacted(given_) == kept


def test_what_a_value_becomes() -> None:
    """Keys of objects count as names of secrets and are redacted too; numbers, ids and shapes stay."""
    assert redacted(
        {
            "seq": 7,
            "actor": {"uid": 1000, "pid": 12},
            "Password": "x",
            "token": ["a", {"b": 5, "c": None}],
            "/home/anna": [True, "anna"],
            "argv": ["login", "--api-key", "abc", "anna"],
            "key": "web",
        }
    ) == {
        "seq": 7,
        "actor": {"pid": 12},
        "Password": "<secret>",
        "token": ["<secret>", {"b": "<secret>", "c": None}],
        "~": [True, "<user>"],
        "argv": ["login", "--api-key", "<secret>", "<user>"],
        "key": "web",
    }


def test_names_that_say_nothing_stay() -> None:
    """A host named `vm` or a user named `root` or `running` would make a bundle unreadable for no gain."""
    redactor = Redactor(Private(users=("root", "running"), hosts=("vm",)))
    event = {"type": "vm.desired", "state": "running", "title": "mount /root"}
    assert redactor.redact(event) == event
    assert {"undone", "kernel", "desired"} <= common_words()
    assert not redactor.counts


@pytest.mark.parametrize(
    "piece",
    [
        *("a", "password", "password ", "password=a;", "token: ", 'token="', "--token ", "cookie: ", "a-key"),
        *("://", "ssh-", "ssh-a ", "AAAA", "bearer ", "-", "-----BEGIN x-----", "-----END x-----", "abc\n"),
        *("\\", '"', "/home/anna", "anna ", " "),
    ],
)
def test_a_long_string_takes_its_length(piece: str) -> None:
    """No pattern runs wild on a megabyte: were one quadratic, this would not end within the time-out."""
    redacted(piece * (1_000_000 // len(piece)))


SECRETS = st.text(string.ascii_letters + string.digits, min_size=8, max_size=30).map(
    lambda text: f"Zq9{text}"
)
CONTEXTS = (
    "password={}", "token: '{}'", '"secret": "{}"', "--credential {}", "x_key = {}", "PASSWD => {}",
    "https://{}@h/", "ftp://u:{}@h", "Authorization: Basic {}", "Proxy-Authorization: {} {}", "bearer {}",
    "-----BEGIN A KEY-----\n{}\n-----END A KEY-----", "-----BEGIN A KEY-----\n{}", "ssh-rsa AAAA{} me@here",
    "{}\n-----END A KEY-----", "Cookie: a=1; b={}", "https://h/?api_key={}",
)  # fmt: skip


@st.composite
def planted(draw: st.DrawFn) -> tuple[str, Any]:
    """Draw a secret, and a document that has it somewhere, in one of the forms that secrets have."""
    secret = draw(SECRETS)
    around = st.text(st.characters(exclude_characters="\"'\\", exclude_categories=["Cs"]), max_size=20)
    before, after = draw(around), draw(around)
    text = f"{before} {draw(st.sampled_from(CONTEXTS)).format(secret, secret)} {after}"
    nested = json.dumps({"error": text})
    leaf = draw(
        st.sampled_from(
            [text, nested, {"auth_token": secret}, {"password": {before: [secret]}}, ["--token", secret]]
        )
    )
    for _ in range(draw(st.integers(0, 3))):
        leaf = draw(st.sampled_from([{"data": leaf}, [1, leaf], {text: None, "logs": [leaf]}]))
    return secret, leaf


@given(planted())
def test_no_secret_is_left(drawn: tuple[str, Any]) -> None:
    """Whatever stands around it, and however deep it is, a secret is nowhere in what is given out."""
    secret, document = drawn
    assert secret not in json.dumps(redacted(document))


@given(
    st.text(max_size=30), st.sampled_from(["anna", "laptop", "/home/anna/x", "ANNA", "laptop.example.org"])
)
def test_no_name_is_left(around: str, name: str) -> None:
    """Names of the user and the host, as words or in paths, are gone; doing it twice changes nothing."""
    result = redacted(f"{around} {name} {around}")
    assert f" {name} " not in result
    assert "/home/anna/" not in result
    assert redacted(f"{around} {name} {around}") == result


# -- bundles --------------------------------------------------------------------------------


def request(vm: str | None = None, **args: Any) -> ev.OpRequested:
    return ev.OpRequested(
        kind="test", args=args, steps=("a",), titles=("make a",), lane="l", vm=vm, name="web"
    )


SPEC = VmSpec(name="web", image="i", kernel="k", vcpu=1, memory_mib=1, disk_mib=1)


@pytest.fixture
def story(log: EventLog) -> str:
    """An operation on a VM that waited for another one and failed, among things it has no part in."""
    log.request(request(), ("vm-other", ev.VmReserved(spec=SPEC, host="h")))
    with log.transaction() as tx:
        tx.append("vm-1", ev.VmReserved(spec=msgspec.structs.replace(SPEC, name="db"), host="laptop"))
        op, child = tx.mint("op"), "op-child000"
        tx.append(op, request("vm-1", directory="/home/anna/x", **{"api-token": "hunter2"}), op=op)
        tx.append(child, request(), op=child)
        tx.append(op, ev.OpParked(on=child, reason="image"), op=op)
        tx.append(child, ev.OpEnded(fate="done"), op=child)
        tx.append(op, ev.StepStarted(step=0, name="a", title="make a", attempt=1, deadline_s=5), op=op)
        file = Resource(kind="file", id="/home/anna/x/a")
        tx.append(op, ev.ResourceIntended(resource=file, vm="vm-1", step="a"), op=op)
        error = {"message": "anna may not open /home/anna/x/a", "hint": None}
        tx.append(op, ev.StepFailed(step=0, name="a", error=error), op=op)
        tx.append(op, ev.OpEnded(fate="stuck", error=error), op=op)
        tx.append("vm-1", ev.VmDesired(state="absent"))
        tx.append("op-later000", request("vm-1"), op="op-later000")
    return op


def made(dirs: Dirs, op: str, redactor: Redactor | None = None) -> Json:
    return bundle.make(dirs, op, {"banger": "1"}, redactor or Redactor(PRIVATE))


def builtins(value: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))


def test_a_bundle_folds_to_what_the_log_folds_to(log: EventLog, dirs: Dirs, story: str) -> None:
    """Each operation, and the VM as it was when the operation ended, with their strings redacted."""
    document = json.loads(json.dumps(made(dirs, story)))
    replay = bundle.replay(document)
    assert set(replay.ops) == {story, "op-child000"}
    for op, folded in replay.ops.items():
        assert builtins(folded) == redacted(builtins(fold_op(log.read(stream=op))))
    end = max(row.seq for row in log.read(stream=story))
    vm = fold_vm(row for row in log.read(stream="vm-1") if row.seq <= end)
    assert builtins(replay.vm) == redacted(builtins(vm))
    assert replay.vm is not None
    assert (replay.vm.desired, replay.vm.host) == ("running", "<host>")


def test_a_bundle_has_what_belongs_to_it_and_no_more(log: EventLog, dirs: Dirs, story: str) -> None:
    """Every event of its operations and of its VM until then, in order, with ids and numbers as they are."""
    document = made(dirs, story)
    wanted = [row for row in log.read() if row.stream in (story, "op-child000", "vm-1")][:-1]
    assert [event["seq"] for event in document["events"]] == [row.seq for row in wanted]
    assert [event["stream"] for event in document["events"]] == [row.stream for row in wanted]
    assert document["about"]["schema"] == ev.SCHEMA
    assert not {"anna", "laptop", "hunter2", "uid"} & set(json.dumps(document).replace("/", '"').split('"'))
    assert made(dirs, story) == document


def test_shortened_ids(log: EventLog, dirs: Dirs, story: str) -> None:
    """An id is found by a beginning or end, with or without op-; else the sentence is that of the daemon."""
    for short in (story, story[3:], story[-7:], "op-chi", "D000"):
        assert made(dirs, short)["op"] in (story, "op-child000")
    for short, error in (
        ("zzz", NotFound),
        ("op-", InvalidRequest),
        ("000", InvalidRequest),
        ("%", InvalidRequest),
    ):
        with pytest.raises(error):
            made(dirs, short)


def test_an_event_of_an_older_schema_is_read_as_the_log_reads_it(
    log: EventLog, dirs: Dirs, story: str
) -> None:
    """Rows stay as they were written, and are brought to today's shape when they are decoded."""
    log.db.execute(
        "UPDATE event SET schema = 1, type = 'op.claimed', data ="
        """ '{"type":"op.claimed","epoch":3,"worker":{"pid":1,"start_ticks":2}}'"""
        " WHERE stream = ? AND type = 'step.failed'",
        (story,),
    )
    document = made(dirs, story)
    assert 1 in {event["schema"] for event in document["events"]}
    assert bundle.replay(document).ops[story].epoch == 3


def test_without_a_log_nothing_is_made(dirs: Dirs) -> None:
    """A missing log is a sentence and stays missing; so does one that is no database."""
    before = sorted(dirs.state.rglob("*"))
    with pytest.raises(NotFound):
        made(dirs, "op-1")
    assert sorted(dirs.state.rglob("*")) == before
    dirs.database.write_bytes(b"no database" * 999)
    with pytest.raises(LogDamaged):
        made(dirs, "op-1")


def test_what_is_left_of_a_damaged_log(log: EventLog, dirs: Dirs, story: str) -> None:
    """With an index destroyed the rows are still found; a row that is no JSON any more is left out."""
    whole = made(dirs, story)
    log.db.execute("UPDATE event SET data = '{' WHERE seq = 2")
    log.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    index = "SELECT rootpage FROM sqlite_master WHERE type = 'index' AND sql LIKE '%stream%'"
    page = log.db.execute(index).fetchone()[0]
    size = log.db.execute("PRAGMA page_size").fetchone()[0]
    with dirs.database.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    with pytest.raises(sqlite3.DatabaseError), sqlite3.connect(dirs.database) as db:
        db.execute("SELECT * FROM event WHERE stream = ?", (story,)).fetchall()
    document = made(dirs, story)
    assert document["about"]["damage"]
    assert [event["seq"] for event in document["events"]] == [
        event["seq"] for event in whole["events"] if event["seq"] != 2
    ]


def test_a_log_on_a_read_only_medium(log: EventLog, dirs: Dirs, story: str) -> None:
    """Who may read a log and write nothing beside it makes the same bundle."""
    document = made(dirs, story)
    log.peewee.close()
    assert [path.name for path in dirs.state.glob("banger.db-*")] == []
    for path in (dirs.database, dirs.state, dirs.state.parent, dirs.state.parent.parent):
        path.chmod(0o555)
    child = os.fork()  # root may write anywhere, so somebody else has to try
    if child == 0:
        with contextlib.suppress(BaseException):
            if os.getuid() == 0:
                os.setresuid(65534, 65534, 65534)
            assert not os.access(dirs.state, os.W_OK)
            os._exit(0 if made(dirs, story) == document else 1)
        os._exit(2)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for path in (dirs.state.parent.parent, dirs.state.parent, dirs.state):
        path.chmod(0o755)
    assert status == 0


def test_its_log_lines(log: EventLog, dirs: Dirs, story: str) -> None:
    """Those of its operations are there, redacted, from rotated files too, the oldest first."""

    def line(op: str, number: int) -> str:
        return json.dumps({"op": op, "event": f"/home/anna/{number}", "token": "t"}) + "\n"

    dirs.log_file.with_name("log.jsonl.2").write_text(line(story, 1))
    dirs.log_file.with_name("log.jsonl.1").write_text(line("op-child000", 2) + "no json " + story + "\n[1]\n")
    dirs.log_file.write_text(
        line("op-other000", 3) + line(story, 4) + f'{{"vm": "{story}"}}\n{{"op": "{story}"'
    )
    document = made(dirs, story)
    assert [(each["event"], each["token"]) for each in document["logs"]] == [
        (f"~/{number}", "<secret>") for number in (1, 2, 4)
    ]
    assert document["logs_left_out"] == 0


@pytest.mark.parametrize(("size", "kept"), [(10, bundle.MAX_LOG_LINES), (100_000, 41)])
def test_log_lines_are_bounded(log: EventLog, dirs: Dirs, story: str, size: int, kept: int) -> None:
    """The newest are kept, by number and by bytes, and how many are not is said."""
    lines = bundle.MAX_LOG_LINES + 50 if size == 10 else 60
    with dirs.log_file.open("w") as file:
        file.writelines(json.dumps({"op": story, "n": n, "event": "x" * size}) + "\n" for n in range(lines))
    document = made(dirs, story)
    assert [line["n"] for line in document["logs"]] == list(range(lines - kept, lines))
    assert document["logs_left_out"] == lines - kept


def test_this_machine_is_in_no_bundle(log: EventLog, dirs: Dirs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of this user and its directories are found, also where a directory is a link."""
    link = dirs.state.parent / "home"
    link.symlink_to(dirs.state.parent, target_is_directory=True)
    monkeypatch.setenv("HOME", str(link))
    monkeypatch.setenv("USER", "mallory")
    op = log.request(request(a=str(dirs.state / "x"), b=f"{link}/x", c="by mallory", d=f"{link.resolve()}/y"))
    args = made(dirs, op, Redactor(private_here(dirs)))["events"][0]["data"]["args"]
    assert args == {"a": "$STATE/x", "b": "~/x", "c": "by <user>", "d": "~/y"}


# -- files from elsewhere -------------------------------------------------------------------


def test_no_file_is_a_traceback(tmp_path: Path) -> None:
    """What is missing, cut off, too large or no bundle is refused with a sentence."""
    file = tmp_path / "b.json"
    with pytest.raises(NotFound):
        bundle.read(file)
    with pytest.raises(InvalidRequest):
        bundle.read(tmp_path)
    for content in (b"", b'{"format": 1, "ev', b"[1]", b"\xff\xfe", b"[" * 1_000_000, b'"\\ud800"'):
        file.write_bytes(content)
        with pytest.raises(InvalidRequest):
            bundle.read(file)
    with file.open("wb") as sparse:
        sparse.truncate(bundle.MAX_FILE_BYTES + 1)
    with pytest.raises(InvalidRequest, match="too large"):
        bundle.read(file)


def test_a_bundle_of_another_version_is_named(log: EventLog, dirs: Dirs, story: str) -> None:
    """Another format, and events of a schema that is not known yet, are refused as what they are."""
    document = made(dirs, story)
    with pytest.raises(InvalidRequest, match="format 2"):
        bundle.replay(document | {"format": 2})
    newer = document["events"][-1] | {"schema": ev.SCHEMA + 1, "type": "op.dreamt"}
    with pytest.raises(InvalidRequest, match=f"schema {ev.SCHEMA + 1}"):
        bundle.replay(document | {"events": [*document["events"], newer]})
    with pytest.raises(InvalidRequest, match=f"schema {ev.SCHEMA + 1}"):
        bundle.replay(document | {"about": {"schema": ev.SCHEMA + 1}})


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("op.requested"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_a_forged_bundle_is_refused_or_shown(data: st.DataObject) -> None:
    """Whatever one value of a good bundle is replaced by, it is replayed and shown, or refused in words."""
    from banger.rpc import views
    from banger_cli.ops import _story

    document: Json = json.loads(GOOD)
    place: Any = document
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        place = inner
    place[key] = data.draw(JUNK)
    try:
        replay = bundle.replay(document)
    except InvalidRequest:
        return
    shown = [views.op(replay.summary(op), folded) for op, folded in replay.ops.items()]
    assert all(list(_story(op)) for op in shown)


def _event(seq: int, kind: str, /, **data: Any) -> Json:
    return {
        "seq": seq, "stream": "op-1", "version": seq, "op": "op-1", "type": kind, "schema": ev.SCHEMA,
        "data": {"type": kind, **data}, "actor": {"pid": 1, "role": "r"}, "time_us": seq, "boot_us": seq,
    }  # fmt: skip


ERROR = {"code": "x", "message": "no", "hint": "none", "op": None}
GOOD = json.dumps(
    {
        "format": 1,
        "op": "op-1",
        "about": {"schema": ev.SCHEMA},
        "events": [
            _event(1, "op.requested", kind="t", args={}, steps=["a"], titles=["A"], lane="l"),
            _event(2, "step.started", step=0, name="a", title="A", attempt=1, deadline_s=1.0),
            _event(3, "resource.intended", resource={"kind": "file", "id": "x"}, step="a"),
            _event(4, "step.failed", step=0, name="a", error=ERROR),
            _event(5, "op.undoing", error=ERROR),
            _event(6, "undo.failed", step=0, name="a", error=ERROR),
            _event(7, "op.ended", fate="stuck", error=ERROR),
        ],
    }
)
