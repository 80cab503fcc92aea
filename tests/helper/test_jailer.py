"""Firecracker's jailer, by its stand-in: real chroots, real uids, real loop devices, real processes."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger.errors import HostLacks, Refused
from banger.helper import client, inmates, names, trees
from banger.helper.jailer import Jailer, written
from banger.helper.jails import API, CONSOLE_BYTES, UIDS, VSOCK, Inmate
from banger.helper.requests import AnyAsk, JailConnect, JailLaunch, JailRemove, JailSignal, Listing, Request
from banger.testing import jailer as stand_in
from tests.helper.conftest import NEEDS_ROOT

pytestmark = NEEDS_ROOT

# Processes are everybody's: two runs of these tests at one time must not see each other's.
OWNER, VM, OP = 10_000 + os.getpid() % 50_000, "vm-1", "op-1"
JAIL, MARK = names.jail(OWNER, VM), str(names.Mark(OWNER, VM, OP))
UID = UIDS[-1 - os.getpid() % 30_000]


RACE = """
import ctypes, os, signal, time
from pathlib import Path
from banger.helper import inmates

root = os.open({root!r}, os.O_RDONLY)
libc = ctypes.CDLL(None)

def child(inside):
    began, begin = os.pipe()
    pid = os.fork()
    if pid == 0:
        if inside:
            os.fchdir(root); os.chroot("."); os.setgroups([]); os.setgid({uid}); os.setuid({uid})
            libc.prctl(4, 1, 0, 0, 0)
        os.close(began); os.close(begin)
        signal.pause()
    os.close(begin); os.read(began, 1); os.close(began)
    return pid

def end(pid):
    os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)

look = inmates._inmate
lost = 0
for _ in range({rounds}):
    first = child(True)
    inmate = look(first, "jail", root)
    assert inmate is not None and inmate.uid == {uid}
    def look_and_lose(*words):
        global second
        seen = look(*words)
        end(first)
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(first - 1))
        second = child(False)
        assert second == first
        return seen
    inmates._inmate = look_and_lose
    inmates.send("jail", root, inmate, signal.SIGKILL)
    inmates._inmate = look
    time.sleep(0.001)
    lost += os.waitpid(second, os.WNOHANG)[0] != 0
    end(second)
print(lost, "of {rounds}")
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of root's alone where programs and device nodes work."""
    path = Path(tempfile.mkdtemp(prefix="bgj-", dir="/var/lib"))
    (path / "bin").mkdir()
    stand_in.install(path / "bin")
    yield path
    shutil.rmtree(path)


@pytest.fixture
def jailer(place: Path) -> Iterator[Jailer]:
    made = Jailer(str(place / "bin"), str(place / "jails"))
    yield made
    end(made)
    made.remove(JAIL)


def furnish(jailer: Jailer, kernel: bytes = b"kernel") -> None:
    jailer.make(JAIL, MARK)
    with tempfile.TemporaryFile() as file:
        file.write(kernel)
        file.flush()
        jailer.put_file(JAIL, "kernel", file.fileno(), len(kernel), UID)


def start(jailer: Jailer, kernel: bytes = b"kernel", *, answers: bool = True) -> Inmate:
    furnish(jailer, kernel)
    jailer.start(JAIL, UID, MARK)
    return running(jailer, answers=answers)


def running(jailer: Jailer, *, answers: bool = True) -> Inmate:
    for _ in range(1000):
        found = jailer.inmates(JAIL)
        if found and found[0].uid == UID and (not answers or is_open(jailer)):
            return found[0]
        time.sleep(0.01)
    raise AssertionError(said(jailer))


def is_open(jailer: Jailer) -> bool:
    try:
        os.close(jailer.connect(JAIL, API))
    except Refused:
        return False
    return True


def said(jailer: Jailer) -> str:
    console = jailer.console(JAIL)
    assert console is not None
    try:
        return written(console)
    finally:
        os.close(console)


def end(jailer: Jailer) -> None:
    for inmate in jailer.inmates(JAIL):
        jailer.signal(JAIL, inmate, signal.SIGKILL)
        assert jailer.ended(inmate, 10)
    assert jailer.inmates(JAIL) == []


def ask(fd: int, path: str) -> dict[str, object]:
    connection = http.client.HTTPConnection("jail")
    connection.sock = socket.socket(fileno=fd)
    connection.request("GET", path)
    answer: dict[str, object] = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def files_below(path: Path) -> list[str]:
    return sorted(str(found) for found in path.rglob("*"))


def test_what_is_launched_answers_in_its_jail_with_nothing_but_its_own_uid(jailer: Jailer) -> None:
    """Firecracker answers through the descriptor that root connected, and sees its jail alone."""
    inmate = start(jailer)
    assert ask(jailer.connect(JAIL, API), "/")["id"] == JAIL
    seen = ask(jailer.connect(JAIL, API), "/jail")
    assert seen["uids"] == seen["gids"] == [UID] * 3
    files = {"firecracker": f"#!{sys.executable}"[:16], "kernel": "kernel"}
    assert seen["files"] == {**files, "dev": "Is a directory", "run": "Is a directory"}
    assert inmate.pid > 1
    assert inmate.boot_id == inmates.boot_id()
    jailer.signal(JAIL, inmate, signal.SIGTERM)
    assert jailer.ended(inmate, 10)
    assert jailer.inmates(JAIL) == []


def test_its_process_has_no_capability_no_environment_and_no_file_of_roots(jailer: Jailer) -> None:
    """Of root nothing is left to it: no capability, group, variable or descriptor but the console."""
    inmate = start(jailer)
    proc = Path(f"/proc/{inmate.pid}")
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")} == {0}
    assert status["Groups"].strip() == ""
    opened = {str(path.readlink()) for path in (proc / "fd").iterdir()}
    assert {name.split(":")[0].split("/")[-1] for name in opened} <= {"null", "memfd", "socket", "pipe"}
    assert any(name == f"/memfd:{MARK} (deleted)" for name in opened)


def test_a_jail_is_gone_with_everything_in_it(jailer: Jailer, place: Path) -> None:
    """Removal leaves the directory as it was, and may be repeated."""
    furnish(jailer)
    jailer.remove(JAIL)
    before = files_below(place)
    start(jailer)
    end(jailer)
    jailer.remove(JAIL)
    jailer.remove(JAIL)
    assert files_below(place) == before
    assert jailer.jails() == []


def test_a_very_deep_tree_is_removed(jailer: Jailer) -> None:
    """What a guest that broke out of Firecracker leaves in its jail cannot make it unremovable."""
    start(jailer, b"DEEP\n")
    end(jailer)
    jailer.remove(JAIL)
    assert jailer.jails() == []


def test_nothing_outside_is_removed_through_a_link(place: Path) -> None:
    """A symbolic link in a tree is removed, and what it names is not."""
    (place / "tree/a/b").mkdir(parents=True)
    (place / "kept").mkdir()
    (place / "kept/file").write_text("kept")
    (place / "tree/link").symlink_to(place / "kept")
    (place / "tree/a/b/link").symlink_to("/etc")
    above = os.open(place, os.O_RDONLY)
    trees.remove_tree(above, "tree")
    trees.remove_tree(above, "tree")
    os.close(above)
    assert not (place / "tree").exists()
    assert (place / "kept/file").read_text() == "kept"


def test_what_it_writes_is_kept_to_a_bound_and_does_not_end_it(jailer: Jailer) -> None:
    """A guest that writes without end to its console fills one MiB, and Firecracker goes on."""
    start(jailer, b"FLOOD\n")
    text = said(jailer)
    assert text.startswith("Running Firecracker v")
    assert len(text) == CONSOLE_BYTES
    assert jailer.inmates(JAIL)


def test_the_console_is_there_for_a_helper_that_was_started_later(jailer: Jailer, place: Path) -> None:
    """A new helper reads what was written before it lived, while Firecracker lives."""
    inmate = start(jailer)
    later = Jailer(str(place / "bin"), str(place / "jails"))
    assert said(later).startswith("Running Firecracker v")
    assert later.inmates(JAIL) == [inmate]


def test_who_hides_from_proc_is_found_by_the_uid(jailer: Jailer) -> None:
    """A process that does not let itself be looked at is in the jail all the same, and can be ended."""
    assert start(jailer, b"HIDE\n").uid == UID
    end(jailer)


def test_the_jailer_is_an_inmate_before_it_has_given_up_root(jailer: Jailer) -> None:
    """There is no moment after `start` at which what was started is not seen."""
    furnish(jailer)
    jailer.start(JAIL, UID, MARK)
    seen = set()
    while not is_open(jailer):
        (inmate,) = jailer.inmates(JAIL)
        seen.add(inmate.uid)
    assert seen <= {0, UID}
    assert 0 in seen


def test_identity_needs_no_right_to_trace(place: Path) -> None:
    """A helper without CAP_SYS_PTRACE tells its inmates by looking with their own eyes (setfsuid(2))."""
    (place / "jail").mkdir()
    child = subprocess.Popen(["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "sleep", "60"])
    try:
        while Path(f"/proc/{child.pid}/comm").read_text() != "sleep\n":
            time.sleep(0.01)
        script = (
            "import os; from pathlib import Path; from banger.helper.inmates import seen_as\n"
            f"path = Path('/proc/{child.pid}/root')\n"
            "try: path.stat(); print('seen')\n"
            "except PermissionError: print('not seen')\n"
            f"with seen_as({UID}): print(path.stat().st_ino == Path('/').stat().st_ino)\n"
            "print(os.geteuid(), 'CapEff' in Path('/proc/self/status').read_text())\n"
        )
        words = ["setpriv", "--bounding-set", "-sys_ptrace", sys.executable, "-I", "-c", script]
        assert subprocess.check_output(words, text=True).split("\n")[:3] == ["not seen", "True", "0 True"]
    finally:
        child.kill()
        child.wait()


# -- what must be refused ------------------------------------------------------------------------


def test_h48_h49_a_signal_reaches_the_inmate_that_was_seen_and_nobody_else(jailer: Jailer) -> None:
    """Another's pid, init's, a group's, one that is used again: nobody is signalled."""
    inmate = start(jailer)
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        for pid in (stranger.pid, 1, os.getpid()):
            for uid in (0, UID):
                wrong = Inmate(pid=pid, start_ticks=inmate.start_ticks, boot_id=inmate.boot_id, uid=uid)
                jailer.signal(JAIL, wrong, signal.SIGKILL)
        earlier = Inmate(pid=inmate.pid, start_ticks=inmate.start_ticks - 1, boot_id=inmate.boot_id, uid=UID)
        jailer.signal(JAIL, earlier, signal.SIGKILL)
        time.sleep(0.05)
        assert stranger.poll() is None
        assert jailer.inmates(JAIL) == [inmate]
    finally:
        stranger.kill()
        stranger.wait()


# A round takes 8 to 20 ms, of which the forks are most: 100,000 of them would be half an hour.
@pytest.mark.parametrize("rounds", [200, pytest.param(2_000, marks=pytest.mark.slow)])
def test_h49_a_pid_that_is_used_again_between_look_and_signal_is_not_signalled(
    place: Path, rounds: int
) -> None:
    """The inmate ends and its pid is another's between the check and the signal: 0 wins."""
    if not Path("/proc/sys/kernel/ns_last_pid").exists():
        pytest.skip("this kernel gives no chosen pid (CONFIG_CHECKPOINT_RESTORE)")
    (place / "root").mkdir()
    os.chown(place / "root", UID, UID)
    script = place / "race.py"
    script.write_text(RACE.format(root=str(place / "root"), uid=UID, rounds=rounds))
    words = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-I", str(script)]
    assert subprocess.check_output(words, text=True, timeout=120) == f"0 of {rounds}\n"


def test_h48_a_process_of_the_uid_elsewhere_is_no_inmate(jailer: Jailer) -> None:
    """The uid alone is not enough: the root directory must be the jail's."""
    inmate = start(jailer)
    words = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "sleep", "60"]
    stranger = subprocess.Popen(words)
    try:
        while Path(f"/proc/{stranger.pid}/comm").read_text() != "sleep\n":
            time.sleep(0.01)
        assert jailer.inmates(JAIL) == [inmate]
    finally:
        stranger.kill()
        stranger.wait()


def test_h48_root_with_a_foreign_console_is_no_jailer(jailer: Jailer) -> None:
    """A process of root's is the jailer only by the console that carries this VM's mark."""
    furnish(jailer)
    others = os.memfd_create(str(names.Mark(OWNER, "other", OP)))
    stranger = subprocess.Popen(["sleep", "60"], stdout=others)
    try:
        assert jailer.inmates(JAIL) == []
    finally:
        os.close(others)
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize("flaw", ["link", "writable", "owner", "parent", "missing", "directory", "mode"])
def test_h51_a_program_that_another_could_replace_is_not_run(place: Path, flaw: str) -> None:
    """The jailer and Firecracker are root's own files in root's own directories, or are not started."""
    program = place / "bin/firecracker"
    match flaw:
        case "link":
            program.rename(place / "elsewhere")
            program.symlink_to(place / "elsewhere")
        case "writable":
            program.chmod(0o775)
        case "owner":
            os.chown(program, OWNER, OWNER)
        case "parent":
            (place / "bin").chmod(0o777)
        case "missing":
            program.unlink()
        case "directory":
            program.unlink()
            program.mkdir()
        case "mode":
            program.chmod(0o644)
    jailer = Jailer(str(place / "bin"), str(place / "jails"))
    furnish(jailer)
    before = files_below(place)
    with pytest.raises(HostLacks):
        jailer.start(JAIL, UID, MARK)
    assert (files_below(place), jailer.inmates(JAIL)) == (before, [])


@pytest.mark.parametrize(
    ("firecracker", "jailer"), [("1.4.1", "1.4.1"), ("0.25.2", "0.25.2"), ("1.13.2", "1.12.0"), ("one", "1")]
)
def test_h51_an_old_or_mixed_firecracker_is_not_run(place: Path, firecracker: str, jailer: str) -> None:
    """Firecracker is 1.5.0 or newer, and its jailer is of the same version."""
    stand_in.install(place / "bin", firecracker, jailer)
    with pytest.raises(HostLacks):
        Jailer(str(place / "bin"), str(place / "jails")).version()


@pytest.mark.parametrize("version", ["1.5.0", "1.13.1", "1.14.1", "2.0.0"])
def test_versions_from_1_5_are_run(place: Path, version: str) -> None:
    """The version is what both programs say."""
    stand_in.install(place / "bin", version)
    assert str(Jailer(str(place / "bin"), str(place / "jails")).version()) == version


def test_h52_a_jail_that_is_there_already_is_not_used(jailer: Jailer, place: Path) -> None:
    """`make` is the one that creates, or refuses: nothing planted before is in a jail."""
    planted = place / "jails/firecracker" / JAIL / "root"
    furnish(jailer)
    (planted / "firecracker").symlink_to("/etc/passwd")
    with pytest.raises(Refused):
        jailer.make(JAIL, MARK)
    jailer.remove(JAIL)
    jailer.make(JAIL, MARK)
    assert list(planted.iterdir()) == []


@pytest.mark.parametrize("flaw", ["writable", "owner", "link"])
def test_h52_a_base_that_is_not_roots_alone_is_not_used(place: Path, flaw: str) -> None:
    """The directory of all jails is root's, 0700, and no link."""
    base = place / "jails"
    base.mkdir(mode=0o700)
    if flaw == "writable":
        base.chmod(0o777)
    elif flaw == "owner":
        os.chown(base, OWNER, OWNER)
    else:
        base.rename(place / "elsewhere")
        base.symlink_to(place / "elsewhere")
    before = files_below(place)
    with pytest.raises((HostLacks, NotADirectoryError)):
        Jailer(str(place / "bin"), str(base)).make(JAIL, MARK)
    assert files_below(place) == before


def test_h52_a_copy_or_node_never_follows_what_is_there(jailer: Jailer, place: Path) -> None:
    """A file is made new in the jail, or not at all."""
    victim = place / "victim"
    victim.write_text("kept")
    jailer.make(JAIL, MARK)
    root = place / "jails/firecracker" / JAIL / "root"
    (root / "kernel").symlink_to(victim)
    with tempfile.TemporaryFile() as file:
        file.write(b"evil")
        file.flush()
        with pytest.raises(FileExistsError):
            jailer.put_file(JAIL, "kernel", file.fileno(), 4, UID)
    with pytest.raises(FileExistsError):
        jailer.put_device(JAIL, "kernel", "/dev/loop0", UID, False)
    assert (victim.read_text(), victim.stat().st_uid) == ("kept", 0)


def test_h45_a_link_or_file_where_a_socket_should_be_is_not_connected_to(jailer: Jailer, place: Path) -> None:
    """What Firecracker's uid puts at a socket's name leads root nowhere."""
    start(jailer, b"PLANT\n")
    with pytest.raises(Refused):
        jailer.connect(JAIL, VSOCK)
    run = place / "jails/firecracker" / JAIL / "root/run"
    (run / "vsock.socket").unlink()
    (run / "vsock.socket").write_text("")
    with pytest.raises(Refused):
        jailer.connect(JAIL, VSOCK)
    run.rename(run.with_name("away"))
    run.symlink_to("/run")
    with pytest.raises(Refused):
        jailer.connect(JAIL, API)


def test_h45_another_users_socket_in_the_jail_is_not_given(jailer: Jailer, place: Path) -> None:
    """Who listens must be the jail's own user, as the kernel says."""
    start(jailer)
    path = place / "jails/firecracker" / JAIL / "root/run/vsock.socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(Refused):
            jailer.connect(JAIL, VSOCK)


@pytest.mark.parametrize("rounds", [500, pytest.param(100_000, marks=pytest.mark.slow)])
def test_h45_a_socket_that_is_exchanged_all_the_time_never_leads_out(
    jailer: Jailer, place: Path, rounds: int
) -> None:
    """Races for the socket's name: each connection is to the jail's own user, or refused."""
    start(jailer)
    outside = place / "outside.socket"
    run = place / "jails/firecracker" / JAIL / "root/run"
    stop = threading.Event()

    def exchange() -> None:
        while not stop.is_set():
            (run / "swap").symlink_to(outside)
            (run / "swap").rename(run / "vsock.socket")
            (run / "swap").hardlink_to(run / "api.socket")
            (run / "swap").rename(run / "vsock.socket")

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(outside))
        listener.listen(1000)
        listener.setblocking(False)
        swapper = threading.Thread(target=exchange)
        swapper.start()
        won = 0
        try:
            for _ in range(rounds):
                try:
                    os.close(jailer.connect(JAIL, VSOCK))
                    won += 1
                except Refused:
                    pass
        finally:
            stop.set()
            swapper.join()
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert won > 0, "the race was not run"


def test_h55_uids_that_others_have_or_give_away_are_told(jailer: Jailer) -> None:
    """Users, groups, subordinate ids and whatever runs at the moment are spoken for."""
    spoken = jailer.spoken_for()
    assert any(0 in some for some in spoken)
    assert not any(UID in some for some in spoken)
    start(jailer)
    assert any(UID in some for some in jailer.spoken_for())


def test_h56_the_helpers_environment_does_not_reach_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What root's own environment holds is not passed on."""
    for name in ("LD_PRELOAD", "PYTHONPATH", "PYTHONSTARTUP", "BASH_ENV", "IFS"):
        monkeypatch.setenv(name, "/evil")
    jailer = Jailer(str(place / "bin"), str(place / "jails"))
    inmate = start(jailer)
    try:
        assert b"/evil" not in Path(f"/proc/{inmate.pid}/environ").read_bytes()
    finally:
        end(jailer)
        jailer.remove(JAIL)


def test_a_file_that_became_shorter_is_refused(jailer: Jailer) -> None:
    """A copy is whole or is none."""
    jailer.make(JAIL, MARK)
    with tempfile.TemporaryFile() as file:
        file.write(b"short")
        file.flush()
        with pytest.raises(Refused):
            jailer.put_file(JAIL, "kernel", file.fileno(), 6, UID)


def test_a_file_in_memory_is_copied_too(jailer: Jailer, place: Path) -> None:
    """Where the kernel cannot share blocks the bytes are copied; the owner's file offset stays."""
    jailer.make(JAIL, MARK)
    fd = os.memfd_create("kernel")
    data = os.urandom(3 << 20)
    os.write(fd, data)
    jailer.put_file(JAIL, "kernel", fd, len(data), UID)
    assert os.lseek(fd, 0, os.SEEK_CUR) == len(data)
    os.close(fd)
    copy = place / "jails/firecracker" / JAIL / "root/kernel"
    found = copy.stat()
    assert copy.read_bytes() == data
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (UID, UID, 0o400)


def test_many_rounds_leave_no_descriptor_and_no_process(jailer: Jailer) -> None:
    """Launch and removal give back what they took."""
    start(jailer)
    end(jailer)
    jailer.remove(JAIL)
    before = sorted(path.name for path in Path("/proc/self/fd").iterdir())
    for _ in range(5):
        start(jailer)
        end(jailer)
        jailer.remove(JAIL)
    assert sorted(path.name for path in Path("/proc/self/fd").iterdir()) == before


# -- through the helper's socket -----------------------------------------------------------------

CAPABILITIES = (
    "net_admin sys_admin chown fowner dac_override mknod sys_chroot setuid setgid sys_resource kill"
)
"""What systemd/banger-helper.service leaves the helper; CAP_SYS_PTRACE is not among them."""


@contextlib.contextmanager
def helper(place: Path) -> Iterator[Callable[..., client.Answer]]:
    """Run the helper with its unit's capabilities, and give a way to ask it; it is killed at the end."""
    few = ",".join(["-all", *(f"+{name}" for name in CAPABILITIES.split())])
    words = ["setpriv", "--no-new-privs", "--bounding-set", few, "--", sys.executable, "-I", "-m"]
    words += ["banger.workers.root", "--from-checkout", "--owner", "0", "--state", f"{place}/state"]
    words += ["--runtime", f"{place}/run", "--firecracker", f"{place}/bin", "--jails", f"{place}/jails"]
    keys = itertools.count()

    def answer(asked: AnyAsk, *fds: int) -> client.Answer:
        key = f"{os.getpid()}/{time.monotonic_ns()}/{next(keys)}"
        request = Request(op="op-1", step="launch", epoch=1, key=key, ask=asked)
        return client.ask(place / "run/helper.sock", request, fds)

    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "listening" not in (line := process.stdout.readline()):
            assert line, "the helper does not start"
        try:
            yield answer
        finally:
            process.kill()


def test_a_jail_outlives_the_helper_and_the_next_one_goes_on_with_it(place: Path) -> None:
    """Launched, the helper killed -9; the next one connects, ends and removes it: nothing is left."""
    place.chmod(0o755)
    vm = f"vm-{os.getpid()}"
    for name in ("kernel", "initrd", "disk"):
        (place / name).write_bytes(bytes(4096))
    with (
        (place / "kernel").open("rb") as kernel,
        (place / "initrd").open("rb") as initrd,
        (place / "disk").open("r+b") as disk,
    ):
        fds = [file.fileno() for file in (kernel, initrd, disk)]
        with helper(place) as ask_root:
            before = ask_root(Listing()).facts
            launched = ask_root(JailLaunch(vm=vm, disks=1), *fds).facts
        with helper(place) as ask_root:
            assert ask_root(JailLaunch(vm=vm, disks=1), *fds).facts == launched
            (door,) = ask_root(JailConnect(vm=vm, socket="api")).fds
            assert ask(door, "/")["id"] == names.jail(0, vm)
            (console,) = ask_root(JailConnect(vm=vm, socket="console")).fds
            assert written(console).startswith("Running Firecracker v")
            os.close(console)
            assert ask_root(JailSignal(vm=vm, signal="TERM")).facts == {"sent": 1}
            assert ask_root(JailRemove(vm=vm)).facts == {}
            assert ask_root(Listing()).facts == before
