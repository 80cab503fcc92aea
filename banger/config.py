"""Where things are, and what the user may set.

Directories follow the XDG base directory specification. Settings come from
`$XDG_CONFIG_HOME/banger/config.toml`; a key banger does not know is refused by name.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from banger.errors import InvalidRequest
from banger.model import RootDisk, Value

# sun_path of sockaddr_un holds 108 bytes with its NUL (unix(7)).
MAX_SOCKET_PATH = 107

ROOT_SOCKET = Path("/run/banger-root/helper.sock")
"""Where root's helper is asked; there only where it was installed."""


class VmPaths(Value):
    """Every path of one VM, derived here and joined nowhere else."""

    vm: str
    directory: Path
    runtime: Path

    @property
    def overlay(self) -> Path:
        """The writable layer over the shared image, ext4 in a sparse file."""
        return self.directory / "overlay.ext4"

    @property
    def cow(self) -> Path:
        """What was changed of the image, in a sparse file of dm-snapshot's: in place of the overlay."""
        return self.directory / "root.cow"

    def changes(self, root_disk: RootDisk) -> Path:
        """Give the file with what the VM has changed of its image."""
        return self.cow if root_disk == "snapshot" else self.overlay

    @property
    def work(self) -> Path:
        """The disk mounted at /root, ext4 in a sparse file."""
        return self.directory / "work.ext4"

    @property
    def record(self) -> Path:
        """What the VM is made of, should the event log be lost."""
        return self.directory / "vm.json"

    @property
    def host_key(self) -> Path:
        """The guest's SSH host key (OpenSSH format)."""
        return self.directory / "host_key"

    @property
    def known_hosts(self) -> Path:
        """The known_hosts file that pins the guest's host key."""
        return self.directory / "known_hosts"

    @property
    def initrd(self) -> Path:
        """The kernel bundle's initrd with this VM's own files appended."""
        return self.directory / "initrd"

    @property
    def console(self) -> Path:
        """What the guest wrote to its serial console."""
        return self.directory / "console.log"

    @property
    def vmm_log(self) -> Path:
        """What the VMM itself complained about since its last start."""
        return self.directory / "vmm.log"

    def workspace(self, op: str) -> Path:
        """Give the repository with the state of the workspace that an operation brought."""
        return self.directory / f"workspace-{op}"

    def workspaces(self) -> list[Path]:
        """Every such repository that is there."""
        return sorted(self.directory.glob("workspace-*"))

    def parcel(self, op: str) -> Path:
        """Give what is on its way to the guest."""
        return self.workspace(op) / "parcel"

    @property
    def pidfile(self) -> Path:
        """Written and locked by the VMM."""
        return self.runtime / f"{self.vm}.pid"

    @property
    def qmp(self) -> Path:
        """The VMM's control socket."""
        return self.runtime / f"{self.vm}.qmp"

    @property
    def agent(self) -> Path:
        """The guest agent's channel."""
        return self.runtime / f"{self.vm}.agent"

    @property
    def metrics(self) -> Path:
        """The named pipe that holds the VMM's figures, where it has any."""
        return self.runtime / f"{self.vm}.metrics"


class Dirs(Value):
    """The directories of one owner."""

    config: Path
    state: Path
    cache: Path
    runtime: Path

    @property
    def database(self) -> Path:
        """The event log, its projections and the work queue."""
        return self.state / "banger.db"

    @property
    def blobs(self) -> Path:
        """What was fetched from registries, by digest."""
        return self.cache / "blobs"

    @property
    def socket(self) -> Path:
        """The daemon's socket."""
        return self.runtime / "daemon.sock"

    @property
    def daemon_lock(self) -> Path:
        """Held by the daemon for as long as it lives."""
        return self.state / "daemon.lock"

    @property
    def work_bell(self) -> Path:
        """FIFO that wakes an idle worker."""
        return self.runtime / "work.fifo"

    @property
    def event_bell(self) -> Path:
        """FIFO that tells the daemon of new events."""
        return self.runtime / "events.fifo"

    @property
    def log_file(self) -> Path:
        """JSON log lines of the daemon and its workers."""
        return self.state / "log.jsonl"

    @property
    def damaged(self) -> Path:
        """What was found to be wrong with the event log; there until it is good again."""
        return self.state / "damaged.json"

    @property
    def accelerator(self) -> Path:
        """What was found out about KVM and the TSC, valid until the host boots again."""
        return self.state / "accelerator.json"

    @property
    def user_key(self) -> Path:
        """The SSH key that guests let in; its public half is beside it with `.pub`."""
        return self.state / "id_ed25519"

    def vm(self, vm: str) -> VmPaths:
        """Derive the paths of the VM with this id."""
        return VmPaths(vm=vm, directory=self.state / "vms" / vm, runtime=self.runtime)

    def make(self) -> None:
        """Create the directories, private to the owner."""
        for path in (self.state, self.cache, self.runtime, self.state / "vms"):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)


def find_dirs(environ: dict[str, str] | None = None) -> Dirs:
    """Derive the directories from the environment (XDG base directory specification 0.8).

    Raises InvalidRequest when the runtime directory is too deep for a socket.
    """
    env = dict(os.environ) if environ is None else environ
    home = Path(env.get("HOME") or "~").expanduser()
    state = Path(env.get("XDG_STATE_HOME") or home / ".local" / "state") / "banger"
    user_run = Path(f"/run/user/{os.getuid()}")
    if given := env.get("XDG_RUNTIME_DIR"):
        runtime = Path(given) / "banger"
    elif os.access(user_run, os.W_OK):
        runtime = user_run / "banger"
    else:
        runtime = state / "run"
    longest = runtime / "vm-00000000.agent"
    if len(os.fsencode(longest)) > MAX_SOCKET_PATH:
        raise InvalidRequest(
            f"{runtime} is too long a path for a socket.",
            hint="Set XDG_RUNTIME_DIR to a shorter directory.",
        )
    return Dirs(
        config=Path(env.get("XDG_CONFIG_HOME") or home / ".config") / "banger",
        state=state,
        cache=Path(env.get("XDG_CACHE_HOME") or home / ".cache") / "banger",
        runtime=runtime,
    )


_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 30)]
_Mib = Annotated[int, msgspec.Meta(ge=1, le=1 << 30)]
_Kib = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=7 * 24 * 3600)]


_Age = Annotated[float, msgspec.Meta(gt=0)] | Annotated[str, msgspec.Meta(pattern=r"^[1-9][0-9]{0,8}[smhd]$")]
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Limits(Value):
    """What images and bundles may come to: `[limits]` of config.toml, explained in docs/configuration.md."""

    download_mib: _Mib = 20 << 10
    manifest_kib: _Kib = 4 << 10
    image_config_kib: _Kib = 1 << 10
    silence_s: _Seconds = 30.0
    slowest_bytes_s: Annotated[int, msgspec.Meta(ge=0, le=1 << 30)] = 1024
    parallel: Annotated[int, msgspec.Meta(ge=1, le=32)] = 3
    retries: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 5
    content_mib: _Mib = 32 << 10
    entries: _Count = 1_000_000
    names_mib: Annotated[int, msgspec.Meta(ge=1, le=4 << 10)] = 32
    headers_kib: _Kib = 1 << 10
    ratio: _Count = 250
    ratio_from_mib: _Mib = 128
    reading_s: _Seconds = 600.0
    bundle_mib: _Mib = 20 << 10
    bundle_content_mib: _Mib = 64 << 10


def _plain(path: str) -> bool:
    return "\0" not in path and not {"", ".", ".."} & set(path.split("/"))


_BelowHome = Annotated[str, msgspec.Meta(pattern=r"^(~/)?[^/~]")]


class FileSync(Value):
    """A file or directory of the owner's that new VMs get: `[[file_sync]]` of config.toml.

    `host` is below the owner's home, `guest` below /root: the same path, if it is not given.
    """

    host: _BelowHome
    guest: str | None = None
    mode: Annotated[str, msgspec.Meta(pattern=r"^0?[0-7]{3}$")] = "0600"

    def __post_init__(self) -> None:
        """Refuse a path that is not a plain one."""
        if not _plain(self.host.removeprefix("~/")):
            raise ValueError(f"{self.host!a} is not a plain path below your home directory")
        if self.inside.startswith("/") or not _plain(self.inside):
            raise ValueError(f"{self.guest!a} is not a plain path below /root")

    @property
    def inside(self) -> str:
        """Where it goes, relative to /root."""
        guest = self.host if self.guest is None else self.guest
        return guest.removeprefix("~/").removeprefix("/root/")


class Config(Value):
    """The settings of config.toml; a value of None means: derive it from this host."""

    image: str = "debian-12"
    kernel: str = "debian-12"
    registry: str | None = None
    vcpu: int | None = None
    memory_mib: int | None = None
    disk_mib: int = 8192
    overlay_mib: int = 8192
    root_disk: RootDisk = "overlay"
    nat: bool = False
    accelerator: str = "auto"
    vmm: Literal["auto", "qemu", "firecracker"] = "auto"
    workers: int | None = None
    capacity_memory_mib: int | None = None
    capacity_vcpu: int | None = None
    ready_timeout_s: float = 60.0
    catalogs: tuple[str, ...] = ()
    limits: Limits = Limits()
    network: Literal["user", "bridge"] = "user"
    bridge: str = "br-fc"
    bridge_network: str = "172.31.0.0/16"
    egress: str | None = None
    root_socket: str = str(ROOT_SOCKET)
    dns: bool | None = None
    dns_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 42069
    auto_stop_stale_after: _Age | None = None
    git_identity: bool = True
    ssh_key: _BelowHome | None = None
    file_sync: tuple[FileSync, ...] = ()


class Capacity(Value):
    """How much of the host VMs may have together; `disk` is the directory whose free space counts.

    `at_once` bounds how many operations make or start VMs at the same time.
    """

    memory_mib: int
    vcpu: int
    at_once: int
    disk: Path
    disk_reserve_mib: int = 256


class Size(Value):
    """A resolved size and where it came from (`config`, `host` or `default`)."""

    value: int
    source: str


class Sizes(Value):
    """What a VM gets when nothing is asked for."""

    vcpu: Size
    memory_mib: Size
    disk_mib: Size


def load(dirs: Dirs) -> Config:
    """Read config.toml; a missing file means the defaults.

    Raises InvalidRequest naming the file and the key that is unknown or wrong.
    """
    path = dirs.config / "config.toml"
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return Config()
    try:
        return msgspec.convert(tomllib.loads(text), Config)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidRequest(
            f"{path}: {error}", hint="Known keys: " + ", ".join(Config.__struct_fields__)
        ) from None


def host_memory_mib() -> int:
    """Give the host's RAM in MiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (1 << 20)


def host_cpus() -> int:
    """Give the number of CPUs this process may use."""
    return len(os.sched_getaffinity(0))


VCPU_PER_CPU = 16
"""Guests are idle most of the time; 16 is also what OpenStack's scheduler allows by default."""


def workers(config: Config) -> int:
    """Resolve how many workers there are: from config, else one for each CPU, and at least four."""
    return config.workers or max(4, os.cpu_count() or 1)


def dns_wanted(config: Config) -> bool:
    """Resolve whether the daemon answers for `*.vm`: from config, else where VMs have own addresses."""
    return Path(config.root_socket).exists() if config.dns is None else config.dns


def stale_after_s(config: Config) -> float | None:
    """Resolve after how many seconds a VM that nobody has touched is stopped; None: never."""
    age = config.auto_stop_stale_after
    return int(age[:-1]) * _UNITS_S[age[-1]] if isinstance(age, str) else age


def capacity(config: Config, dirs: Dirs) -> Capacity:
    """Resolve what VMs may have together: nine tenths of the RAM, and 16 virtual CPUs for each CPU."""
    return Capacity(
        memory_mib=config.capacity_memory_mib or host_memory_mib() * 9 // 10,
        vcpu=config.capacity_vcpu or host_cpus() * VCPU_PER_CPU,
        at_once=max(1, workers(config) - 1),  # one is left for what is short and makes room
        disk=dirs.state,
    )


def sizes(config: Config) -> Sizes:
    """Resolve default sizes: from config, else from the host.

    vcpu = cpus / 4, between 1 and 4. memory = RAM / 8, between 256 MiB and 8 GiB.
    """

    def pick(configured: int | None, derived: int) -> Size:
        if configured is not None:
            return Size(value=configured, source="config")
        return Size(value=derived, source="host")

    return Sizes(
        vcpu=pick(config.vcpu, max(1, min(4, host_cpus() // 4))),
        memory_mib=pick(config.memory_mib, max(256, min(8192, host_memory_mib() // 8))),
        disk_mib=Size(
            value=config.disk_mib, source="default" if config.disk_mib == Config().disk_mib else "config"
        ),
    )
