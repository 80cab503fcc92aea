"""Is this host fit? A table of small checks; none of them needs the daemon or the network.

A check fails only when VMs cannot work here, and warns when they work worse than they could.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from banger import config, layout, proc
from banger.doctor import bridge, installed, root
from banger.doctor.findings import Check, Host, Status
from banger.errors import BangerError
from banger.events import queries, verify
from banger.network.user import HOST_ADDRESS
from banger.vmm import accelerator

# What the first run writes: image 0.5 GiB, kernel 0.1, and as much again while they are built.
NEEDED_CACHE_MIB = 1536
# Disks are sparse: a fresh VM takes some 10 MiB, and what its guest writes.
NEEDED_STATE_MIB = 512
NEEDED_MEMORY_MIB = 512
NEWEST_EVENTS = 100_000
APT = Path("/etc/apt")

# program, the Debian package that has it, what banger does with it
PROGRAMS = (
    ("qemu-system-x86_64", "qemu-system-x86", "runs the VMs"),
    ("mmdebstrap", "mmdebstrap", "builds images"),
    ("fakeroot", "fakeroot", "keeps owners in images that are built without root"),
    ("mkfs.ext4", "e2fsprogs", "makes disks"),
    ("e2fsck", "e2fsprogs", "checks disks"),
    ("resize2fs", "e2fsprogs", "lets disks grow"),
    ("debugfs", "e2fsprogs", "looks into disks"),
    ("tar2sqfs", "squashfs-tools-ng", "writes images"),
    ("ssh", "openssh-client", "opens shells in VMs"),
    ("setsid", "util-linux", "detaches VMs"),
)


def examine(dirs: config.Dirs, settings: config.Config) -> list[Check]:
    """Run every check, in the order in which a user would mend what fails."""
    host = Host(dirs=dirs, config=settings)
    return [check for examination in EXAMINATIONS for check in examination(host)]


def _programs(_: Host) -> Iterator[Check]:
    versions = _package_versions()
    for program, package, purpose in PROGRAMS:
        try:
            path = proc.which(program, package)
        except BangerError as error:
            yield _lacking(program, f"{error.message[:-1]}; it {purpose}.", error.hint)
        else:
            version = f"{package} {versions[package]}" if package in versions else "not from a package"
            yield Check(name=program, status="pass", detail=f"{path} ({version})")


def _lacking(name: str, detail: str, hint: str | None) -> Check:
    return Check(name=name, status="fail", detail=detail, hint=hint)


def _package_versions() -> dict[str, str]:
    """Give the installed ones of our packages with their versions; nothing where there is no dpkg."""
    try:
        listing = proc.run(
            ["dpkg-query", "--show", "--showformat", r"${Package} ${Version} ${db:Status-Status}\n"]
        )
    except BangerError:
        return {}
    rows = [line.split(" ") for line in listing.splitlines()]
    wanted = {package for _, package, _ in PROGRAMS}
    return {name: version for name, version, state in rows if name in wanted and state == "installed"}


def _subordinate_ids(_: Host) -> Iterator[Check]:
    """Look at what an ordinary user needs to build images with the right owners."""
    name = "user namespaces"
    if os.getuid() == 0:
        yield Check(name=name, status="pass", detail="not needed: this is root")
        return
    user = pwd.getpwuid(os.getuid()).pw_name
    lacking = [file for file in ("/etc/subuid", "/etc/subgid") if not _has_entry(Path(file), user)]
    if not lacking and shutil.which("newuidmap", path=proc.SEARCH_PATH):
        yield Check(name=name, status="pass", detail=f"{user} has subordinate ids, newuidmap is installed")
        return
    found = f"no entry for {user} in {lacking[0]}" if lacking else "newuidmap is not installed"
    fix = f"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
    yield Check(
        name=name,
        status="warn",
        detail=f"{found}: images are built the slower way, with fakechroot",
        hint=f"As root: {fix}" if lacking else "apt-get install uidmap",
    )


def _has_entry(file: Path, user: str) -> bool:
    """Tell whether subuid(5) or subgid(5) has a range for the user, by name or by number."""
    try:
        owners = [line.split(":")[0] for line in file.read_text("utf-8").splitlines()]
    except OSError:
        return False
    return user in owners or str(os.getuid()) in owners


def _config_file(host: Host) -> Iterator[Check]:
    path = host.dirs.config / "config.toml"
    try:
        config.load(host.dirs)
    except (BangerError, OSError) as error:
        hint = error.hint if isinstance(error, BangerError) else f"Make {path} readable."
        yield _lacking("config file", str(error), hint)
        return
    detail = str(path) if path.exists() else f"{path} is not there: defaults are used"
    yield Check(name="config file", status="pass", detail=detail)


def _directories(host: Host) -> Iterator[Check]:
    for name, path in (
        ("state directory", host.dirs.state),
        ("cache directory", host.dirs.cache),
        ("runtime directory", host.dirs.runtime),
    ):
        existing = _nearest(path)
        if os.access(existing, os.W_OK | os.X_OK) and existing.is_dir():
            yield Check(name=name, status="pass", detail=str(path))
        else:
            yield _lacking(
                name,
                f"{existing} is not a writable directory, so {path} cannot be used",
                "Make it writable, or set the XDG directories elsewhere.",
            )


def _socket_length(host: Host) -> Iterator[Check]:
    longest = len(os.fsencode(host.dirs.vm("vm-00000000").agent))
    if longest <= config.MAX_SOCKET_PATH:
        yield Check(name="socket paths", status="pass", detail=f"{longest} of {config.MAX_SOCKET_PATH} bytes")
        return
    yield _lacking(
        "socket paths",
        f"{host.dirs.runtime} makes socket paths of {longest} bytes; {config.MAX_SOCKET_PATH} are allowed",
        "Set XDG_RUNTIME_DIR to a shorter directory.",
    )


def _nearest(path: Path) -> Path:
    """Give the path itself or the nearest of its parents that exists."""
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def _disk_space(host: Host) -> Iterator[Check]:
    for name, path, needed in (
        ("space for VMs", host.dirs.state, NEEDED_STATE_MIB),
        ("space for images", host.dirs.cache, NEEDED_CACHE_MIB),
    ):
        free = shutil.disk_usage(_nearest(path)).free >> 20
        status: Status = "pass" if free >= needed else "fail"
        hint = (
            None if status == "pass" else f"Free {needed - free} MiB, or move the directory to another disk."
        )
        yield Check(name=name, status=status, detail=f"{free} MiB free at {path}", hint=hint)


def _memory(host: Host) -> Iterator[Check]:
    free = _available_memory_mib()
    wanted = max(NEEDED_MEMORY_MIB, config.sizes(host.config).memory_mib.value)
    enough = free >= wanted
    yield Check(
        name="memory",
        status="pass" if enough else "warn",
        detail=f"{free} MiB of {config.host_memory_mib()} MiB are available",
        hint=None if enough else f"A VM gets up to {wanted} MiB: set memory_mib lower in config.toml.",
    )


def _available_memory_mib() -> int:
    """Read MemAvailable (proc(5), /proc/meminfo)."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text("ascii"), re.MULTILINE)
    return int(match[1]) >> 10 if match else 0


def _acceleration(host: Host) -> Iterator[Check]:
    """Ask KVM anew by running code in it, so that an answer which is no longer true is replaced."""
    facts = accelerator.measure(host.dirs.accelerator)
    try:
        chosen = accelerator.judge(host.config.accelerator, facts)
    except BangerError as error:
        yield _lacking("accelerator", error.message, error.hint)
    else:
        slow = chosen.name == "tcg" and host.config.accelerator != "tcg"
        yield Check(
            name="accelerator",
            status="warn" if slow else "pass",
            detail=f"{chosen.name}: {chosen.why}",
            hint="VMs work, but are emulated and slower than with KVM." if slow else None,
        )
    yield Check(name="time-stamp counter", status="pass", detail=f"{facts.tsc_khz / 1000:.3f} MHz")


def _package_sources(_: Host) -> Iterator[Check]:
    """Look for apt sources, from which kernel and images are made; they are not contacted."""
    files = [APT / "sources.list", *sorted((APT / "sources.list.d").glob("*"))]
    used = [file.name for file in files if file.suffix in (".list", ".sources") and _has_source(file)]
    if used:
        yield Check(name="apt sources", status="pass", detail=", ".join(used))
        return
    yield Check(
        name="apt sources",
        status="warn",
        detail=f"none in {APT}",
        hint="Images and kernels that are built already work; new ones need Debian's sources there.",
    )


def _has_source(file: Path) -> bool:
    """Tell whether a file has an entry in either of sources.list(5)'s two formats."""
    try:
        text = file.read_text("utf-8", "replace")
    except OSError:
        return False
    return re.search(r"^(deb\s|Types:(.*\s)?deb(\s|$))", text, re.MULTILINE) is not None


def _sizes(host: Host) -> Iterator[Check]:
    sizes = config.sizes(host.config)
    detail = ", ".join(
        f"{name} {size.value}{unit} (from the {size.source})"
        for name, size, unit in (
            ("vcpu", sizes.vcpu, ""),
            ("memory", sizes.memory_mib, " MiB"),
            ("disk", sizes.disk_mib, " MiB"),
        )
    )
    yield Check(name="default sizes", status="pass", detail=detail)


def _capacity(host: Host) -> Iterator[Check]:
    most = config.capacity(host.config, host.dirs)
    detail = f"VMs may have {most.memory_mib} MiB of memory and {most.vcpu} virtual CPUs together"
    yield Check(name="capacity", status="pass", detail=detail)


def _auto_stop(host: Host) -> Iterator[Check]:
    after_s = config.stale_after_s(host.config)
    detail = "never" if after_s is None else f"VMs that nobody uses for {layout.seconds(after_s)}"
    yield Check(name="auto-stop", status="pass", detail=detail)


def _names(host: Host) -> Iterator[Check]:
    """Look who has the port on which the daemon answers for `*.vm`."""
    where = f"{HOST_ADDRESS}:{host.config.dns_port}"
    if not config.dns_wanted(host.config):
        yield Check(name="names", status="pass", detail="off: `dns` is not set, root's helper is not there")
    elif _is_free(host.config.dns_port):
        yield Check(name="names", status="pass", detail=f"the daemon will answer for *.vm on {where}")
    elif _daemon_has(host.dirs, host.config.dns_port):
        yield Check(name="names", status="pass", detail=f"the daemon answers for *.vm on {where}")
    else:
        yield Check(
            name="names",
            status="warn",
            detail=f"another program has {where}: nobody answers for *.vm",
            hint="Set another dns_port in config.toml and run `banger daemon stop`; VMs work without names.",
        )


def _is_free(port: int) -> bool:
    """Try to have a port for a moment, over UDP and TCP."""
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        with socket.socket(socket.AF_INET, kind) as probe:
            if kind is socket.SOCK_STREAM:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what has just ended is no rival
            try:
                probe.bind((HOST_ADDRESS, port))
            except OSError:
                return False
    return True


def _daemon_has(dirs: config.Dirs, port: int) -> bool:
    """Tell whether the UDP socket on a port is one of the daemon's (proc(5), /proc/net/udp)."""
    address = f"{int.from_bytes(socket.inet_aton(HOST_ADDRESS), sys.byteorder):08X}:{port:04X}"
    rows = [row.split() for row in Path("/proc/net/udp").read_text("ascii").splitlines()]
    sockets = {f"socket:[{row[9]}]" for row in rows if row[1] == address}
    try:
        files = list(Path(f"/proc/{int(dirs.daemon_lock.read_text('ascii'))}/fd").iterdir())
        return any(str(file.readlink()) in sockets for file in files)
    except (OSError, ValueError):
        return False


def _event_log(host: Host) -> Iterator[Check]:
    """Check what the daemon checks before it writes: the newest rows."""
    if not host.dirs.database.exists():
        yield Check(name="event log", status="pass", detail="none yet")
        return
    verdict = verify.verify_log(host.dirs.database, newest=NEWEST_EVENTS)
    try:
        verdict.require_good()
    except BangerError as error:
        yield _lacking("event log", error.message, error.hint)
    else:
        yield Check(name="event log", status="pass", detail=f"{verdict.rows} events, as they were written")


def _stuck_operations(host: Host) -> Iterator[Check]:
    """Warn of operations that wait for a person."""
    found = queries.stuck_in(host.dirs.database)
    for op, kind, name in found:
        yield Check(
            name="stuck operation",
            status="warn",
            detail=f"{op} ({kind}{f' {name}' if name else ''}) could be neither finished nor undone.",
            hint=f"`banger ops show {op}` tells why; then `ops retry`, `ops retry-undo` or `ops abandon`.",
        )
    if not found:
        yield Check(name="operations", status="pass", detail="None is stuck.")


EXAMINATIONS: tuple[Callable[[Host], Iterator[Check]], ...] = (
    _config_file,
    _directories,
    _socket_length,
    _programs,
    _subordinate_ids,
    _package_sources,
    _disk_space,
    _memory,
    _acceleration,
    _sizes,
    _capacity,
    _auto_stop,
    _names,
    _event_log,
    _stuck_operations,
    root.examine,
    bridge.examine,
    installed.examine,
)
