"""Where the daemon is, in the few lines that the fast path can afford.

`banger.config.find_dirs` is the authority: it costs 30 ms of imports, these lines none, and a
test holds both to the same answers.
"""

from __future__ import annotations

import os


def state() -> str:
    """Give the owner's state directory."""
    home = os.environ.get("HOME") or os.path.expanduser("~")  # noqa: PTH111 (pathlib costs 5 ms)
    return (os.environ.get("XDG_STATE_HOME") or f"{home}/.local/state") + "/banger"


def socket() -> str:
    """Give the path of the daemon's socket."""
    user_run = f"/run/user/{os.getuid()}"
    if given := os.environ.get("XDG_RUNTIME_DIR"):
        return f"{given}/banger/daemon.sock"
    if os.access(user_run, os.W_OK):
        return f"{user_run}/banger/daemon.sock"
    return f"{state()}/run/daemon.sock"
