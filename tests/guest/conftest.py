"""Real guests for the tests of this room: kernel and image from the user's own cache."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger import config, proc
from banger.guest import agent, initrd, keys, ssh
from banger.images import base, debian
from banger.images import kernel as kernels
from banger.model import Process
from banger.network import user
from banger.storage import ext4
from banger.vmm.accelerator import choose
from banger.vmm.driver import Disk, Machine
from banger.vmm.qemu import Qemu

NAME = "debian-12"


class Guest:
    """One guest on the given root file system; its disks outlive its VMM."""

    def __init__(self, dirs: config.Dirs, vm: str, root: Path, hostname: str):
        self.dirs, self.root, self.hostname = dirs, root, hostname
        self.paths = dirs.vm(vm)
        self.paths.directory.mkdir(parents=True)
        host_key = keys.make_key_file(self.paths.host_key)
        self.paths.known_hosts.write_text(keys.known_hosts_line(vm, host_key) + "\n")
        keys.make_key_file(dirs.user_key)
        ext4.make(self.paths.overlay, 1024, label="overlay")
        ext4.make(self.paths.work, 1024, label="work")
        self.vmm = Qemu(choose("auto", dirs.cache / "accelerator.json"))
        self.port = user.pick_port(())
        self.process: Process | None = None

    def start(self) -> None:
        """Boot it and wait for its word."""
        vmlinuz, base = kernels.kernel_paths(kernels.build(kernels.RECIPES[NAME], self.dirs.cache))
        initrd.write_initrd(base, self.paths.initrd, self._files())
        self.process = process = self.vmm.launch(self._machine(vmlinuz))
        agent.wait_ready(
            self.paths.agent,
            60.0,
            cancelled=lambda: False,
            alive=lambda: proc.alive(process),
            report=lambda: self.vmm.crash_report(self.paths),
        )

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in it over SSH, with the host key pinned."""
        target = ssh.Target(vm=self.paths.vm, port=self.port, paths=self.paths, key=self.dirs.user_key)
        return subprocess.run(
            [*ssh.argv(target), command],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def run_bytes(self, command: str) -> bytes:
        """Run a command that has to succeed; give its output as it is."""
        target = ssh.Target(vm=self.paths.vm, port=self.port, paths=self.paths, key=self.dirs.user_key)
        words = [*ssh.argv(target), command]
        return subprocess.run(
            words, stdout=subprocess.PIPE, timeout=60, check=True, stdin=subprocess.DEVNULL
        ).stdout

    def gone(self, timeout_s: float = 8.0) -> bool:
        """Wait until it has switched itself off."""
        assert self.process is not None
        return proc.wait_gone(self.process, timeout_s)

    def close(self) -> None:
        """End it."""
        self.vmm.destroy(self.paths.vm, self.paths)

    def _files(self) -> initrd.GuestFiles:
        return initrd.GuestFiles(
            hostname=self.hostname,
            authorized_keys=keys.public_line(self.dirs.user_key.read_bytes()) + "\n",
            host_key_pem=self.paths.host_key.read_bytes(),
            address=f"{user.GUEST_ADDRESS}/{user.PREFIX_LENGTH}",
            gateway=user.GATEWAY,
            nameserver=user.DNS_SERVER,
        )

    def _machine(self, vmlinuz: Path) -> Machine:
        paths = self.paths
        return Machine(
            vm=paths.vm,
            op="op-test",
            name=self.hostname,
            vcpu=1,
            memory_mib=256,
            kernel=vmlinuz,
            initrd=paths.initrd,
            words=initrd.KERNEL_WORDS,
            disks=(
                Disk(serial="base", path=self.root, read_only=True),
                Disk(serial="up", path=paths.overlay),
                Disk(serial="work", path=paths.work),
            ),
            ssh_port=self.port,
            mac=user.mac(paths.vm),
            nat=False,
            paths=paths,
        )


Boot = Callable[..., Guest]


@pytest.fixture
def boot(dirs: config.Dirs) -> Iterator[Boot]:
    """Boot guests: `boot(root=None, hostname="web")`, the default image when no root is given."""
    with contextlib.ExitStack() as guests:

        def one(root: Path | None = None, hostname: str = "web") -> Guest:
            if root is None:
                root = base.path_of(debian.build(debian.RECIPES[NAME], dirs.cache))
            guest = Guest(dirs, f"vm-{hostname}", root, hostname)
            guests.callback(guest.close)
            guest.start()
            return guest

        yield one
