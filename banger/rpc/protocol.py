"""What a client may send: one struct per method. This file is the protocol's documentation.

A request is one JSON line `{"method": …, "params": {…}}`. A reply ends with `{"result": …}` or
`{"error": {code, message, hint, op}}`; streaming methods first send `{"event": …}` or
`{"chunk": …}` lines. Several requests may follow one another on one connection. After the reply
to `vm.exec` the connection carries frames (see `banger.rpc.exec`). An unknown method or field is
refused by name.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from banger.errors import BangerError, InvalidRequest
from banger.model import RootDisk, Value

MAX_REQUEST = 1 << 20
"""Bytes of one request line."""


class Request(Value):
    """The parameters of one method."""

    method: ClassVar[str]


class Hello(Request):
    """Is anyone there? -> {version, pid, read_only}."""

    method = "hello"


class DaemonStatus(Request):
    """Tell how the daemon is.

    -> {pid, version, since_us, workers, vms_running, ops_active, state_dir, read_only}.
    """

    method = "daemon.status"


class DaemonStop(Request):
    """End the daemon and its workers; VMs go on running -> {}."""

    method = "daemon.stop"


class VmCreate(Request):
    """Make a VM and start it -> {op, vm, name, spec}. Sizes in MiB; what is left out has a default.

    While an operation makes this very VM, the request joins it -> {op, vm, name, spec, joined}; unless
    `join` is false, or the VM is ephemeral.
    """

    method = "vm.create"
    name: str | None = None
    image: str | None = None
    kernel: str | None = None
    vcpu: int | None = None
    memory_mib: int | None = None
    disk_mib: int | None = None
    nat: bool | None = None
    network: Literal["user", "bridge"] | None = None
    root_disk: RootDisk | None = None
    start: bool = True
    ephemeral: bool = False
    join: bool = True
    key: str | None = None


class OneVm(Request):
    """A request about one VM, by name or id."""

    vm: str


class ChangesVm(OneVm):
    """A request that becomes an operation -> {op, vm, name}, and `joined` when it was under way already.

    `key` makes it idempotent: repeated with the same key it gives the first operation, for ever.
    """

    key: str | None = None


class VmStart(ChangesVm):
    """Start it -> {op, vm, name}."""

    method = "vm.start"


class VmStop(ChangesVm):
    """Switch it off gracefully -> {op, vm, name}."""

    method = "vm.stop"


class VmRestart(ChangesVm):
    """Switch it off and start it -> {op, vm, name}."""

    method = "vm.restart"


class VmKill(ChangesVm):
    """End its VMM at once -> {op, vm, name}."""

    method = "vm.kill"


class VmDelete(ChangesVm):
    """Delete it, whatever its state; what works on it is cancelled first -> {op, vm, name}."""

    method = "vm.delete"


class VmSet(ChangesVm):
    """Change what it is asked to be -> {op, vm, name}. Sizes in MiB; what is left out stays.

    NAT changes at once on a bridge, else from the next start; so do CPUs and memory. A disk only
    grows, while the VM is stopped.
    """

    method = "vm.set"
    nat: bool | None = None
    vcpu: int | None = None
    memory_mib: int | None = None
    disk_mib: int | None = None


class VmShow(OneVm):
    """Everything known of it -> {vm}."""

    method = "vm.show"


class VmSsh(OneVm):
    """How to reach it: with ssh, or at an address -> {argv, host, port, host_key}."""

    method = "vm.ssh"


class VmTouch(OneVm):
    """Say that it is being used: what `auto_stop_stale_after` counts from -> {vm, name}."""

    method = "vm.touch"


class VmPrune(Request):
    """Delete those of these VMs, by id, that are stopped or failed still -> {ops, left}."""

    method = "vm.prune"
    vms: list[str]


class LooksInside(Request):
    """A question that a guest answers, within seconds; it does not count as using the VM."""


class VmPing(LooksInside):
    """Whether it is alive: some round trips to its agent -> {vm, name, via, seconds}."""

    method = "vm.ping"
    vm: str


class VmHealth(LooksInside):
    """Whether it is well -> {vm, name, checks, ok}; a check has {name, status, detail, hint}."""

    method = "vm.health"
    vm: str


class VmPorts(LooksInside):
    """On which TCP ports something listens in it, what that speaks, how to reach it -> {vm, name, ports}."""

    method = "vm.ports"
    vm: str


class VmStats(LooksInside):
    """What VMs use, by their host and by themselves; of all that run, if none is named -> {stats}."""

    method = "vm.stats"
    vms: tuple[str, ...] = ()


class VmTether(OneVm):
    """Bind an ephemeral VM's life to this connection -> {}, and stays open."""

    method = "vm.tether"


class VmLogs(OneVm):
    """Its serial console -> chunk lines, then {}. `tail` lines; `follow` until it stops."""

    method = "vm.logs"
    tail: int | None = None
    follow: bool = False


class WorkspacePrepare(OneVm):
    """Bring a repository of the host's into a running VM -> {op, vm, name}.

    Its working tree as it is, with untracked files if asked for; or the commit `source` as `branch`.
    """

    method = "workspace.prepare"
    repository: str
    branch: str | None = None
    source: str | None = None
    untracked: bool = False
    key: str | None = None


class WorkspaceShow(OneVm):
    """The workspace of a VM that runs, and how to read it -> {workspace, argv, base, limit_mib}."""

    method = "workspace.show"


class VmExec(OneVm):
    """Run a command in it -> {}, then frames.

    `raw` has the words in base64 where one is no UTF-8 (then `argv` is empty). After `timeout_s` seconds all
    that it has started is ended. `plain` refuses a VM with a workspace: whether that is still what the host
    has is for the client to see first.
    """

    method = "vm.exec"
    argv: tuple[str, ...] = ()
    raw: tuple[bytes, ...] = ()
    directory: str | None = None
    environ: tuple[tuple[str, str], ...] = ()
    user: str | None = None
    timeout_s: float | None = None
    plain: bool = False
    tty: bool = False
    term: str = "xterm"
    rows: int = 24
    cols: int = 80


class VmList(Request):
    """All VMs -> {vms}."""

    method = "vm.list"


class VmListAt(Request):
    """The VMs as they were at a moment, in microseconds since the epoch -> {vms}."""

    method = "vm.list-at"
    time_us: int


class VmHistory(OneVm):
    """What was done to the VMs that had this name, the oldest first; also when they are gone -> {ops}."""

    method = "vm.history"


class VmWhy(OneVm):
    """Its last failure, also when it is gone -> {vm, name, state, reason, op}."""

    method = "vm.why"


class VmTable(Request):
    """The VMs as text, without JSON around it; the connection then ends."""

    method = "vm.table"
    all: bool = False


class OpsList(Request):
    """The newest operations -> {ops}."""

    method = "ops.list"
    limit: int = 50
    vm: str | None = None


class OpsShow(Request):
    """One operation with its steps and resources -> {op}. Ids may be shortened."""

    method = "ops.show"
    op: str


class OpsFollow(Request):
    """Its events with seq > `after`, then its end -> event lines, {op, fate, …}.

    The events of an operation that it waits for are among them.
    """

    method = "ops.follow"
    op: str
    after: int = 0


class OpsCancel(Request):
    """Stop it and undo it -> {op}."""

    method = "ops.cancel"
    op: str


class OpsRetry(Request):
    """Go on with a stuck operation from the step that failed; ask anew for one that was undone -> {op}."""

    method = "ops.retry"
    op: str


class OpsRetryUndo(Request):
    """Try again to undo a stuck operation -> {op}."""

    method = "ops.retry-undo"
    op: str


class OpsAbandon(Request):
    """Give a stuck operation up; what it still holds stays in the ledger -> {op}."""

    method = "ops.abandon"
    op: str


class OpsAudit(Request):
    """Compare the ledger with the host -> {acquired, released, held, leaked, missing}."""

    method = "ops.audit"


class OpsSweep(Request):
    """Remove what the audit finds to be nobody's -> {op}."""

    method = "ops.sweep"


class EventsList(Request):
    """Events with seq > `after`, of an operation, a VM or a type if given -> {events}.

    At most `limit` of them, the first or the `newest`, always in order.
    """

    method = "events.list"
    after: int = 0
    limit: int = 1000
    newest: bool = False
    op: str | None = None
    vm: str | None = None
    type: str | None = None


class EventsTail(Request):
    """Every event with seq > `after`, as it comes -> event lines, until the client goes."""

    method = "events.tail"
    after: int = 0


class StateRebuild(Request):
    """Throw the projections away and make them again from the log -> {events, changed, seconds}."""

    method = "state.rebuild"


class ImageList(Request):
    """Images that are there or can be built -> {images}."""

    method = "image.list"


class ImageShow(Request):
    """One image -> {image}."""

    method = "image.show"
    image: str


class ImageBuild(Request):
    """Build an image from its recipe -> {op, name}."""

    method = "image.build"
    image: str
    key: str | None = None


class ImagePull(Request):
    """Pull an image from a registry -> {op, name}. Without a name one is derived from the reference.

    Here and below `vm_kernel` names the kernel of the image's VMs; without one they get the configured one.
    """

    method = "image.pull"
    reference: str
    name: str | None = None
    vm_kernel: str | None = None
    key: str | None = None


class ImageRegister(Request):
    """Take a root file system that is there for an image, where it is -> {op, name}."""

    method = "image.register"
    name: str
    file: str
    vm_kernel: str | None = None
    key: str | None = None


class ImagePromote(Request):
    """Make a copy of banger's own of a registered image -> {op, name}."""

    method = "image.promote"
    name: str
    key: str | None = None


class ImageInstall(Request):
    """Make an image from a bundle {place, sha256, size, origin} -> {op, name}."""

    method = "image.install"
    name: str
    bundle: dict[str, Any]
    vm_kernel: str | None = None
    key: str | None = None


class KernelInstall(Request):
    """Make a kernel from a bundle {place, sha256, size, origin} -> {op, name}."""

    method = "kernel.install"
    name: str
    bundle: dict[str, Any]
    key: str | None = None


class KernelImport(Request):
    """Make a kernel from files; without an initrd, ours is made with the modules given -> {op, name}."""

    method = "kernel.import"
    name: str
    kernel: str
    initrd: str | None = None
    modules: str | None = None
    key: str | None = None


class CachePrune(Request):
    """Remove from the cache what nothing stands for, or only tell -> {op}."""

    method = "cache.prune"
    dry_run: bool = False


class ImageDelete(Request):
    """Delete an image that no VM uses -> {op}."""

    method = "image.delete"
    image: str


class KernelList(Request):
    """Kernels that are there or can be fetched -> {kernels}."""

    method = "kernel.list"


class KernelShow(Request):
    """One kernel -> {kernel}."""

    method = "kernel.show"
    kernel: str


class KernelPull(Request):
    """Fetch a kernel -> {op, name}."""

    method = "kernel.pull"
    kernel: str
    key: str | None = None


class KernelDelete(Request):
    """Delete a kernel that no VM uses -> {op}."""

    method = "kernel.delete"
    kernel: str


def _leaves(cls: type[Request]) -> list[type[Request]]:
    return (
        [cls] if hasattr(cls, "method") else [leaf for sub in cls.__subclasses__() for leaf in _leaves(sub)]
    )


METHODS: dict[str, type[Request]] = {cls.method: cls for cls in _leaves(Request)}


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    method: str
    params: msgspec.Raw = msgspec.Raw(b"{}")


def decode(line: bytes) -> Request:
    """Read a request. Raises InvalidRequest naming what is wrong with it."""
    try:
        envelope = msgspec.json.decode(line, type=_Envelope)
        method = METHODS.get(envelope.method)
        if method is None:
            raise InvalidRequest(
                f"There is no method {envelope.method!r}.",
                hint="The daemon may be older than this command: `banger daemon stop`, then try again.",
            )
        return msgspec.json.decode(envelope.params, type=method)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"The request is not valid: {error}") from None


def result(value: Any) -> bytes:
    """Encode the line that ends a reply well."""
    return msgspec.json.encode({"result": value}) + b"\n"


def failure(error: BangerError) -> bytes:
    """Encode the line that ends a reply badly."""
    return msgspec.json.encode({"error": error.to_dict()}) + b"\n"
