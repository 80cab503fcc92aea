"""The things banger is about: plain frozen values that any room may hold.

Sizes are mebibytes (`_mib`), durations seconds (`_s`), points in time microseconds since the
epoch (`_us`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, dataclass_transform

import msgspec

from banger.errors import InvalidRequest


# Struct options pass to subclasses; dataclass_transform tells the type checker so.
@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen value that knows its JSON form."""


class Process(Value):
    """A process, told apart from a later one with the same pid by its start time and the host's boot.

    `start_ticks` is field 22 of /proc/PID/stat: clock ticks since boot (proc(5)). `boot_id` is the
    beginning of /proc/sys/kernel/random/boot_id (random(4)); empty where it was not recorded.
    """

    pid: int
    start_ticks: int
    boot_id: str


class Resource(Value):
    """Something an operation acquires on the host: `kind` and `id` name it for the ledger."""

    kind: Literal[
        "name",
        "directory",
        "file",
        "port",
        "process",
        "socket",
        "artifact",
        "address",
        "tap",
        "nat",
        "bridge",
        "jail",
        "snapshot",
        "loop",
    ]
    id: str


class Needs(Value):
    """What an operation needs of the host's capacity before it may begin, in MiB and virtual CPUs."""

    memory_mib: int = 0
    vcpu: int = 0
    disk_mib: int = 0


RootDisk = Literal["overlay", "snapshot"]
"""How an image and a VM's changes of it are joined: by overlayfs in the guest, by dm-snapshot on the host."""


class VmSpec(Value):
    """What the user asked for."""

    name: str
    image: str
    kernel: str
    vcpu: int
    memory_mib: int
    disk_mib: int
    nat: bool = False
    ephemeral: bool = False
    network: Literal["user", "bridge"] = "user"
    root_disk: RootDisk = "overlay"


class Workspace(Value):
    """A repository as it was brought into a VM, and what tells later whether it has moved on.

    `commit` is the state that was brought, `head` the commit it stands on (none before the first one),
    `stamp` what the working tree looked like, and `op` the operation that brought it, by which the guest
    knows it too. `git` says whether the guest has it as a checkout; `mise` whether it names tools for mise.
    """

    repository: str
    path: str
    commit: str
    stamp: str
    op: str
    files: int
    size_bytes: int
    head: str | None = None
    branch: str | None = None
    source: str | None = None
    untracked: bool = False
    git: bool = False
    mise: bool = False


class Artifact(Value):
    """A published image or kernel: a directory in the cache, named by what it was made from."""

    kind: Literal["image", "kernel"]
    name: str
    digest: str
    path: Path
    size_bytes: int
    created_us: int
    details: dict[str, str | int | list[str]]


_DNS_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)


def check_vm_name(name: str) -> str:
    """Return `name` if it is a DNS label (RFC 1123, section 2.1), else raise InvalidRequest."""
    if not _DNS_LABEL.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} is not a valid VM name.",
            hint="Use 1 to 63 of a-z, 0-9 and -, with no - at either end, for example web-1.",
        )
    return name


def check_artifact_name(name: str, what: str) -> str:
    """Return the name of an image or kernel if it is a plain word, else raise InvalidRequest."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", name, re.ASCII):
        raise InvalidRequest(
            f"{name!r} is not a valid {what} name.", hint=f"`banger {what} list` shows what there is."
        )
    return name
