"""KVM or emulation: asked once per boot of the host, remembered in a file."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Literal

import msgspec

from banger.errors import HostLacks, InvalidRequest
from banger.model import Value
from banger.vmm import kvm, tsc

Name = Literal["kvm", "tcg"]


class Accelerator(Value):
    """What runs the guest's instructions, why that, and the host's TSC frequency in kHz."""

    name: Name
    why: str
    tsc_khz: int


class HostFacts(Value):
    """What was measured, and under which circumstances it stays true."""

    boot_id: str
    kvm_accessible: bool
    kvm: kvm.KvmVerdict
    tsc_khz: int


def choose(wanted: str, cache_file: Path) -> Accelerator:
    """Choose `kvm`, `tcg` or, for `auto`, the better one that works; asks the host once per boot.

    Raises HostLacks when `kvm` is wanted and does not work, InvalidRequest for another word.
    """
    return judge(wanted, _remembered(cache_file) or measure(cache_file))


def judge(wanted: str, facts: HostFacts) -> Accelerator:
    """Choose by these facts; see `choose`."""
    if wanted not in ("auto", "kvm", "tcg"):
        raise InvalidRequest(f"{wanted!r} is not an accelerator.", hint="Use auto, kvm or tcg.")
    if wanted == "tcg":
        return Accelerator(name="tcg", why="The configuration asks for it.", tsc_khz=facts.tsc_khz)
    if facts.kvm.usable:
        return Accelerator(name="kvm", why=facts.kvm.why, tsc_khz=facts.tsc_khz)
    if wanted == "kvm":
        raise HostLacks(
            f"KVM does not work here. {facts.kvm.why}", hint='Set accelerator = "auto" in config.toml.'
        )
    return Accelerator(name="tcg", why=facts.kvm.why, tsc_khz=facts.tsc_khz)


def measure(cache_file: Path) -> HostFacts:
    """Ask the host (about 0.1 s) and remember the answer until it boots again."""
    facts = HostFacts(
        boot_id=_boot_id(), kvm_accessible=kvm.accessible(), kvm=kvm.probe(), tsc_khz=tsc.host_khz()
    )
    with contextlib.suppress(OSError):  # an answer that cannot be kept is still an answer
        _write(cache_file, msgspec.json.encode(facts))
    return facts


def _remembered(cache_file: Path) -> HostFacts | None:
    """Give the facts if they are of this boot and access to /dev/kvm was not changed since."""
    try:
        facts = msgspec.json.decode(cache_file.read_bytes(), type=HostFacts)
    except (OSError, msgspec.DecodeError):
        return None
    same = facts.boot_id == _boot_id() and facts.kvm_accessible == kvm.accessible()
    return facts if same else None


def _boot_id() -> str:
    """Give the id that the kernel made when it booted (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()


def _write(path: Path, content: bytes) -> None:
    """Replace a file whole, so that a worker beside us never reads half of it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.flush()
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
