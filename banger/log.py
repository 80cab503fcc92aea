"""Structured logging: JSON lines, each stamped with the operation it belongs to."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any, TextIO

import structlog


def setup(role: str, file: Path | None = None) -> None:
    """Send log lines as JSON to `file` (appended) or to standard error.

    `role` (daemon, supervisor, worker) is bound to every line of this process; bind more,
    such as the op id, with `structlog.contextvars.bound_contextvars`.
    """
    stream: TextIO = sys.stderr if file is None else file.open("a", encoding="utf-8", buffering=1)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=True),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(role=role)


def get(**bound: Any) -> Any:
    """Give a logger with `bound` on each of its lines."""
    return structlog.get_logger(**bound)
