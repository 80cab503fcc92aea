"""Root's socket: who may ask, how many at a time, and for how long.

Authority is what the kernel says of the other end at connect(2), SO_PEERCRED: it stays with the
connection, whatever its process becomes. A pid is never looked at.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import signal
import socket
import sqlite3
import threading
import time
import traceback
from collections import Counter
from collections.abc import Collection, Iterable
from types import FrameType

import msgspec

from banger.errors import BangerError, Busy, HostLacks, InvalidRequest, Refused
from banger.helper import store, wire
from banger.helper.pool import Answer, Pool, crash
from banger.helper.trusted import open_trusted
from banger.helper.verbs import Caller

SOCKET = "helper.sock"
REQUEST_DEADLINE_S = 5.0
ANSWER_DEADLINE_S = 5.0
MOST_CONNECTIONS = 16
"""Of one uid at a time; each has a thread."""
BACKLOG = 128
FLOOD_LOOK_S = 1.0
BRAKE_S = 0.1
_SUN_PATH = 107  # bytes without its NUL: unix(7)


def open_runtime(path: str) -> int:
    """Open the directory of the socket, made when it is not there: anyone may enter, only root may write.

    Raises HostLacks when another than root may change it.
    """
    parent, name = os.path.split(path.rstrip("/"))
    above = open_trusted(parent)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=above)
            os.chmod(name, 0o755, dir_fd=above)  # noqa: S103  anyone may knock; umask is 077
        os.close(open_trusted(path))
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    finally:
        os.close(above)


def hold(directory: int, path: str) -> None:
    """Lock a directory for as long as it is open, that is for this process's life.

    Two helpers never write one database, nor take one socket from each other. Raises HostLacks when
    another process holds it.
    """
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise HostLacks(f"Another root helper uses {path}.") from None


def listen(path: str, directory: int, gid: int | None) -> socket.socket:
    """Listen in the runtime directory, whose descriptor is given, too.

    With a group, only its members can connect (0660): strangers cannot even knock. Without one anyone
    can (0666) and is refused by uid before anything is read: the mode keeps noise out, it gives no
    authority. Nobody but root can replace the socket, as the directory is root's.
    """
    at = f"{path.rstrip('/')}/{SOCKET}"
    if len(os.fsencode(at)) > _SUN_PATH:
        raise HostLacks(f"{at} is too long for a socket.")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(SOCKET, dir_fd=directory)  # a dead helper's: this one holds the lock
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = os.umask(0o177)
    listener.bind(at)
    os.umask(before)
    if gid is not None:
        os.chown(SOCKET, 0, gid, dir_fd=directory, follow_symlinks=False)
    listener.listen(BACKLOG)
    os.chmod(SOCKET, 0o666 if gid is None else 0o660, dir_fd=directory)
    listener.setblocking(False)
    return listener


class Server:
    """Accepts connections, each of which brings one request, and answers each in a thread of its own."""

    def __init__(self, pool: Pool, listener: socket.socket, owners: Collection[int]):
        self._pool = pool
        self._listener = listener
        self._owners = frozenset(owners)
        self._open: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._stopping = False
        self._woken, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        signal.set_wakeup_fd(self._wakes.fileno())
        signal.signal(signal.SIGTERM, self._stop)

    def serve(self) -> None:
        """Serve until SIGTERM, also one that came before, then let what is being carried out end."""
        worker = threading.Thread(target=self._pool.work, name="worker")
        worker.start()
        with selectors.DefaultSelector() as ready, self._woken, self._wakes:
            ready.register(self._listener, selectors.EVENT_READ)
            ready.register(self._woken, selectors.EVENT_READ)
            while not self._stopping:
                ready.select(FLOOD_LOOK_S)
                self._accept_all()
                self._pool.note_floods()
            signal.set_wakeup_fd(-1)
        self._listener.close()
        self._pool.stop()
        worker.join()
        self._pool.let_down()
        self._see_off()

    def _see_off(self) -> None:
        """Wait a little until those who have been answered have their answers."""
        deadline = time.monotonic() + ANSWER_DEADLINE_S
        while self._open.total() and time.monotonic() < deadline:
            time.sleep(BRAKE_S)

    def _stop(self, _: int, __: FrameType | None) -> None:
        self._stopping = True

    def _accept_all(self) -> None:
        try:
            while not self._stopping:
                connection, _ = self._listener.accept()
                self._welcome(connection)
        except (BlockingIOError, ConnectionError):
            pass  # nobody waits, or who did is gone
        except OSError:  # no descriptor or memory is left: some are given back when an answer is sent
            traceback.print_exc()
            time.sleep(BRAKE_S)

    def _welcome(self, connection: socket.socket) -> None:
        """Hand a connection to a thread, or refuse it unread."""
        uid, gid = wire.peer(connection)
        if uid not in self._owners:
            self._turn_away(connection, uid, Refused(f"The root helper does not serve the user {uid}."))
        elif not self._has_room(uid):
            error = Busy(f"More than {MOST_CONNECTIONS} requests of yours are with the root helper.")
            self._turn_away(connection, uid, error)
        else:
            caller = Caller(uid=uid, gid=gid)
            threading.Thread(target=self._attend, args=(connection, caller), daemon=True).start()

    def _has_room(self, uid: int) -> bool:
        with self._lock:
            if self._open[uid] >= MOST_CONNECTIONS:
                return False
            self._open[uid] += 1
            return True

    def _turn_away(self, connection: socket.socket, uid: int, error: BangerError) -> None:
        with connection:
            connection.setblocking(False)
            _send(connection, self._pool.turn_away(uid, error), ())

    def _attend(self, connection: socket.socket, caller: Caller) -> None:
        """Receive one request, answer it and hang up."""
        try:
            with connection:
                self._converse(connection, caller)
        except sqlite3.Error:
            crash()
        finally:
            with self._lock:
                self._open[caller.uid] -= 1

    def _converse(self, connection: socket.socket, caller: Caller) -> None:
        connection.settimeout(REQUEST_DEADLINE_S)
        try:
            packet = wire.receive(connection)
        except TimeoutError:
            error = InvalidRequest(f"No request came within {REQUEST_DEADLINE_S:g} s.")
            _send(connection, self._pool.refuse(store.raw_entry(caller.uid, b""), error), ())
            return
        except OSError:
            return
        try:
            if packet.data or packet.fds:
                self._answer(connection, caller, packet)
        finally:
            wire.close_all(packet.fds)

    def _answer(self, connection: socket.socket, caller: Caller, packet: wire.Packet) -> None:
        answer, given = self._pool.answer(caller, packet)
        try:
            connection.settimeout(ANSWER_DEADLINE_S)
            _send(connection, answer, given)
        finally:
            wire.close_all(given)


def _send(connection: socket.socket, answer: Answer, fds: Iterable[int]) -> None:
    """Send an answer; one that is too long for a packet goes in a sealed memory file beside an empty one."""
    data = msgspec.json.encode(answer)
    with contextlib.suppress(OSError):  # gone or silent: who does not wait for the answer asks again
        if len(data) <= wire.MAX_PACKET:
            wire.send(connection, data, fds)
            return
        file = _memory_file(data)
        try:
            wire.send(connection, b"{}", (*fds, file))
        finally:
            os.close(file)


def _memory_file(data: bytes) -> int:
    file = os.memfd_create("answer")
    written = 0
    while written < len(data):
        written += os.write(file, data[written:])
    return file
