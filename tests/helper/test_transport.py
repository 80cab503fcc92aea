"""The root helper's socket: who is heard, how much, for how long; and a client that trusts root only."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from banger.errors import Busy, HelperDown, Refused
from banger.helper import client, server, wire
from banger.helper.requests import MAX_REQUEST, Hello, Listing, NamesRoute, Request, TapEnsure
from banger.testing.root_pool import RootPool
from tests.helper.conftest import NEEDS_ROOT, as_user, asked, audit, descriptors, raw, recorded

pytestmark = NEEDS_ROOT

HELLO = Request(op="op-1", step="step", epoch=1, key="k", ask=Hello())
STRANGER = 4242


def connect(pool: RootPool) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wire.connect(connection, str(pool.socket), 20)
    return connection


def pools_descriptors(pool: RootPool) -> int:
    return len(list(Path(f"/proc/{pool.process.pid}/fd").iterdir()))


def settled(look: Callable[[], bool]) -> bool:
    """Wait until something is so, for at most five seconds."""
    deadline = time.monotonic() + 5
    while not look():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def error_of(job: Callable[[], object]) -> bytes:
    """Give the class and text of what is raised."""
    try:
        return repr(job()).encode()
    except Exception as error:
        return f"{type(error).__name__}: {error}".encode()


def test_h1_another_user_is_refused_before_anything_is_read(
    pool: RootPool, refused: Callable[..., None]
) -> None:
    """A uid that is not an owner's gets a typed refusal, and one line in the audit log."""
    before, effects = audit(pool), recorded(pool)
    said = as_user(STRANGER, lambda: error_of(lambda: client.ask(pool.socket, HELLO)))
    assert said == b"Refused: The root helper does not serve the user 4242."
    line = audit(pool)[len(before) :]
    assert [(new.uid, new.outcome, new.ask) for new in line] == [(STRANGER, "refused", "")]
    assert recorded(pool) == effects
    refused("H1 another uid", said.decode())


def test_h1_a_flood_of_strangers_does_not_fill_the_log(pool: RootPool) -> None:
    """A thousand refused connections make a few lines, one of which has their number."""
    before = len(audit(pool))

    def knock() -> bytes:
        for _ in range(1000):
            with connect(pool):
                pass
        return b""

    as_user(STRANGER + 1, knock)
    counted = [0]

    def all_counted() -> bool:
        lines = [line for line in audit(pool)[before:] if line.uid == STRANGER + 1]
        more = [int(line.message.split()[0]) for line in lines if "more requests" in line.message]
        counted[0] = len(lines) - len(more) + sum(more)
        return counted[0] == 1000

    assert settled(all_counted), counted
    assert len(audit(pool)) - before < 30


def test_h2_what_a_process_becomes_after_connect_changes_nothing(pool: RootPool) -> None:
    """A connection speaks for who connected: a stranger's, in root's hands, is a stranger's still."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def hand_over() -> bytes:
        with connect(pool) as connection:
            socket.send_fds(theirs, [b"x"], [connection.fileno()])
        return b""

    as_user(STRANGER + 2, hand_over)
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    with socket.socket(fileno=fds[0]) as connection:
        connection.settimeout(20)
        assert json.loads(wire.receive(connection).data)["error"]["code"] == "refused"
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("H4 too long", b"x" * (MAX_REQUEST + 1)),
        ("H4 one byte", b"{"),
        ("H4 length before it", b"\xff\xff\xff\xff" + msgspec.json.encode(HELLO)),
        ("H4 nested too deep", b"[" * 60_000),
        ("H12 pickle", pickle.dumps(os.system)),
        ("H12 pickle in JSON", json.dumps({"ask": pickle.dumps(print, 0).decode()}).encode()),
        ("H4 not UTF-8", b'{"op":"\xff"}'),
        ("H4 two documents", msgspec.json.encode(HELLO) * 2),
    ],
)
def test_h4_h12_what_is_no_request_is_refused(
    pool: RootPool, name: str, data: bytes, refused: Callable[..., None]
) -> None:
    """Packets that are no JSON request have a typed refusal and one line, in ASCII and bounded."""
    before, effects = asked(pool), recorded(pool)
    answer = raw(pool, data)
    assert answer["error"]["code"] == "invalid"
    (line,) = asked(pool)[len(before) :]
    assert (line.seq, line.outcome) == (answer["audit"], "refused")
    assert line.ask.isascii()
    assert line.ask.isprintable()
    assert len(line.ask) <= 4096
    assert line.message.isascii()
    assert line.message.isprintable()
    assert recorded(pool) == effects
    refused(name, answer["error"]["message"])


def test_h4_who_says_nothing_is_hung_up_on(pool: RootPool, refused: Callable[..., None]) -> None:
    """After five seconds of silence there is a refusal and the end; the helper serves others meanwhile."""
    with connect(pool) as silent:
        began = time.monotonic()
        assert pool.ask(Hello()).facts["uid"] == os.getuid()
        answer = json.loads(wire.receive(silent).data)
        assert server.REQUEST_DEADLINE_S - 0.5 < time.monotonic() - began < server.REQUEST_DEADLINE_S + 5
    refused("H4 silence", answer["error"]["message"])


def test_h4_a_second_packet_is_not_read(pool: RootPool) -> None:
    """One connection, one request: what comes after it is nobody's."""
    with connect(pool) as connection:
        wire.send(connection, msgspec.json.encode(HELLO))
        first = wire.receive(connection)
        try:
            wire.send(connection, msgspec.json.encode(HELLO))
            second = wire.receive(connection).data
        except ConnectionError:
            second = b""
    assert b'"ok"' in first.data
    assert second == b""


def test_h6_who_fills_his_share_leaves_the_others_theirs(
    pool: RootPool, refused: Callable[..., None]
) -> None:
    """The 17th connection of a uid is refused at once, other uids are served, and room comes back."""
    idle = [connect(pool) for _ in range(server.MOST_CONNECTIONS)]
    try:
        with pytest.raises(Busy) as caught:
            client.ask(pool.socket, HELLO)
        assert b"'uid': 1000" in as_user(1000, lambda: repr(client.ask(pool.socket, HELLO)).encode())
    finally:
        for connection in idle:
            connection.close()
    assert settled(lambda: b"uid" in error_of(lambda: client.ask(pool.socket, HELLO)))
    refused("H6 17th connection", caught.value)


def test_h6_ten_thousand_connections_of_one_user_keep_nobody_out(
    pool: RootPool, refused: Callable[..., None]
) -> None:
    """While one owner connects without end, another's requests are answered within a second or so."""
    stop, made = threading.Event(), [0]

    def flood() -> None:
        kept: list[socket.socket] = []
        while not stop.is_set() and made[0] < 10_000:
            kept.append(connect(pool))
            made[0] += 1
            if len(kept) > 500:
                kept.pop(0).close()
        for connection in kept:
            connection.close()

    flooder = threading.Thread(target=flood)
    flooder.start()
    try:
        slowest = float(as_user(1000, lambda: _slowest_hello(pool, 20)))
    finally:
        stop.set()
        flooder.join()
    assert made[0] > 100
    assert slowest < 5
    assert settled(lambda: b"uid" in error_of(lambda: client.ask(pool.socket, HELLO)))
    refused("H6 connections without end", f"{made[0]} connections; another's slowest answer {slowest:.2f} s")


def _slowest_hello(pool: RootPool, count: int) -> bytes:
    slowest = 0.0
    for _ in range(count):
        began = time.monotonic()
        client.ask(pool.socket, HELLO)
        slowest = max(slowest, time.monotonic() - began)
    return str(slowest).encode()


@pytest.mark.parametrize("count", [1, 16, 17, 64, 253])
def test_h7_descriptors_that_nobody_asked_for_are_closed(
    pool: RootPool, count: int, refused: Callable[..., None]
) -> None:
    """However many descriptors come, the request is refused and the helper has as many as before."""
    raw(pool, msgspec.json.encode(HELLO))
    before, effects, lines = pools_descriptors(pool), recorded(pool), len(asked(pool))
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        answer = raw(pool, msgspec.json.encode(HELLO), [null] * count)
    finally:
        os.close(null)
    assert answer["error"]["code"] == "invalid"
    assert settled(lambda: pools_descriptors(pool) <= before)
    assert recorded(pool) == effects
    assert len(asked(pool)) == lines + 1
    refused("H7 unexpected descriptors", answer["error"]["message"])


def test_a_thousand_requests_leave_no_descriptor_and_no_thread(pool: RootPool) -> None:
    """Good, bad, turned away or hung up on: nothing is left of a request."""
    pool.ask(Hello())
    before = pools_descriptors(pool)
    for number in range(250):
        pool.ask(Hello())
        raw(pool, b"nonsense")
        connect(pool).close()
        with pytest.raises(Refused):
            pool.ask(NamesRoute(bridge="br-fc-no", port=2000 + number))
    assert settled(lambda: pools_descriptors(pool) <= before)
    assert settled(lambda: len(list(Path(f"/proc/{pool.process.pid}/task").iterdir())) == 2)


def test_h11_what_root_keeps_can_be_reached_by_nobody_else(
    pool: RootPool, refused: Callable[..., None]
) -> None:
    """Another user can neither list, read, write nor rename root's directory, nor replace the socket."""
    attempts: list[Callable[[], object]] = [
        lambda: list(pool.state.iterdir()),
        lambda: os.open(pool.state / "root.db", os.O_RDONLY),
        lambda: os.open(pool.state / "queue.db", os.O_RDWR),
        lambda: os.open(pool.state / "new", os.O_CREAT | os.O_WRONLY),
        lambda: pool.state.rename(pool.path / "mine"),
        lambda: pool.socket.unlink(),
        lambda: pool.socket.rename(pool.socket.with_name("old")),
        lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).bind(str(pool.socket)),
        lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).bind(str(pool.socket.with_name("x"))),
    ]
    said = json.loads(as_user(1000, lambda: json.dumps([error_of(a).decode() for a in attempts]).encode()))
    assert all(word.startswith(("PermissionError", "OSError: [Errno 98]")) for word in said), said
    for file in (pool.state, *pool.state.iterdir()):
        assert file.stat().st_mode & 0o077 == 0, file
    refused("H11 owner reaches for root's files", said[0])


def test_h13_who_is_not_root_is_not_believed(short_path: Path, refused: Callable[..., None]) -> None:
    """A socket that another user made at the path gets no request and no descriptor."""
    short_path.chmod(0o777)
    said, answered = os.pipe()

    def squat() -> bytes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(short_path / "sock"))
            listener.listen()
            os.write(answered, b"x")
            connection, _ = listener.accept()
            with connection:
                return wire.receive(connection).data

    squatter: list[bytes] = []
    thread = threading.Thread(target=lambda: squatter.append(as_user(STRANGER, squat)))
    thread.start()
    os.read(said, 1)
    with pytest.raises(HelperDown, match="is not root but user 4242") as caught:
        client.ask(short_path / "sock", HELLO)
    thread.join()
    assert squatter == [b""]
    refused("H13 squatted socket", caught.value)


def test_h14_no_abstract_socket_is_used(pool: RootPool, refused: Callable[..., None]) -> None:
    """All that the helper listens on has a path: who may connect is a matter of its directory and mode."""
    targets = [str(fd.readlink()) for fd in Path(f"/proc/{pool.process.pid}/fd").iterdir()]
    inodes = {target[8:-1] for target in targets if target.startswith("socket:[")}
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    listening = [
        row[7] if len(row) > 7 else ""
        for row in rows
        if row[6] in inodes and row[5] == "01" and row[3] == "00010000"
    ]
    assert listening == [str(pool.socket)]
    refused("H14 abstract socket", f"listens on {listening[0]} only")


def test_an_answer_longer_than_a_packet_arrives_whole(pool: RootPool) -> None:
    """A list of a thousand taps is given like a list of one."""
    for number in range(300):
        pool.ask(TapEnsure(vm=f"many-{number:04}-{'x' * 40}", bridge="br-fc-many", network="10.99.0.0/16"))
    answer = pool.ask(Listing())
    assert len(json.dumps(answer.facts)) > wire.MAX_PACKET
    assert len([thing for thing in answer.facts["held"] if thing["kind"] == "tap"]) == 300
    assert answer.fds == ()


# -- the client ------------------------------------------------------------------------------------


@contextlib.contextmanager
def fake(path: Path, serve: Callable[[socket.socket], None]) -> Iterator[Path]:
    """A server of root's that does as a test says with one connection."""
    at = path / "sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(at))
        listener.listen()

        def one() -> None:
            connection, _ = listener.accept()
            with connection:
                serve(connection)

        thread = threading.Thread(target=one)
        thread.start()
        try:
            yield at
        finally:
            thread.join()


GARBAGE = [
    b"\xff",
    b"null",
    b"{}",
    b'{"ok":null}',
    b'{"ok":[]}',
    b'{"error":"x"}',
    b'{"error":{"code":7}}',
    b'{"audit":1}',
    b"[" * 60_000,
    b'{"ok":{},"audit":"x"}',
]


@pytest.mark.parametrize("said", GARBAGE)
def test_a_garbled_answer_is_the_helpers_fault(short_path: Path, said: bytes) -> None:
    """Whatever is not an answer raises HelperDown, and descriptors that came with it are closed."""

    def serve(connection: socket.socket) -> None:
        wire.receive(connection)
        null = os.open("/dev/null", os.O_RDONLY)
        wire.send(connection, said, [null, null])
        os.close(null)

    with fake(short_path, serve) as at:
        before = descriptors()
        with pytest.raises(HelperDown):
            client.ask(at, HELLO)
        assert settled(lambda: descriptors() <= before)


def test_an_answer_that_comes_twice_counts_once(short_path: Path) -> None:
    """The first answer is taken, the second never read."""

    def serve(connection: socket.socket) -> None:
        wire.receive(connection)
        wire.send(connection, b'{"ok":{"n":1}}')
        with contextlib.suppress(BrokenPipeError):  # the client may be gone by then
            wire.send(connection, b'{"ok":{"n":2}}')

    with fake(short_path, serve) as at:
        assert client.ask(at, HELLO).facts == {"n": 1}


def test_an_answer_that_comes_late_is_none(short_path: Path) -> None:
    """After the timeout the client gives up, and whoever answers then finds nobody."""
    gone = threading.Event()

    def serve(connection: socket.socket) -> None:
        wire.receive(connection)
        gone.wait(10)
        with pytest.raises(BrokenPipeError):
            wire.send(connection, b'{"ok":{}}')

    with fake(short_path, serve) as at:
        with pytest.raises(HelperDown, match="timed out"):
            client.ask(at, HELLO, timeout_s=0.2)
        gone.set()


def test_a_helper_that_hangs_up_is_down(short_path: Path) -> None:
    """Before it reads or after: it is down, not done."""
    for reads in (True, False):

        def serve(connection: socket.socket, reads: bool = reads) -> None:
            if reads:
                wire.receive(connection)

        with fake(short_path, serve) as at, pytest.raises(HelperDown):
            client.ask(at, HELLO)
        at.unlink()


def test_no_helper_is_a_helper_down(short_path: Path) -> None:
    """No socket, a dead one, a file, and a path that is too long are all the same to the caller."""
    dead = short_path / "dead"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(dead))
    (short_path / "file").touch()
    for path in (short_path / "none", dead, short_path / "file", short_path / ("x" * 200)):
        with pytest.raises(HelperDown):
            client.ask(path, HELLO)


def test_only_the_group_can_connect_when_there_is_one(rooted: Path) -> None:
    """With a group the socket is its members' (0660); other users cannot even connect."""
    runtime = rooted / "run"
    directory = server.open_runtime(str(runtime))
    with server.listen(str(runtime), directory, 4343):
        found = (runtime / server.SOCKET).stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (0, 4343, 0o660)
        said = as_user(STRANGER, lambda: error_of(lambda: client.ask(runtime / server.SOCKET, HELLO)))
        assert b"Permission denied" in said
    os.close(directory)


def test_the_service_manager_is_told(short_path: Path) -> None:
    """With NOTIFY_SOCKET the helper says READY=1 once it listens, and SIGTERM ends it with 0."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(short_path / "notify"))
        manager.settimeout(10)
        with RootPool() as told:
            told.kill()
            told.start(env={"NOTIFY_SOCKET": str(short_path / "notify")})
            assert manager.recv(100) == b"READY=1"
            assert told.socket.exists()
            assert told.stop() == 0
            assert not told.socket.exists()
