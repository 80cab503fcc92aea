"""Warm SSH connections to guests: a command costs a round trip, not a handshake."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator

import asyncssh

from banger.errors import GuestUnreachable
from banger.guest import launcher
from banger.guest.launcher import Shell
from banger.guest.ssh import Target

CONNECT_S = 15.0
KEPT_IDLE = 4
"""Connections kept for later. One command on each at a time: with several, dropbear (2022.83) refuses
some that begin while others end, and may fail an assertion that takes the whole connection with it."""

# Key exchange and ciphers run in an emulated guest: the cheapest strong ones come first.
_KEX = ["curve25519-sha256", "curve25519-sha256@libssh.org"]
_CIPHERS = ["chacha20-poly1305@openssh.com", "aes256-ctr", "aes128-ctr"]
_HOST_KEYS = ["ssh-ed25519"]


class Connections:
    """Connections to each VM: one for each command that runs at the same time, kept for the next."""

    def __init__(self) -> None:
        self._pools: dict[str, _Pool] = {}

    @contextlib.asynccontextmanager
    async def lease(self, target: Target) -> AsyncIterator[asyncssh.SSHClientConnection]:
        """Give a connection that nobody else uses, for the length of the block.

        Raises GuestUnreachable.
        """
        pool = self._pools.setdefault(target.vm, _Pool(target))
        connection = await pool.take()
        try:
            await pool.dismiss(connection)
            yield connection
        finally:
            pool.give_back(connection)

    @contextlib.asynccontextmanager
    async def shell(self, target: Target) -> AsyncIterator[Shell]:
        """Give a shell that waits for its command, on a connection that nobody else uses; see `launcher`.

        Another is started on it when the block ends, for the next one. Raises GuestUnreachable.
        """
        pool = self._pools.setdefault(target.vm, _Pool(target))
        connection = await pool.take()
        try:
            yield await pool.shell(connection)
            pool.prepare(connection)
        finally:
            pool.give_back(connection)

    def counts(self, vm: str) -> tuple[int, int]:
        """Tell how many connections to a VM are in use, and how many there are."""
        pool = self._pools.get(vm)
        return (0, 0) if pool is None else pool.counts()

    def drop(self, vm: str) -> None:
        """Forget the connections to a VM that is gone, and close them."""
        pool = self._pools.pop(vm, None)
        if pool is not None:
            pool.close()

    async def close(self) -> None:
        """Close every connection."""
        for vm in list(self._pools):
            self.drop(vm)
        await asyncio.sleep(0)  # let them say so


class _Pool:
    """The connections to one VM. They are made one at a time: the server refuses a crowd of strangers."""

    def __init__(self, target: Target):
        self._target = target
        self._idle: list[asyncssh.SSHClientConnection] = []
        self._busy: set[asyncssh.SSHClientConnection] = set()
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()
        self._making: asyncio.Task[None] | None = None
        self._shells: dict[asyncssh.SSHClientConnection, asyncio.Task[Shell]] = {}

    async def take(self) -> asyncssh.SSHClientConnection:
        """Give an idle connection, or the next one that is given back or made."""
        while True:
            while self._idle:
                connection = self._idle.pop()
                if not connection.is_closed():
                    self._busy.add(connection)
                    return connection
            await self._free()

    def prepare(self, connection: asyncssh.SSHClientConnection) -> None:
        """Begin to start a shell for the next command."""
        if not connection.is_closed():
            task = asyncio.create_task(launcher.wait_for_command(connection))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # the next one tells
            self._shells[connection] = task

    async def shell(self, connection: asyncssh.SSHClientConnection) -> Shell:
        """Give the shell that waits on a connection; a new one if it is gone. Raises GuestUnreachable."""
        task = self._shells.pop(connection, None)
        if task is not None:
            with contextlib.suppress(GuestUnreachable):
                shell = await task
                if shell.waits():
                    return shell
        return await launcher.wait_for_command(connection)

    async def dismiss(self, connection: asyncssh.SSHClientConnection) -> None:
        """End the shell that waits on a connection: a caller wants it for something else."""
        task = self._shells.pop(connection, None)
        if task is not None:
            with contextlib.suppress(GuestUnreachable):
                shell = await task
                shell.channel.write_eof()
                await shell.ended

    async def _free(self) -> None:
        """Wait until a connection may be idle. Raises GuestUnreachable when none can be made."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._make_more()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._wake()  # it was this caller's turn: let another have it
            raise

    def _make_more(self) -> None:
        if self._waiting and self._making is None:
            self._making = asyncio.create_task(self._make())

    async def _make(self) -> None:
        try:
            self._idle.append(await _connect(self._target))
        except (OSError, asyncssh.Error, TimeoutError) as error:
            self._fail(f"The guest does not answer over SSH: {error or 'it took too long'}.")
        finally:
            self._making = None
        self._wake()
        self._make_more()

    def _wake(self) -> None:
        """Let the caller that has waited longest look for an idle connection."""
        while self._waiting and self._idle:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def _fail(self, message: str) -> None:
        hint = f"`banger vm logs {self._target.vm}` shows its console."
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(GuestUnreachable(message, hint=hint))

    def give_back(self, connection: asyncssh.SSHClientConnection) -> None:
        """Keep a connection for the next command, unless enough are kept or it is closed."""
        self._busy.discard(connection)
        if not connection.is_closed() and (self._waiting or len(self._idle) < KEPT_IDLE):
            self._idle.append(connection)
            self._wake()
        else:
            self._shells.pop(connection, None)
            connection.close()

    def counts(self) -> tuple[int, int]:
        """Tell how many connections are in use, and how many there are."""
        return len(self._busy), len(self._busy) + len(self._idle)

    def close(self) -> None:
        """Close every connection; who waits for one is told."""
        if self._making is not None:
            self._making.cancel()
        self._fail("The VM was stopped while its connection was made.")
        for connection in (*self._idle, *self._busy):
            connection.abort()
        self._idle.clear()


async def _connect(target: Target) -> asyncssh.SSHClientConnection:
    known = target.paths.known_hosts.read_text("ascii").split(" ", 1)[1]
    host_key = asyncssh.import_public_key(known)
    return await asyncssh.connect(
        target.host,
        target.port,
        username="root",
        client_keys=[str(target.key)],
        known_hosts=([host_key], [], []),
        config=[],
        agent_path=None,
        preferred_auth="publickey",
        kex_algs=_KEX,
        encryption_algs=_CIPHERS,
        server_host_key_algs=_HOST_KEYS,
        compression_algs=["none"],
        gss_host=None,
        connect_timeout=CONNECT_S,
        login_timeout=CONNECT_S,
        keepalive_interval=15,
    )
