"""Root disks by dm-snapshot on a host that has device-mapper, loop devices and udev."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from banger.testing.hosted import Hosted
from banger.testing.hosted_install import PYTHON

pytestmark = pytest.mark.guest

UNIT = "banger-snapshots"
STATE, RUNTIME = f"/var/lib/{UNIT}", f"/run/{UNIT}"
START_S = 180.0
OWNER = 1000
DISKS = "/srv/disks"
DEVICE = f"/dev/mapper/fc-rootfs-{OWNER}-web"
AS_OWNER = f"setpriv --reuid {OWNER} --regid {OWNER} --clear-groups --"

# The guest's own root is an overlay, on which no loop device may be; the work disk, at /root, is ext4.
PREPARE = f"""
modprobe -a loop dm_snapshot
mkdir -p /root/disks {DISKS}
mountpoint -q {DISKS} || mount --bind /root/disks {DISKS}
rm -rf {DISKS}/*
truncate -s 64M {DISKS}/base
mkfs.ext4 -q {DISKS}/base
truncate -s 65M {DISKS}/cow
chown -R {OWNER}:{OWNER} {DISKS}
"""
START = f"""
systemd-run --quiet --unit {UNIT} --property StandardOutput=truncate:{RUNTIME}.log --collect -- \
    {PYTHON} -I -m banger.workers.root --state {STATE} --runtime {RUNTIME} --jails {STATE}-jails \
    --owner {OWNER}
until [ -e {RUNTIME}/helper.sock ]; do
    systemctl is-active --quiet {UNIT} || {{ cat {RUNTIME}.log >&2; exit 1; }}
    sleep 0.2
done
"""
TAKE_AWAY = f"""
systemctl stop {UNIT} || :
dmsetup remove_all
losetup --detach-all
umount {DISKS}
rm -rf {STATE} {RUNTIME} {RUNTIME}.log {STATE}-jails /root/disks {DISKS}
"""
# What loop(4) and dm have, with their nodes: losetup says nothing where there is none.
LEFT = "losetup --list --noheadings; dmsetup ls; ls /dev/mapper"
NONE_LEFT = "No devices found\ncontrol\n"

ASK = """
import json, os, sys
from pathlib import Path
from banger.errors import BangerError
from banger.helper.client import ask
from banger.helper.requests import Listing, Request, SnapshotEnsure, SnapshotRemove

socket, key, verb, *paths = sys.argv[1:]
verbs = {"ensure": SnapshotEnsure, "remove": SnapshotRemove}
asked = verbs[verb](vm="web") if verb in verbs else Listing()
fds = [os.open(path, os.O_RDONLY if path.endswith("base") else os.O_RDWR) for path in paths]
try:
    answer = ask(Path(socket), Request(op="op-web", step="disk", epoch=1, key=key, ask=asked), fds)
except BangerError as error:
    print(json.dumps(error.to_dict()))
else:
    print(json.dumps(answer.facts))
"""

# The handlers themselves, on the kernel, with a ledger that outlives the processes that are killed.
HANDLERS = f"""
import os, sqlite3, sys
from types import SimpleNamespace
from banger.errors import Refused
from banger.helper import devicemapper, storage
from banger.helper.ledger import Ledger
from banger.helper.requests import SnapshotEnsure, SnapshotRemove
from banger.helper.verbs import Call, Caller
from banger.testing.root_disks import dies

kernel = devicemapper.KernelDisks()
assert kernel.can_snapshot()
LEDGER = "/run/{UNIT}.db"

def host(disks=kernel):
    return SimpleNamespace(disks=disks)

def ledger():
    return Ledger(sqlite3.connect(LEDGER, isolation_level=None))

def call(fds=()):
    return Call(caller=Caller(uid={OWNER}, gid={OWNER}), op="op-web", step="disk", epoch=1, fds=tuple(fds))

def ensure(disks=kernel):
    fds = os.open("{DISKS}/base", os.O_RDONLY), os.open("{DISKS}/cow", os.O_RDWR)
    try:
        return storage.ensure(host(disks), ledger(), call(fds), SnapshotEnsure(vm="web"))
    finally:
        for fd in fds:
            os.close(fd)

def remove(disks=kernel):
    return storage.remove(host(disks), ledger(), call(), SnapshotRemove(vm="web"))

def listing():
    return storage.listing(host(), ledger(), {OWNER})

def there():
    loops = [(loop.backing.inode, loop.read_only, loop.leaving) for loop in kernel.loops()]
    node = os.stat("{DEVICE}") if os.path.exists("{DEVICE}") else None
    owner = node and (node.st_uid, oct(node.st_mode))
    rows = sorted((row.kind, row.name, row.state) for row in ledger().of_owner({OWNER}))
    return sorted(loops), [(device.name, device.live) for device in kernel.devices()], owner, rows

NOTHING = ([], [], None, [])
"""
KILLS = """
ensure()
whole = there()
remove()
assert there() == NOTHING, there()
killed = 0
for first in ensure, remove:
    boundary, died = 0, True
    while died:
        boundary += 1
        if first is remove:
            ensure()
        died = dies(first, kernel, boundary)
        killed += died
        # After one effect is before the next: what one finds completed the other finds removed.
        if boundary % 2 == 0:
            ensure()
            assert there() == whole, (first.__name__, boundary, there())
        remove()
        assert there() == NOTHING, (first.__name__, boundary, there())
os.unlink(LEDGER)
print(killed)
"""
HALVES = f"""
import subprocess

def dmsetup(*words):
    subprocess.run(["dmsetup", *words], check=True, stdout=subprocess.DEVNULL)

ensure()
whole = there()
remove()
os.unlink(LEDGER)

# A device that dmsetup was killed over before it gave it a table.
dmsetup("create", "--notable", "--uuid", "BANGER-{OWNER}-web", "fc-rootfs-{OWNER}-web")
assert [row["status"] for row in listing()] == ["half-made"], listing()
ensure()
assert there() == whole, there()

# One whose node it did not get to make, or that an admin has removed or given away.
os.unlink("{DEVICE}")
ensure()
assert there() == whole, there()
os.chown("{DEVICE}", 0, 0)
os.chmod("{DEVICE}", 0o666)
ensure()
assert there() == whole, there()

# One that is open stays whole.
held = os.open("{DEVICE}", os.O_RDONLY)
try:
    remove()
    raise SystemExit("removed while open")
except Refused as refusal:
    print(refusal)
os.close(held)
assert there() == whole, there()

# One that the host's admin removes takes its loop devices along; then it can be made again, and removed.
dmsetup("remove", "fc-rootfs-{OWNER}-web")
assert there()[:2] == NOTHING[:2], there()
ensure()
assert there() == whole, there()
remove()
assert there() == NOTHING, there()

# A node without a device.
os.mknod("{DEVICE}", 0o060600, os.makedev(253, 99))
remove()
assert there() == NOTHING, there()

# Another's device of our name is neither used nor removed.
dmsetup("create", "--notable", "--uuid", "LVM-web", "fc-rootfs-{OWNER}-web")
try:
    ensure()
    raise SystemExit("used another's device")
except Refused as refusal:
    print(refusal)
remove()
assert [device.uuid for device in kernel.devices()] == ["LVM-web"]
dmsetup("remove", "fc-rootfs-{OWNER}-web")
assert there() == NOTHING, there()
os.unlink(LEDGER)
"""
FULL = f"""
BYTES = 64 << 20

def fill(size):
    with open("{DISKS}/cow", "wb") as cow:
        cow.truncate(size)
    ensure()
    device = os.open("{DEVICE}", os.O_WRONLY | os.O_DSYNC)
    try:
        for _ in range(BYTES >> 20):
            os.write(device, os.urandom(1 << 20))
    except OSError as error:
        print(error.strerror)
    finally:
        os.close(device)
    print(*[row["status"].split()[0] for row in listing() if row["kind"] == "snapshot"])
    remove()

# Room for every chunk, for each 256 of them one that lists them, one more list, the header: never full.
chunks = BYTES // 4096
enough = (chunks + chunks // 256 + 3) * 4096
fill(enough)
ensure()
remove()
fill(enough - 2 * 4096)
try:
    ensure()
except Refused as refusal:
    print(refusal)
assert there() == NOTHING, there()
os.unlink(LEDGER)
"""


@pytest.fixture(autouse=True)
def _disks(hosted: Hosted) -> Iterator[None]:
    """Give the owner two files, and look that nothing is left of them."""
    hosted.output(PREPARE)
    yield
    left = hosted.output(LEFT)
    hosted.output(TAKE_AWAY)
    assert left == NONE_LEFT


def test_a_root_disk_lives_through_stops_and_the_helpers_death(hosted: Hosted) -> None:
    """What an owner writes to his device is there after a stop and a start; in the end nothing is left."""
    hosted.output(START, START_S)
    made = _ask(hosted, "1", "ensure", "base", "cow")
    assert made == {"device": DEVICE, "sectors": 64 * 2048}
    sum_before = hosted.output(f"sha256sum {DISKS}/base")
    # His own tools, with his own rights.
    hosted.output(f"""
        echo kept > /run/word
        {AS_OWNER} debugfs -w -R "write /run/word word" {DEVICE}
        {AS_OWNER} e2fsck -fn {DEVICE}
        rm /run/word
    """)
    listed = _ask(hosted, "2", "list")
    assert set(listed) == {"held", "found"}, listed
    assert {row["kind"] for row in listed["held"] + listed["found"]} == {"loop", "snapshot"}

    hosted.output(f"systemctl kill --signal KILL {UNIT}; rm {RUNTIME}/helper.sock; {START}", START_S)
    assert _ask(hosted, "3", "remove") == {}
    assert hosted.output(LEFT) == NONE_LEFT

    assert _ask(hosted, "4", "ensure", "base", "cow") == made
    word = hosted.output(f'{AS_OWNER} e2fsck -fn {DEVICE}; {AS_OWNER} debugfs -R "cat word" {DEVICE}')
    assert word.endswith("kept\n")
    assert hosted.output(f"sha256sum {DISKS}/base") == sum_before
    assert _ask(hosted, "5", "remove") == {}
    assert _ask(hosted, "6", "ensure", "cow", "cow")["code"] == "refused"
    assert _ask(hosted, "7", "list") == {"held": [], "found": []}


@pytest.mark.long
def test_killed_between_any_two_effects_nothing_is_left(hosted: Hosted) -> None:
    """Killed before or after each effect, on the real kernel, the next request completes or removes it."""
    killed = int(hosted.python(HANDLERS + KILLS, timeout_s=240))
    assert killed >= 12 + 2


@pytest.mark.long
def test_what_was_made_by_halves_or_by_others(hosted: Hosted) -> None:
    """A device without table or node is completed; one in use or another's is refused and stays."""
    said = hosted.python(HANDLERS + HALVES, timeout_s=120).splitlines()
    assert [line.split(":")[0] for line in said] == [
        "The VM's root disk is in use",
        f"There is a device fc-rootfs-{OWNER}-web that is not banger's.",
    ]


@pytest.mark.long
def test_h36_one_that_is_full_is_said_to_be_lost(hosted: Hosted) -> None:
    """With room for every chunk it never fills; with less it fails, is listed as lost, and stays refused."""
    enough, short, refusal = _parts(hosted.python(HANDLERS + FULL, timeout_s=120).splitlines())
    assert int(enough.split("/")[0]) > 64 * 2048
    assert short == "Input/output error, Invalid"
    assert "was full once" in refusal


def _parts(lines: list[str]) -> tuple[str, str, str]:
    enough, error, status, refusal = lines
    return enough, f"{error}, {status}", refusal


def _ask(hosted: Hosted, key: str, verb: str, *names: str) -> dict[str, Any]:
    """Ask the helper as the owner; give its facts, or its error."""
    paths = [f"{DISKS}/{name}" for name in names]
    argv = [*AS_OWNER.split(), PYTHON, "-I", "-c", ASK, f"{RUNTIME}/helper.sock", key, verb, *paths]
    facts: dict[str, Any] = json.loads(hosted.output(argv))
    return facts
