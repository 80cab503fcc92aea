"""A whole VM whose root disk is a dm-snapshot, had by its owner with the command line, on a host that can."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from banger import config
from banger.storage import ext4
from banger.testing import hosted as whole
from banger.testing.hosted import Hosted
from banger.testing.hosted_install import BANGER, PYTHON
from tests.guest import roots

pytestmark = [pytest.mark.guest, pytest.mark.long, pytest.mark.timeout(900)]

UNIT = "banger-snapshot-vm"
STATE, RUNTIME = f"/var/lib/{UNIT}", f"/run/{UNIT}"
OWNER = 1000
PLACE = "/srv/owner"
BOOT_S = 400.0
XDG = " ".join(f"XDG_{word}={PLACE}/{word.lower()}" for word in ("STATE_HOME", "CACHE_HOME", "CONFIG_HOME"))
AS_OWNER = (
    f"setpriv --reuid {OWNER} --regid {OWNER} --clear-groups -- "
    f"env HOME={PLACE} XDG_RUNTIME_DIR={PLACE}/run {XDG}"
)
SETTINGS = f"""\
root_disk = "snapshot"
root_socket = "{RUNTIME}/helper.sock"
memory_mib = 192
vcpu = 1
disk_mib = 64
ready_timeout_s = 300.0
"""

CHECKOUT = Path(__file__).parents[2]
DAEMON_UNIT = (CHECKOUT / "systemd" / "bangerd@.service").read_text("utf-8")
# The daemon's own unit says which devices it and QEMU may open.
DEVICES = " ".join(f"--property '{line}'" for line in re.findall("^Device.*$", DAEMON_UNIT, re.MULTILINE))

# The guest's own root is an overlay, on which no loop device may be; the work disk, at /root, is ext4.
PREPARE = f"""
modprobe -a loop dm_snapshot kvm_amd
udevadm settle
chmod 666 /dev/kvm
mkdir -p /root/owner {PLACE}
mount --bind /root/owner {PLACE}
mkdir -p {PLACE}/config_home/banger {PLACE}/cache_home/banger/kernels {PLACE}/run
cat > {PLACE}/config_home/banger/config.toml
systemd-run --quiet --unit {UNIT} --property StandardOutput=truncate:{RUNTIME}.log --collect -- \
    {PYTHON} -I -m banger.workers.root --state {STATE} --runtime {RUNTIME} --jails {STATE}-jails \
    --owner {OWNER}
until [ -e {RUNTIME}/helper.sock ]; do
    systemctl is-active --quiet {UNIT} || {{ cat {RUNTIME}.log >&2; exit 1; }}
    sleep 0.2
done
"""
DAEMON = f"""
chown -R {OWNER}:{OWNER} {PLACE}
systemd-run --quiet --unit {UNIT}-daemon --collect --property KillMode=process {DEVICES} -- \
    {AS_OWNER} {PYTHON} -I -m banger.rpc.daemon
until [ -S {PLACE}/run/banger/daemon.sock ]; do
    systemctl is-active --quiet {UNIT}-daemon
    sleep 0.2
done
"""
TAKE_AWAY = f"""
{AS_OWNER} {BANGER} vm delete web || :
systemctl stop {UNIT}-daemon {UNIT} || :
pkill -u {OWNER} || :
dmsetup remove_all
losetup --detach-all
umount {PLACE}
rm -rf {STATE} {RUNTIME} {RUNTIME}.log {STATE}-jails /root/owner {PLACE}
modprobe -r kvm_amd
udevadm settle
"""
# What loop(4) and dm have, with their nodes: losetup says nothing where there is none.
LEFT = "losetup --list --noheadings; dmsetup ls; ls /dev/mapper"
NONE_LEFT = "No devices found\ncontrol\n"


@pytest.fixture
def owner(hosted: Hosted, dirs: config.Dirs, tmp_path: Path) -> Iterator[Hosted]:
    """The host, with a root helper, and an owner with a daemon, a kernel and a small root file system."""
    hosted.output(PREPARE, stdin=SETTINGS.encode())
    try:
        hosted.output(["tar", "xz", "-C", PLACE], BOOT_S, stdin=_pack(dirs.cache, tmp_path))
        hosted.output(DAEMON)
        yield hosted
    finally:
        hosted.output(TAKE_AWAY)


def test_a_vm_keeps_what_it_changed_on_a_root_disk_of_roots(owner: Hosted) -> None:
    """Created, written to, stopped, started and deleted with the command line; then nothing is left."""
    sum_before = owner.output(f"sha256sum {PLACE}/tiny.ext4")
    _banger(owner, "image", "register", "tiny", f"{PLACE}/tiny.ext4")
    _banger(owner, "vm", "create", "web", "--image", "tiny", "--wait")
    vm = json.loads(_banger(owner, "vm", "show", "web", "--json"))["vm"]
    device = f"fc-rootfs-{OWNER}-{vm['id']}"
    assert vm["root_disk"] == "snapshot"
    assert ("snapshot", device) in [(held["kind"], held["id"]) for held in vm["resources"]]
    assert owner.output(f"stat -c %u:%a /dev/mapper/{device}") == f"{OWNER}:600\n"
    _inside(owner, "echo kept > /kept; echo changed >> /bin/note; sync")
    assert " / ext4 rw" in _inside(owner, "cat /proc/mounts")

    _banger(owner, "vm", "stop", "web")
    assert owner.output(LEFT) == NONE_LEFT
    _banger(owner, "vm", "start", "web")
    assert _inside(owner, "cat /kept /bin/note") == "kept\nchanged\n"
    start = _last_op(owner, "vm.start")
    assert [step["name"] for step in start["steps"]][:3] == ["check", "port", "snapshot"]

    _banger(owner, "vm", "delete", "web")
    audit = json.loads(_banger(owner, "ops", "audit", "--json"))
    assert (audit["leaked"], audit["missing"], audit["unseen"]) == ([], [], None)
    assert owner.output(LEFT) == NONE_LEFT
    assert owner.output(f"sha256sum {PLACE}/tiny.ext4") == sum_before


def _pack(cache: Path, place: Path) -> bytes:
    """Give a tar archive, for the owner's home, of our kernel and of a root file system that has busybox."""
    kernel = whole.kernel(cache)
    tree: roots.Tree = {"bin/busybox": roots.BUSYBOX.read_bytes(), "bin/sh": "->busybox"}
    archive = roots.archive(place / "root.tar", tree)
    ext4.make_from_tar(place / "tiny.ext4", archive, label="tiny", least_mib=64)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as tar:
        tar.add(kernel.path, f"cache_home/banger/kernels/{kernel.digest}")
        tar.add(place / "tiny.ext4", "tiny.ext4")
    return out.getvalue()


def _banger(owner: Hosted, *words: str) -> str:
    """Run the command line as the owner; it has to succeed."""
    return owner.output([*AS_OWNER.split(), BANGER, *words], BOOT_S)


def _inside(owner: Hosted, command: str) -> str:
    """Run a command in the VM."""
    return _banger(owner, "vm", "exec", "web", "--", "sh", "-c", command)


def _last_op(owner: Hosted, kind: str) -> dict[str, Any]:
    ops = json.loads(_banger(owner, "ops", "list", "--json"))["ops"]
    newest = next(op["id"] for op in ops if op["kind"] == kind)
    found: dict[str, Any] = json.loads(_banger(owner, "ops", "show", newest, "--json"))["op"]
    return found
