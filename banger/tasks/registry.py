"""Every kind of operation there is."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping

from banger.tasks import artifacts, audit, local, lost, pull, vm, workspace
from banger.tasks.pipeline import Pipeline

EXTRA = "BANGER_PIPELINES"
"""Environment variable: modules whose PIPELINES are added (for benchmarks and crash tests)."""


OWN = (
    *vm.PIPELINES,
    *artifacts.PIPELINES,
    *pull.PIPELINES,
    *local.PIPELINES,
    *audit.PIPELINES,
    *lost.PIPELINES,
    *workspace.PIPELINES,
)
"""The pipelines that banger itself has."""


def pipelines() -> Mapping[str, Pipeline]:
    """Map each kind of operation to its pipeline."""
    known = [*OWN]
    for module in filter(None, os.environ.get(EXTRA, "").split(",")):
        known.extend(importlib.import_module(module).PIPELINES)
    return {pipeline.kind: pipeline for pipeline in known}
