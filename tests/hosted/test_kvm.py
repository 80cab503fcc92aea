"""KVM as banger uses it, on a host where it works: the guest's own CPU is emulated, and has SVM."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.guest import cpio
from banger.guest.initrd import KERNEL_WORDS
from banger.testing.hosted import Hosted
from tests.guest.roots import BUSYBOX

pytestmark = pytest.mark.guest

PLACE = "/run/vm"
PROBE = """
from pathlib import Path
import msgspec
from banger.vmm import accelerator
facts = accelerator.measure(Path("/run/accelerator.json"))
chosen = accelerator.choose("auto", Path("/run/accelerator.json"))
print(msgspec.json.encode({"kvm": facts.kvm, "chosen": chosen.name}).decode())
"""
# Its arguments: the kernel, the last thing to wait for on the console, and the kernel's words.
LAUNCH = """
import sys, time
from pathlib import Path
import msgspec
from banger.config import VmPaths
from banger.vmm import accelerator, qmp
from banger.vmm.driver import Machine
from banger.vmm.qemu import Qemu

kernel, last, *words = sys.argv[1:]
place = Path("/run/vm")
paths = VmPaths(vm="vm-inner", directory=place, runtime=place)
machine = Machine(
    vm="vm-inner", op="op-inner", name="inner", vcpu=1, memory_mib=128,
    kernel=Path(kernel), initrd=place / "initrd", words=tuple(words), disks=(),
    ssh_port=20022, mac="02:00:00:00:00:01", nat=False, paths=paths,
)
vmm = Qemu(accelerator.choose("kvm", place / "accelerator.json"))
vmm.launch(machine)
deadline = time.monotonic() + 120
while last not in (said := paths.console.read_text()) and time.monotonic() < deadline:
    time.sleep(0.05)  # it goes to a file
with qmp.connect(paths.qmp, 10) as control:
    asked = control.execute("query-kvm")
vmm.destroy(machine.vm, paths)
print(msgspec.json.encode({"said": said, "kvm": asked, "left": len(vmm.find(machine.vm))}).decode())
"""
INIT = b"""#!/bin/busybox sh
/bin/busybox dmesg | /bin/busybox grep Hypervisor
echo "the end"
while :; do /bin/busybox sleep 60; done
"""


@pytest.fixture(scope="module")
def with_module(hosted: Hosted) -> Iterator[None]:
    hosted.output("modprobe kvm_amd; udevadm settle")
    yield
    hosted.output("modprobe -r kvm_amd; udevadm settle")


@pytest.fixture
def kvm(hosted: Hosted, with_module: None) -> Iterator[Hosted]:
    """The guest, with KVM, and with a directory for a VM of its own."""
    hosted.output(f"mkdir {PLACE}")
    yield hosted
    hosted.output(f"rm -r {PLACE}")


def probed(hosted: Hosted) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(hosted.python(PROBE))
    return found


def launched(hosted: Hosted, kernel: str, initrd: bytes, last: str, *words: str) -> str:
    """Launch a VM with our driver and wait for what it says last; give all that it said."""
    hosted.put(f"{PLACE}/initrd", initrd)
    told = msgspec.json.decode(hosted.python(LAUNCH, kernel, last, *words, timeout_s=180))
    assert told["kvm"] == {"enabled": True, "present": True}
    assert told["left"] == 0
    return str(told["said"])


def test_the_probe_finds_kvm_usable(kvm: Hosted) -> None:
    """Our own probe runs its guest to the end there, and `auto` then means KVM."""
    told = probed(kvm)
    assert told["kvm"]["usable"] is True, told
    assert len(told["kvm"]["stages"]) == 4
    assert told["chosen"] == "kvm"


def test_the_driver_runs_a_guest_with_kvm(kvm: Hosted, tiny_kernel: Path) -> None:
    """A machine that our driver starts runs on KVM, its kernel speaks, and nothing of it is left."""
    kvm.put(f"{PLACE}/kernel", tiny_kernel.read_bytes())
    assert launched(kvm, f"{PLACE}/kernel", b"nothing", "ok") == "ok\n"


def test_linux_boots_with_kvm(kvm: Hosted) -> None:
    """Debian's kernel boots to its first program in a machine of our driver's, and finds that KVM runs it."""
    initrd = cpio.archive(
        [
            cpio.directory("dev"),
            cpio.Entry(path="dev/console", mode=stat.S_IFCHR | 0o600, device=(5, 1)),
            cpio.directory("bin"),
            cpio.file("bin/busybox", BUSYBOX.read_bytes(), 0o755),
            cpio.file("init", INIT, 0o755),
        ]
    )
    said = launched(kvm, "/vmlinuz", initrd, "the end", *KERNEL_WORDS)
    assert "Hypervisor detected: KVM" in said
    assert "the end" in said


def test_without_its_module_there_is_no_kvm(hosted: Hosted) -> None:
    """On the same host without KVM's module our probe says no: its yes means something."""
    hosted.output("modprobe -r kvm_amd; udevadm settle")
    assert probed(hosted) == {
        "kvm": {"usable": False, "why": "There is no /dev/kvm.", "stages": []},
        "chosen": "tcg",
    }
