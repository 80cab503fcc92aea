"""Is the log what was written? The daemon asks before it writes: a damaged log is left as it is.

The newest rows are checked before the daemon serves anyone, and again once a minute. What is before
them, in a long log, is checked by a process beside it: `python -m banger.rpc.health DATABASE`.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec

from banger.config import Dirs
from banger.events import verify
from banger.events.verify import Verdict

NEWEST = 100_000
"""Rows that are checked at every start: a quarter of a second."""


def require_good(dirs: Dirs) -> None:
    """Check the log's newest rows; all of them if damage was found before. Raises LogDamaged."""
    if not dirs.database.exists():
        return
    newest = None if dirs.damaged.exists() else NEWEST
    verify.verify_log(dirs.database, newest=newest).require_good()
    dirs.damaged.unlink(missing_ok=True)


LIVE_S = 60.0
LIVE_NEWEST = 10_000


async def keep_checking(dirs: Dirs) -> None:
    """Check a log in use: whole once, then its newest rows once a minute. Raises LogDamaged."""
    await check_the_rest(dirs)
    while True:
        await asyncio.sleep(LIVE_S)
        verdict = await asyncio.to_thread(verify.verify_log, dirs.database, newest=LIVE_NEWEST)
        _require_good(dirs, verdict)


async def check_the_rest(dirs: Dirs) -> None:
    """Check a long log whole, at the lowest priority. Raises LogDamaged, also at the next start."""
    end = verify.stored_end(dirs.database)
    if end is None or end.rows <= NEWEST:
        return
    checker = await asyncio.create_subprocess_exec(
        "nice", "-n", "19", sys.executable, "-P", "-m", "banger.rpc.health", str(dirs.database),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        said, _ = await checker.communicate()
    except asyncio.CancelledError:
        checker.kill()
        raise
    _require_good(dirs, msgspec.json.decode(said, type=Verdict))


def _require_good(dirs: Dirs, verdict: Verdict) -> None:
    if verdict.bad_seq is not None:
        dirs.damaged.write_bytes(msgspec.json.encode(verdict))
    verdict.require_good()


def main() -> None:
    """Check one database and print the verdict as JSON."""
    print(msgspec.json.encode(verify.verify_log(Path(sys.argv[1]))).decode())  # noqa: T201  its answer


if __name__ == "__main__":
    main()
