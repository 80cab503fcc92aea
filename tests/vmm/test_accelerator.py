from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from banger.errors import HostLacks, InvalidRequest
from banger.vmm import accelerator, kvm, tsc
from banger.vmm.accelerator import HostFacts
from banger.vmm.kvm import KvmVerdict


def facts(usable: bool) -> HostFacts:
    return HostFacts(
        boot_id="x", kvm_accessible=True, kvm=KvmVerdict(usable=usable, why="because"), tsc_khz=1_000_000
    )


def forbid_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> KvmVerdict:
        raise AssertionError("the host was asked again")

    monkeypatch.setattr(kvm, "probe", asked)


@pytest.mark.parametrize(
    ("wanted", "usable", "name"),
    [("auto", True, "kvm"), ("auto", False, "tcg"), ("tcg", True, "tcg"), ("kvm", True, "kvm")],
)
def test_the_better_one_that_works(wanted: str, usable: bool, name: str) -> None:
    """KVM is taken where it works and nothing else was asked for."""
    chosen = accelerator.judge(wanted, facts(usable))
    assert chosen.name == name
    assert chosen.why
    assert chosen.tsc_khz == 1_000_000


def test_kvm_that_does_not_work_is_refused() -> None:
    """Who insists on KVM is told why it cannot be; a misspelt word is told the right ones."""
    with pytest.raises(HostLacks, match="because"):
        accelerator.judge("kvm", facts(usable=False))
    with pytest.raises(InvalidRequest):
        accelerator.judge("kvn", facts(usable=True))


def test_the_host_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second choice gives the first one's answer without running anything."""
    first = accelerator.choose("auto", tmp_path / "cache")
    forbid_asking(monkeypatch)
    assert accelerator.choose("auto", tmp_path / "cache") == first
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"]


@pytest.mark.parametrize("change", ["boot_id", "kvm_accessible", "rubbish", "half"])
def test_a_stale_answer_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """After a reboot, a change of access, or damage to the file the host is asked again."""
    cache = tmp_path / "cache"
    known = accelerator.measure(cache)
    match change:
        case "boot_id":
            cache.write_bytes(msgspec.json.encode(msgspec.structs.replace(known, boot_id="another")))
        case "kvm_accessible":
            other = msgspec.structs.replace(known, kvm_accessible=not known.kvm_accessible)
            cache.write_bytes(msgspec.json.encode(other))
        case "rubbish":
            cache.write_bytes(b"\x00{}")
        case "half":
            cache.write_bytes(cache.read_bytes()[:40])
    forbid_asking(monkeypatch)
    with pytest.raises(AssertionError, match="asked again"):
        accelerator.choose("auto", cache)


def test_an_answer_that_cannot_be_kept_is_still_given(tmp_path: Path) -> None:
    """A cache directory that is not there costs time, not the VM."""
    assert accelerator.choose("tcg", tmp_path / "none" / "cache").name == "tcg"


def test_timing_the_counter_is_right_to_a_thousandth() -> None:
    """Two timings agree with each other and, where KVM can be asked, with what it says."""
    timed = [tsc._timed() for _ in range(3)]
    told = tsc._from_kvm() or timed[0]
    assert all(abs(khz - told) / told < 0.001 for khz in timed)
