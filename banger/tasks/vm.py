"""The life of a VM, whole: each kind of operation and its steps."""

from __future__ import annotations

from dataclasses import replace

from banger.tasks import snapshot
from banger.tasks.make import MAKE
from banger.tasks.network import RELEASE, RELEASE_ON_THE_WAY
from banger.tasks.pipeline import Pipeline
from banger.tasks.settings import SET
from banger.tasks.start import CHECK_START, START
from banger.tasks.stop import BURY, CHECK_RUNNING, DELETE, KILL, SHUT_DOWN

CREATE = Pipeline("vm.create", MAKE + START)
ONLY_MAKE = frozenset(step.name for step in START)
"""The steps to leave out of CREATE for a VM that is not started yet."""

# If the start fails it is undone, and the VM is what its state says: stopped.
RESTART = (
    replace(SHUT_DOWN, forward_only=False),
    RELEASE_ON_THE_WAY,
    snapshot.RELEASE_ON_THE_WAY,
    CHECK_START,
    *START,
)

PIPELINES = (
    CREATE,
    Pipeline("vm.start", (CHECK_START, *START)),
    Pipeline("vm.stop", (CHECK_RUNNING, SHUT_DOWN, RELEASE, snapshot.RELEASE)),
    Pipeline("vm.restart", RESTART),
    Pipeline("vm.kill", (CHECK_RUNNING, KILL, RELEASE, snapshot.RELEASE)),
    Pipeline("vm.bury", (BURY, RELEASE, snapshot.RELEASE)),
    Pipeline("vm.set", SET),
    Pipeline("vm.delete", DELETE),
)
