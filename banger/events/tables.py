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


class HeadRow(_Table):
    """One row: the log's last event, and how many rows each projection has.

    The counts are kept by triggers that only banger's own connections have: a row that something
    else deletes is not subtracted, and is missed.
    """

    seq = IntegerField()
    hash = BlobField()
    op = IntegerField(default=0)
    work = IntegerField(default=0)
    vm = IntegerField(default=0)
    resource = IntegerField(default=0)
    artifact = IntegerField(default=0)

    class Meta:
        table_name = "head"


class OpRow(_Table):
    """Projection: every operation, one line each. `seq` is its request's: the order of the log."""

    op = TextField(primary_key=True)
    seq = IntegerField(unique=True)
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
    reason = TextField(null=True)
    key = TextField(null=True, unique=True)
    asked = TextField(null=True)

    class Meta:
        table_name = "op"


class WorkRow(_Table):
    """Projection: the queue. One row for each operation that has not ended.

    `due_us` and `deadline_us` are CLOCK_BOOTTIME. Rows of one `lane` run one after another, in
    the order of `seq`. `memory_mib`, `vcpu` and `disk_mib` are what it needs before it may begin.
    """

    op = TextField(primary_key=True)
    seq = IntegerField(unique=True)
    lane = TextField(index=True)
    state = TextField()
    due_us = IntegerField(default=0)
    pid = IntegerField(null=True)
    start_ticks = IntegerField(null=True)
    boot_id = TextField(null=True)
    epoch = IntegerField(default=0)
    deadline_us = IntegerField(null=True)
    cancel = IntegerField(default=0)
    waits_on = TextField(null=True, index=True)
    reason = TextField(null=True)
    memory_mib = IntegerField(default=0)
    vcpu = IntegerField(default=0)
    disk_mib = IntegerField(default=0)

    class Meta:
        table_name = "work"


class VmRow(_Table):
    """Projection: every VM that is not deleted. The name is unique: it is reserved by a row.

    `live`: its VMM was started and has not ended, so it has its memory and its CPUs.
    """

    vm = TextField(primary_key=True)
    seq = IntegerField(unique=True)
    name = TextField(unique=True)
    state = TextField()
    live = IntegerField()
    memory_mib = IntegerField()
    vcpu = IntegerField()
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
TABLES: tuple[Any, ...] = (EventRow, HeadRow, *PROJECTIONS)
VERSION = 3
"""The version of the projections' columns; a database that has another is projected anew."""


def name(table: Any) -> str:
    """Give a table's name in the database."""
    return str(table._meta.table_name)
