"""Get Debian packages from this machine's own package sources, without root."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from banger import proc
from banger.errors import BangerError, DiskFull, HostLacks, ProgramFailed

APT = Path("/etc/apt")
TIMEOUT_S = 900.0
# Nothing of this is read in a throw-away machine, and writing it takes a fifth of the time.
_LEAVE_OUT = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*")


def bootstrap(
    out: Path,
    *,
    suite: str,
    variant: str,
    include: Sequence[str],
    cancelled: Callable[[], bool],
) -> None:
    """Write a root file system of Debian packages to `out`, a tar archive.

    `variant` is mmdebstrap's: `minbase` installs, `extract` only unpacks. Raises HostLacks when
    this machine has no Debian package sources or mmdebstrap is missing, ProgramFailed when a
    package cannot be had.
    """
    mode = _mode()
    words = [
        # Its mounts of /proc and /sys must go with it, however it ends: never be on the host.
        *(["unshare", "--mount"] if mode == "root" else []),
        "mmdebstrap",
        "--quiet",
        f"--mode={mode}",
        f"--variant={variant}",
        f"--include={','.join(include)}",
        '--aptopt=Acquire::Languages "none"',
        *(f"--dpkgopt=path-exclude={path}" for path in _LEAVE_OUT),
        "--format=tar",
        suite,
        str(out),
        "-",
    ]
    stdin = sources(suite).encode()
    proc.which("mmdebstrap")
    with _scratch(mode, out.parent) as scratch:
        try:
            # umask: ours is private, and packages' scripts make files that everyone must read.
            proc.run(
                words,
                stdin=stdin,
                env={"TMPDIR": str(scratch)},
                timeout_s=TIMEOUT_S,
                cancelled=cancelled,
                umask=0o022,
                mark=str(out.parent),
            )
        except ProgramFailed as error:
            raise _explained(error) from None


def _explained(error: ProgramFailed) -> BangerError:
    """Tell a full disk, and a machine on which nobody but root may be root, from one without packages."""
    if "No space left on device" in error.message:
        return DiskFull("There is no space left on the disk for the Debian packages.")
    told = error.message.replace("unshare exited", "mmdebstrap exited", 1)
    message = f"Debian packages could not be had: {told}"
    if re.search("newuidmap|newgidmap|unshare the user namespace", told):
        return ProgramFailed(
            message,
            hint="User namespaces do not work for this user: is uidmap installed, its newuidmap setuid, and"
            " is the user in /etc/subuid and /etc/subgid? `banger doctor` looks.",
        )
    return ProgramFailed(message, hint="Does `apt-get update` work here? banger uses the same sources.")


@contextlib.contextmanager
def _scratch(mode: str, beside: Path) -> Iterator[Path]:
    """Give mmdebstrap a directory to work in and remove it: one that is killed leaves its root there.

    With subordinate ids it is below /tmp: they may not enter the user's own directories.
    """
    scratch = Path(tempfile.mkdtemp(prefix="banger-", dir=None if mode == "unshare" else beside))
    scratch.chmod(0o755)
    try:
        yield scratch
    finally:
        if mode == "unshare":
            # What belongs to subordinate ids only they can remove; they cannot enter the rest.
            below = ["find", str(scratch), "-xdev", "-mindepth", "2", "-delete"]
            _try(["mmdebstrap", "--unshare-helper", *below])
        _try(["rm", "-rf", "--one-file-system", str(scratch)])


def _try(words: list[str]) -> None:
    """Run a program of which we ask nothing: why its caller ends matters more."""
    with contextlib.suppress(BangerError):
        proc.run(words)


def _mode() -> str:
    """Choose how mmdebstrap becomes root: it is, or has a range of user ids, or pretends.

    The range is asked for by trying: in a container or a chroot it may be listed and still be refused.
    """
    if os.getuid() == 0:
        return "root"
    try:
        proc.run(["unshare", "--map-root-user", "--map-auto", "true"])
    except BangerError:
        return "fakechroot"
    return "unshare"


def sources(suite: str, apt: Path = APT) -> str:
    """Give this machine's Debian package sources, as one-line entries for `suite`.

    Entries of other vendors are left out. Raises HostLacks when none is left. Format: sources.list(5).
    """
    found = [*_one_line(apt), *_deb822(apt)]
    lines = [line for line in (_for_suite(entry, suite) for entry in found) if line is not None]
    if not lines:
        raise HostLacks(
            "This machine has no Debian package sources.",
            hint="Local recipes need Debian; list a mirror of it in /etc/apt/sources.list.d/debian.sources.",
        )
    return "".join(f"{line}\n" for line in dict.fromkeys(lines))


Entry = tuple[str, str, str, str]
"""Options in brackets or nothing, address, suite, components."""


def _one_line(apt: Path) -> Iterator[Entry]:
    for path in [apt / "sources.list", *sorted(apt.glob("sources.list.d/*.list"))]:
        for line in _read(path).splitlines():
            match = re.fullmatch(r"\s*deb\s+(\[[^]]*\]\s+)?(\S+)\s+(\S+)\s+([^#]*)(#.*)?", line)
            if match:
                options, address, suite, components, _ = match.groups()
                yield (options or "").strip(), address, suite, components.strip()


def _deb822(apt: Path) -> Iterator[Entry]:
    for path in sorted(apt.glob("sources.list.d/*.sources")):
        for stanza in re.split(r"\n\s*\n", _read(path)):
            lines = [line for line in stanza.splitlines() if not line.startswith("#")]
            fields = {
                key.strip().lower(): value.strip()
                for key, colon, value in (line.partition(":") for line in lines)
                if colon
            }
            if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes") == "no":
                continue
            key = fields.get("signed-by", "")
            options = f"[signed-by={key}]" if key.startswith("/") else ""
            for address in fields.get("uris", "").split():
                for suite in fields.get("suites", "").split():
                    yield options, address, suite, fields.get("components", "")


def _for_suite(entry: Entry, suite: str) -> str | None:
    """Give the entry for another Debian release; None when it is not Debian's own.

    Other vendors call their repositories `debian` and their component `main` too, but sign with a
    key of theirs or do not name their suites after releases.
    """
    options, address, here, components = entry
    release, dash, pocket = here.partition("-")
    key = re.search(r"signed-by=([^] ]+)", options)
    debian = (
        re.search(r"/debian(-security)?/?$", address)
        and "main" in components.split()
        and release == _codename()
        and (key is None or Path(key[1]).name.startswith("debian-archive-"))
    )
    if not debian or (dash and pocket not in ("updates", "security")):
        return None
    return f"deb {options} {address} {suite}{dash}{pocket} main".replace("  ", " ")


def _codename() -> str:
    """Give this machine's release, as its sources call it (os-release(5))."""
    match = re.search(r"^VERSION_CODENAME=(\S+)$", _read(Path("/etc/os-release")), re.MULTILINE)
    return match[1] if match else ""


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return ""
