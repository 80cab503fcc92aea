from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest

from banger.vmm import kvm, kvm_guest


class Scripted:
    """A CPU that does what it is told; the numbers are what the guest writes, None is a halt."""

    def __init__(self, *script: int | None):
        self._script = iter(script)
        self._said = 0

    def run(self) -> int:
        step = next(self._script)
        self._said = step or 0
        return kvm_guest.EXIT_HALT if step is None else kvm_guest.EXIT_IO

    def written(self) -> int:
        return self._said


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_the_verdict_is_consistent() -> None:
    """The real answer of this host: usable after all four stages, else with a reason; no child is left."""
    start = time.monotonic()
    verdict = kvm.probe()
    assert time.monotonic() - start < 10
    assert verdict.why
    assert verdict.usable == (verdict.stages == kvm_guest.STAGES)
    assert children() == []


@pytest.mark.skipif(not kvm.accessible(), reason="/dev/kvm does not open here")
def test_the_probe_is_not_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest whose first page table is missing fails, so a usable verdict means something."""
    tables = kvm_guest.page_tables() | {kvm_guest.PML4: bytes(8)}
    monkeypatch.setattr(kvm_guest, "page_tables", lambda: tables)
    assert kvm_guest.verdict()["usable"] is False


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("while True: pass", "did not end"),
        ("import sys; sys.exit(3)", "exited with 3"),
        ("print('not json')", "no answer"),
        ("print('{\"usable\": 1}')", "no answer"),
        ("", "no answer"),
    ],
)
@pytest.mark.usefixtures("_some_kvm")
def test_a_probe_that_goes_wrong_means_unusable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, why: str
) -> None:
    """A probe that hangs, crashes or babbles is an answer too, and its process is gone."""
    file = tmp_path / "guest.py"
    file.write_text(program)
    monkeypatch.setattr(kvm, "GUEST_PROGRAM", file)
    monkeypatch.setattr(kvm, "TIMEOUT_S", 0.5)
    verdict = kvm.probe()
    assert not verdict.usable
    assert why in verdict.why
    assert children() == []


@pytest.fixture
def _some_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(kvm, "DEVICE", device)


def test_no_device_is_no_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the device the answer is immediate and says so."""
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "none")
    assert kvm.probe().why == "There is no /dev/kvm."


def test_the_whole_script_is_needed() -> None:
    """Only the four stages in order and then a halt count as success."""
    for length, end in itertools.product(range(5), (None, 9)):
        stages: list[str] = []
        wrong = kvm_guest.follow(Scripted(*range(1, length + 1), end), stages)  # type: ignore[arg-type]
        assert (wrong is None) == (length == 4 and end is None)
        assert stages == list(kvm_guest.STAGES[:length])


def test_an_endless_guest_is_left() -> None:
    """Exits that never end are not followed for ever."""
    assert kvm_guest.follow(Scripted(*[2] * 100), [])  # type: ignore[arg-type]
    assert kvm_guest.follow(Scripted(*itertools.repeat(1, 100)), [])  # type: ignore[arg-type]


def test_nothing_in_the_guest_overlaps() -> None:
    """Code, tables and stacks each have their own place in the guest's memory."""
    parts = {**kvm_guest.page_tables(), **kvm_guest.descriptor_tables(), **kvm_guest.code()}
    total = len(kvm_guest.page_tables()) + len(kvm_guest.descriptor_tables()) + len(kvm_guest.code())
    assert len(parts) == total
    places = sorted((address, address + len(content)) for address, content in parts.items())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
    assert places[-1][1] <= kvm_guest.MEMORY_BYTES


def test_the_structures_have_the_kernels_sizes() -> None:
    """The ioctl numbers hold the structures' sizes (bits 16 to 29), and ours agree."""
    import ctypes

    assert ctypes.sizeof(kvm_guest.SpecialRegisters) == kvm_guest.KVM_SET_SREGS >> 16 & 0x3FFF
    assert ctypes.sizeof(kvm_guest.Registers) == kvm_guest.KVM_SET_REGS >> 16 & 0x3FFF
