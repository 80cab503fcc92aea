"""A guest's way from nothing to a command's end: banger against QEMU started by hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from banger.config import VmPaths
from banger.events.log import EventLog
from banger.guest import agent, initrd, keys, ssh
from banger.images import base as base_file
from banger.images import debian, kernel
from banger.network import user
from banger.storage import ext4
from banger.testing.home import Home
from banger.vmm import accelerator, qemu
from banger.vmm.driver import Disk, Machine
from bench.figures import Figures, median, percentile

PAIRS = 7
BOOTS = 50
MEMORY_MIB = 512


def measure(figures: Figures) -> None:
    """Time `vm run --rm -- true` and the same guest by hand, in turns; then many boots in a row."""
    with Home() as home:
        home.configure(f"memory_mib = {MEMORY_MIB}\n")
        _run_true(home)  # builds what is missing, and starts the daemon
        ours, whole, by_hand = [], [], []
        for _ in range(PAIRS):  # in turns, so that a busy moment hits both
            ended, gone = _run_true(home)
            ours.append(ended)
            whole.append(gone)
            by_hand.append(_by_hand(home))
        figures.add("vm run --rm -- true, to the command's end", median(ours), "s")
        figures.add("vm run --rm -- true, to nothing left", median(whole), "s")
        figures.add("QEMU by hand, to the same command's end", median(by_hand), "s")
        figures.add("vm run / QEMU by hand", median(ours) / median(by_hand), "times", 1.15)
        _many(home, figures)


def _run_true(home: Home) -> tuple[float, float]:
    """Give the seconds from exec of `banger` to the end of the command, and to banger's own end."""
    banger = str(Path(sys.executable).with_name("banger"))
    began = time.perf_counter()
    # The command says when it has run: its one line is passed on before anything is cleaned up.
    run = subprocess.Popen(
        [banger, "vm", "run", "--rm", "--", "sh", "-c", "true; echo end"],
        env=home.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    assert run.stdout is not None
    line = run.stdout.readline()
    ended = time.perf_counter() - began
    _, errors = run.communicate()
    assert line == b"end\n", errors.decode()
    assert run.returncode == 0, errors.decode()
    return ended, time.perf_counter() - began


def _by_hand(home: Home) -> float:
    """Boot the same kernel, image and flags, wait for the guest's word, run the command with ssh.

    Everything that can be prepared is prepared before the clock starts: disks, keys, initrd.
    """
    dirs = home.dirs
    paths = dirs.vm("vm-byhand00")
    shutil.rmtree(paths.directory, ignore_errors=True)
    paths.directory.mkdir(parents=True)
    machine = _machine(home, paths)
    accel = accelerator.choose("auto", dirs.accelerator)
    driver = qemu.Qemu(accel)
    target = ssh.Target(vm=machine.vm, port=machine.ssh_port, paths=paths, key=dirs.user_key)
    try:
        began = time.perf_counter()
        driver.launch(machine)
        agent.wait_ready(
            paths.agent, 60.0, cancelled=lambda: False, alive=lambda: True, report=lambda: "nothing"
        )
        done = subprocess.run(
            [*ssh.argv(target), "true; echo end"], capture_output=True, check=True, stdin=subprocess.DEVNULL
        )
        assert done.stdout == b"end\n"
        return time.perf_counter() - began
    finally:
        driver.destroy(machine.vm, paths)
        shutil.rmtree(paths.directory)


def _machine(home: Home, paths: VmPaths) -> Machine:
    dirs = home.dirs
    kernels, images = kernel.RECIPES["debian-12"], debian.RECIPES["debian-12"]
    vmlinuz, base = kernel.kernel_paths(kernel.build(kernels, dirs.cache))
    host_key, own_key = keys.make_key_file(paths.host_key), keys.make_key_file(dirs.user_key)
    paths.known_hosts.write_text(keys.known_hosts_line(paths.vm, host_key) + "\n")
    ext4.make(paths.overlay, 8192, label="overlay")
    ext4.make(paths.work, 8192, label="work")
    files = initrd.GuestFiles(
        hostname="byhand",
        authorized_keys=keys.public_line(own_key) + "\n",
        host_key_pem=host_key,
        address=f"{user.GUEST_ADDRESS}/{user.PREFIX_LENGTH}",
        gateway=user.GATEWAY,
        nameserver=user.DNS_SERVER,
    )
    initrd.write_initrd(base, paths.initrd, files)
    return Machine(
        vm=paths.vm,
        op="op-byhand00",
        name="byhand",
        vcpu=max(1, min(4, len(os.sched_getaffinity(0)) // 4)),
        memory_mib=MEMORY_MIB,
        kernel=vmlinuz,
        initrd=paths.initrd,
        words=initrd.KERNEL_WORDS,
        disks=(
            Disk(serial="base", path=base_file.path_of(debian.build(images, dirs.cache)), read_only=True),
            Disk(serial="up", path=paths.overlay),
            Disk(serial="work", path=paths.work),
        ),
        ssh_port=user.pick_port(set()),
        mac=user.mac(paths.vm),
        nat=False,
        paths=paths,
    )


def _many(home: Home, figures: Figures) -> None:
    """Boot BOOTS guests one after another; count hangs and second tries in the log."""
    times = [_run_true(home)[0] for _ in range(BOOTS)]
    log = EventLog(home.dirs.database, home.dirs.work_bell, home.path / "own.fifo", "bench")
    failed = [row for row in log.read() if row.event.__class__.__name__ == "StepFailed"]
    log.close()
    figures.add(f"{BOOTS} boots in a row: hangs and retries", len(failed), "", 0)
    figures.add(f"{BOOTS} boots in a row: p50", median(times), "s")
    figures.add(f"{BOOTS} boots in a row: p99", percentile(times, 99), "s")
