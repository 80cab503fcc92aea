"""Warm SSH connections to guests: a command costs a round trip, not a handshake."""

from __future__ import annotations

import asyncio
import contextlib

import asyncssh

from banger.errors import GuestUnreachable
from banger.guest.ssh import Target

CONNECT_S = 15.0
# Key exchange and ciphers run in an emulated guest: the cheapest strong ones come first.
_KEX = ["curve25519-sha256", "curve25519-sha256@libssh.org"]
_CIPHERS = ["chacha20-poly1305@openssh.com", "aes256-ctr", "aes128-ctr"]
_HOST_KEYS = ["ssh-ed25519"]


class Connections:
    """At most one connection to each VM, made on first use and kept."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[asyncssh.SSHClientConnection]] = {}

    async def get(self, target: Target) -> asyncssh.SSHClientConnection:
        """Give the connection to a guest; callers that come at once share one handshake.

        Raises GuestUnreachable.
        """
        task = self._tasks.get(target.vm)
        if task is None or (task.done() and _broken(task)):
            task = asyncio.create_task(_connect(target))
            self._tasks[target.vm] = task
        try:
            # shield: a caller that goes away must not cut off the others.
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                raise  # it is this caller that is cancelled
            raise GuestUnreachable("The VM was stopped while its connection was made.") from None
        except (OSError, asyncssh.Error, TimeoutError) as error:
            if self._tasks.get(target.vm) is task:  # else it was dropped, and is another's by now
                self.drop(target.vm)
            raise GuestUnreachable(
                f"The guest does not answer over SSH: {error or 'it took too long'}.",
                hint=f"`banger vm logs {target.vm}` shows its console.",
            ) from None

    def drop(self, vm: str) -> None:
        """Forget the connection to a VM that is gone, and close it."""
        task = self._tasks.pop(vm, None)
        if task is None:
            return
        if task.done() and not task.cancelled() and task.exception() is None:
            task.result().abort()
        else:
            task.cancel()

    async def close(self) -> None:
        """Close every connection."""
        for vm in list(self._tasks):
            self.drop(vm)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)


def _broken(task: asyncio.Task[asyncssh.SSHClientConnection]) -> bool:
    return task.cancelled() or task.exception() is not None or task.result().is_closed()


async def _connect(target: Target) -> asyncssh.SSHClientConnection:
    known = target.paths.known_hosts.read_text("ascii").split(" ", 1)[1]
    host_key = asyncssh.import_public_key(known)
    return await asyncssh.connect(
        "127.0.0.1",
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
