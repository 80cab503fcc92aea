"""Put the helper together and serve until SIGTERM."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass

from banger.helper import server, store
from banger.helper.host import Host
from banger.helper.pool import Pool, Verbs
from banger.helper.program import ENVIRONMENT
from banger.helper.trusted import make_private


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a helper keeps its things, where it is asked, and by whom: uids; `gid` may connect at all."""

    state: str
    runtime: str
    owners: Collection[int]
    gid: int | None = None


def settle() -> str | None:
    """Shed what this process got from whoever started it; give the service manager's socket, if any.

    Nothing here reads the environment; the programs that are run get one of their own.
    """
    notify = os.environ.get("NOTIFY_SOCKET")
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    os.umask(0o077)
    os.chdir("/")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return notify


def serve(place: Place, verbs: Callable[[store.Store], Verbs], host: Host, notify: str | None = None) -> None:
    """Serve until SIGTERM. Raises HostLacks when its directories are not root's own, or are in use."""
    state = make_private(place.state)
    server.hold(state, place.state)
    runtime = server.open_runtime(place.runtime)
    server.hold(runtime, place.runtime)
    pool = Pool(place.state, verbs, host)
    interrupted = pool.recover()
    listener = server.listen(place.runtime, runtime, place.gid)
    serving = server.Server(pool, listener, place.owners)
    say(f"listening: {len(place.owners)} owners, {interrupted} requests were interrupted")
    _ready(notify)
    serving.serve()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(server.SOCKET, dir_fd=runtime)
    pool.close()
    os.close(runtime)
    os.close(state)


def say(text: str) -> None:
    """Write a line for the journal."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _ready(notify: str | None) -> None:
    """Tell the service manager that the helper serves (sd_notify(3))."""
    if notify:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as messages:
            messages.connect("\0" + notify[1:] if notify.startswith("@") else notify)
            messages.send(b"READY=1")
