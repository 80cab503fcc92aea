"""The tables: the event log, and the projections that can be rebuilt from it."""

from __future__ import annotations

from typing import Any

from peewee import (
    BlobField,
    CompositeKey,
    FloatField,
    IntegerField,
    Model,
    TextField,
)


class _Table(Model):
    """A table of no database in particular: each query says which log it asks."""


class EventRow(_Table):
    """The log. `hash` = sha256(prev + canonical row): a changed row breaks every later one."""

    seq = IntegerField(primary_key=True)
    stream = TextField()
    version = IntegerField()
    op = TextField(null=True, index=True)
    type = TextField()
    schema = IntegerField()
    data = TextField()
    actor = TextField()
    time_us = IntegerField()
    boot_us = IntegerField()
    prev = BlobField()
    hash = BlobField()

    class Meta:
        table_name = "event"
        indexes = ((("stream", "version"), True),)


class OpRow(_Table):
    """Projection: every operation, one line each."""

    op = TextField(primary_key=True)
    kind = TextField()
    vm = TextField(null=True, index=True)
    name = TextField(null=True)
    parent = TextField(null=True)
    state = TextField()
    fate = TextField(null=True)
    step = TextField(null=True)
    requested_us = IntegerField()
    ended_us = IntegerField(null=True)
    seconds = FloatField(null=True)
    start_boot_us = IntegerField()
    error = TextField(null=True)

    class Meta:
        table_name = "op"


class WorkRow(_Table):
    """Projection: the queue. One row for each operation that has not ended.

    `due_us` and `deadline_us` are CLOCK_BOOTTIME. Rows of one `lane` run one after another, in
    the order of `seq`.
    """

    op = TextField(primary_key=True)
    seq = IntegerField(unique=True)
    lane = TextField(index=True)
    state = TextField()
    due_us = IntegerField(default=0)
    pid = IntegerField(null=True)
    start_ticks = IntegerField(null=True)
    epoch = IntegerField(default=0)
    deadline_us = IntegerField(null=True)
    cancel = IntegerField(default=0)
    waits_on = TextField(null=True, index=True)

    class Meta:
        table_name = "work"


class VmRow(_Table):
    """Projection: every VM that is not deleted. The name is unique: it is reserved by a row."""

    vm = TextField(primary_key=True)
    name = TextField(unique=True)
    state = TextField()
    data = TextField()

    class Meta:
        table_name = "vm"


class ResourceRow(_Table):
    """Projection: the ledger of what operations acquired and have not released."""

    kind = TextField()
    id = TextField()
    state = TextField()
    vm = TextField(null=True, index=True)
    op = TextField()
    step = TextField()
    time_us = IntegerField()

    class Meta:
        table_name = "resource"
        primary_key = CompositeKey("kind", "id")


class ArtifactRow(_Table):
    """Projection: images and kernels by name."""

    kind = TextField()
    name = TextField()
    digest = TextField()
    size_bytes = IntegerField()
    created_us = IntegerField()
    details = TextField()

    class Meta:
        table_name = "artifact"
        primary_key = CompositeKey("kind", "name")


PROJECTIONS: tuple[Any, ...] = (OpRow, WorkRow, VmRow, ResourceRow, ArtifactRow)
TABLES: tuple[Any, ...] = (EventRow, *PROJECTIONS)
