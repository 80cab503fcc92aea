"""A small client of Firecracker's API: HTTP/1.1 with JSON over a unix socket.

Source: Firecracker, src/firecracker/swagger/firecracker.yaml. Only what has been there since 1.5 is
sent. Firecracker answers one request after another; connections are short and have one deadline.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from banger.errors import ProgramFailed, TimedOut, WrongState
from banger.model import Value

MAX_ANSWER = 1 << 20
"""Bytes of a body; the longest, a machine's whole configuration, is a few KiB."""

LOOK_AGAIN_S = 0.005
"""Nothing tells that a unix socket begins to listen; Firecracker takes some ten milliseconds."""

Version = tuple[int, int, int]
State = Literal["Not started", "Running", "Paused"]


class Body(Value, omit_defaults=True):
    """What is sent: named as Firecracker names it; a field that is None is left out."""


class MachineConfig(Body):
    """How many CPUs, and how much memory in MiB. With `track_dirty_pages` a snapshot may be a difference."""

    vcpu_count: int
    mem_size_mib: int
    track_dirty_pages: bool | None = None


class BootSource(Body):
    """A kernel (ELF on x86), its command line, and its initrd."""

    kernel_image_path: str
    boot_args: str
    initrd_path: str | None = None


class Drive(Body):
    """A raw disk. `drive_id`: letters, digits and underscores."""

    drive_id: str
    path_on_host: str
    is_root_device: bool
    is_read_only: bool


class NetworkInterface(Body):
    """A network card on a tap."""

    iface_id: str
    host_dev_name: str
    guest_mac: str


class Vsock(Body):
    """A vsock device; hosts reach its guest's ports through the unix socket that Firecracker makes."""

    guest_cid: int
    uds_path: str


class Entropy(Body):
    """A virtio-rng device."""


class Logger(Body):
    """Where Firecracker writes its log lines, from which level on."""

    log_path: str
    level: Literal["Error", "Warning", "Info", "Debug"]


class Metrics(Body):
    """The file or named pipe into which metrics are written, a line of JSON each time."""

    metrics_path: str


class Action(Body):
    """What is to be done at once."""

    action_type: Literal["InstanceStart", "SendCtrlAltDel", "FlushMetrics"]


class Vm(Body):
    """Whether the guest's CPUs run."""

    state: Literal["Paused", "Resumed"]


class SnapshotCreate(Body):
    """Where a paused machine's state and memory are written."""

    snapshot_path: str
    mem_file_path: str
    snapshot_type: Literal["Full", "Diff"]


class MemoryBackend(Body):
    """Where a loaded machine's memory comes from."""

    backend_path: str
    backend_type: Literal["File"]


class SnapshotLoad(Body):
    """A machine to go on with where a snapshot was taken."""

    snapshot_path: str
    mem_backend: MemoryBackend
    resume_vm: bool


class Instance(msgspec.Struct, frozen=True):
    """What Firecracker says that it is; further fields are passed over."""

    id: str
    state: State
    vmm_version: str


class Bounded(socket.socket):
    """A connection on which every wait ends at one moment, however its bytes arrive."""

    deadline = 0.0

    def recv_into(self, *arguments: Any, **more: Any) -> int:
        """Receive; see `socket.socket`. Raises TimeoutError."""
        self._hurry()
        return super().recv_into(*arguments, **more)

    def sendall(self, *arguments: Any) -> None:
        """Send; see `socket.socket`. Raises TimeoutError."""
        self._hurry()
        super().sendall(*arguments)

    def _hurry(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.settimeout(left)


class Api:
    """One connection.

    Each call raises ProgramFailed with Firecracker's words, TimedOut, or WrongState when it hangs up.
    """

    def __init__(self, connection: socket.socket, timeout_s: float):
        """Take a connected socket over; `timeout_s` bounds all that is asked on it."""
        self._socket = Bounded(fileno=connection.detach())
        self._socket.deadline = time.monotonic() + timeout_s
        self._http = http.client.HTTPConnection("localhost")
        self._http.auto_open = 0  # nothing to open: another connection would have another end
        self._http.sock = self._socket

    def close(self) -> None:
        """Hang up."""
        self._http.close()

    def version(self) -> Version:
        """Ask which version of Firecracker this is."""
        return parse_version(str(_fields(self._ask("GET", "/version")).get("firecracker_version")))

    def instance(self) -> Instance:
        """Ask whose machine this is and how it does."""
        try:
            return msgspec.json.decode(self._ask("GET", "/"), type=Instance)
        except msgspec.DecodeError:
            raise _strange() from None

    def machine(self, config: MachineConfig) -> None:
        """Set CPUs and memory. Before the start only."""
        self._send("PUT", "/machine-config", config)

    def boot_source(self, source: BootSource) -> None:
        """Set what is booted. Before the start only."""
        self._send("PUT", "/boot-source", source)

    def drive(self, drive: Drive) -> None:
        """Add a disk, or change the one with this id. Before the start only."""
        self._send("PUT", f"/drives/{drive.drive_id}", drive)

    def network(self, interface: NetworkInterface) -> None:
        """Add a network card. Before the start only."""
        self._send("PUT", f"/network-interfaces/{interface.iface_id}", interface)

    def vsock(self, vsock: Vsock) -> None:
        """Add the vsock device. Before the start only."""
        self._send("PUT", "/vsock", vsock)

    def entropy(self, entropy: Entropy) -> None:
        """Add the source of randomness. Before the start only."""
        self._send("PUT", "/entropy", entropy)

    def logger(self, logger: Logger) -> None:
        """Set where log lines go; once."""
        self._send("PUT", "/logger", logger)

    def metrics(self, metrics: Metrics) -> None:
        """Set where metrics go; once."""
        self._send("PUT", "/metrics", metrics)

    def start(self) -> None:
        """Boot the machine; from here on it cannot be changed."""
        self._send("PUT", "/actions", Action(action_type="InstanceStart"))

    def ctrl_alt_del(self) -> None:
        """Press these keys on the guest's keyboard (x86 only)."""
        self._send("PUT", "/actions", Action(action_type="SendCtrlAltDel"))

    def flush_metrics(self) -> None:
        """Have the metrics written now."""
        self._send("PUT", "/actions", Action(action_type="FlushMetrics"))

    def pause(self) -> None:
        """Stop the guest's CPUs."""
        self._send("PATCH", "/vm", Vm(state="Paused"))

    def resume(self) -> None:
        """Let the guest's CPUs go on."""
        self._send("PATCH", "/vm", Vm(state="Resumed"))

    def snapshot(self, to: SnapshotCreate) -> None:
        """Write down a paused machine."""
        self._send("PUT", "/snapshot/create", to)

    def load(self, source: SnapshotLoad) -> None:
        """Become the machine of a snapshot; only as the first thing, apart from logger and metrics."""
        self._send("PUT", "/snapshot/load", source)

    def _send(self, method: str, path: str, body: Body) -> None:
        self._ask(method, path, msgspec.json.encode(body))

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Send one request and give the answer's body."""
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            self._http.request(method, path, body, headers)
            response = self._http.getresponse()
            answer = response.read(MAX_ANSWER + 1)
        except TimeoutError:
            raise TimedOut("Firecracker's API does not answer.") from None
        except (OSError, http.client.RemoteDisconnected, http.client.NotConnected):
            raise gone() from None
        except http.client.HTTPException:
            raise _strange() from None
        if len(answer) > MAX_ANSWER:
            raise ProgramFailed(f"Firecracker's answer is longer than {MAX_ANSWER} bytes.")
        if response.status >= http.client.BAD_REQUEST:
            raise ProgramFailed(f"Firecracker refused {method} {path}: {_fault(answer)}")
        return answer


@contextlib.contextmanager
def using(connection: socket.socket, timeout_s: float) -> Iterator[Api]:
    """Use a connected socket as an API connection, and close it at the end."""
    api = Api(connection, timeout_s)
    try:
        yield api
    finally:
        api.close()


def connect(path: Path, timeout_s: float) -> socket.socket:
    """Connect to a unix socket. Raises WrongState when nobody listens, TimedOut."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(str(path))
    except TimeoutError:
        connection.close()
        raise TimedOut("Firecracker's API does not answer.") from None
    except OSError:
        connection.close()
        raise gone() from None
    return connection


def parse_version(text: str) -> Version:
    """Read a version like `1.7.0`, `v1.7.0` or `1.17.0-dev`. Raises ProgramFailed."""
    found = re.match(r"v?(\d{1,4})\.(\d{1,4})\.(\d{1,4})(?![\d.])", text)
    if found is None:
        raise ProgramFailed(f"{text[:40]!r} is not a version of Firecracker.")
    return int(found[1]), int(found[2]), int(found[3])


def gone() -> WrongState:
    """Make the error for a Firecracker that is not there."""
    return WrongState("Firecracker is not running.", hint="`banger vm show NAME` tells the VM's state.")


def _strange() -> ProgramFailed:
    return ProgramFailed("Firecracker's answer is not what its API describes.")


def _fields(answer: bytes) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(answer, type=dict[str, Any])
    except msgspec.DecodeError:
        raise _strange() from None
    return fields


def _fault(answer: bytes) -> str:
    """Give what a refusal says, shortened; its body may be anything."""
    with contextlib.suppress(ProgramFailed):
        return str(_fields(answer).get("fault_message"))[:600]
    return answer[:200].decode("utf-8", "replace")
