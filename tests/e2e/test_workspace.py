"""Repositories in real guests: brought whole or not at all, and their changes brought back."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from banger import config, proc
from banger.images import kernel as kernels
from banger.testing.home import Home
from bench import workspace as bench
from tests.guest import roots
from tests.images import tiny
from tests.workspace.conftest import WEIRD, Repo

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

ROOM_MIB = 96
EDITS = r"""
set -e
cd /root/my-repo
echo two >> file
rm link
chmod -x program
printf '\0\1\377' > 'new '\''binary'\'' file'
mkdir -p deep/er
ln -s nowhere deep/er/link
mv a\ *d weird
echo no > x.ignored
"""

LARGE_EDITS = r"""
cd /root/large
for file in d*/file-*0; do echo edited >> "$file"; done
rm d1/*
chmod +x d2/*
cp -r d3 copied
"""


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    return Repo(tmp_path / "my repo")


@pytest.fixture(scope="module")
def made(home: Home) -> str:
    """A VM whose disk is small, so that it can be filled."""
    done = home.banger("vm", "create", "web", "--disk-size", f"{ROOM_MIB}M", "--wait")
    assert done.returncode == 0, done.stderr
    return "web"


@pytest.fixture
def clean(home: Home, web: str) -> Iterator[str]:
    """The VM with nothing in /root."""
    yield web
    inside(
        home, "cd /; rm -rf /root/* /root/.banger; [ -e /usr/bin/tig ] && mv /usr/bin/tig /usr/bin/git; true"
    )


def inside(home: Home, script: str) -> bytes:
    """Run a script in the VM by the ssh program alone."""
    argv = home.json("vm", "ssh", "web")["argv"]
    done = subprocess.run([*argv, shlex.join(["sh", "-c", script])], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def prepare(home: Home, repo: Repo, *words: str) -> Any:
    answer = home.json("vm", "workspace", "prepare", "web", str(repo.root), *words)
    assert answer.get("fate") == "done", answer
    return answer


def exported(home: Home, *words: str) -> bytes:
    argv = home.argv("vm", "workspace", "export", "web", *words)
    done = subprocess.run(argv, env=home.environ, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tree(root: Path) -> dict[bytes, tuple[int, bytes]]:
    """Give every file and link below a directory: its kind with its x bit, and its content."""
    found = {}
    for place, directories, files in os.walk(os.fsencode(root)):
        if b".git" in directories:
            directories.remove(b".git")
        for name in files:
            path = os.path.join(place, name)  # noqa: PTH118  names are bytes
            mode = os.lstat(path).st_mode
            link = os.path.islink(path)  # noqa: PTH114
            content = os.readlink(path) if link else Path(os.fsdecode(path)).read_bytes()  # noqa: PTH115
            found[os.path.relpath(path, os.fsencode(root))] = (mode & 0o170100, content)
    return found


def in_guest(home: Home, path: str, into: Path) -> dict[bytes, tuple[int, bytes]]:
    """Give the same of a directory in the guest, by way of a tar."""
    into.mkdir()
    archive = inside(home, f"tar -c -C {path} .")
    subprocess.run(["tar", "-x", "-C", into, "--exclude=*.ignored"], input=archive, check=True)
    return tree(into)


def test_a_dirty_checkout_there_and_back(home: Home, clean: str, repo: Repo, tmp_path: Path) -> None:
    """Files of any name come as they are, as a checkout; edits go back as a patch; trees are equal."""
    repo.write("file", b"dirty\n")
    shown = prepare(home, repo)
    assert in_guest(home, "/root/my-repo", tmp_path / "before") == tree(repo.root)
    assert inside(home, "cd /root/my-repo; git status --porcelain") == b" M file\n"
    assert (
        inside(home, "cd /root/my-repo; git log --format=%s -1; git branch --show-current")
        == b"a commit\nmain\n"
    )
    vm = home.json("vm", "show", "web")["vm"]
    assert vm["workspace"]["path"] == "/root/my-repo"
    assert vm["workspace"]["op"] == shown["op"]
    assert "/root/my-repo" in home.banger("ps").stdout

    inside(home, EDITS + "git add file; git rm --quiet --cached program")
    index = inside(home, "cd /root/my-repo; sha256sum .git/index; find .git -type f | wc -l")
    patch = exported(home)
    assert inside(home, "cd /root/my-repo; sha256sum .git/index; find .git -type f | wc -l") == index
    subprocess.run(["git", "-C", repo.root, "apply", "--binary", "-"], input=patch, check=True)
    assert in_guest(home, "/root/my-repo", tmp_path / "after") == tree(repo.root)
    assert WEIRD not in tree(repo.root)


def test_in_a_guest_without_git(home: Home, clean: str, repo: Repo, tmp_path: Path) -> None:
    """Plain files come; the host's git makes the patch, without what it ignores."""
    inside(home, "mv /usr/bin/git /usr/bin/tig")
    prepare(home, repo)
    assert in_guest(home, "/root/my-repo", tmp_path / "before") == tree(repo.root)
    inside(home, EDITS)
    patch = exported(home)
    assert b"x.ignored" not in patch
    subprocess.run(["git", "-C", repo.root, "apply", "--binary", "-"], input=patch, check=True)
    assert in_guest(home, "/root/my-repo", tmp_path / "after") == tree(repo.root)


def test_against_another_commit(home: Home, clean: str, repo: Repo) -> None:
    """--base tells what the guest's tree is to a commit of the host's, that the guest never had."""
    repo.write("later", b"later\n")
    repo.commit()
    prepare(home, repo)
    assert exported(home) == b""
    assert b"+++ b/later" in exported(home, "--base", "HEAD~1")
    assert home.banger("vm", "workspace", "export", "web", "--base", "nothing").returncode == 3


def test_a_full_tmp_is_no_matter(home: Home, clean: str, repo: Repo) -> None:
    """Neither way needs /tmp in the guest."""
    inside(home, "mount -t tmpfs -o ro none /tmp")
    try:
        prepare(home, repo)
        inside(home, "echo more >> /root/my-repo/file")
        assert b"+more" in exported(home)
    finally:
        inside(home, "umount /tmp")


def test_a_commit_on_a_branch(home: Home, clean: str, repo: Repo) -> None:
    """--branch and --from bring a commit without what came after, on a branch of that name."""
    repo.write("file", b"later\n")
    repo.commit()
    prepare(home, repo, "--branch", "try", "--from", "HEAD~1")
    script = "cd /root/my-repo; git branch --show-current; cat file; git status --porcelain"
    assert inside(home, script) == b"try\none\n"


def test_bringing_it_again_keeps_what_was_there(home: Home, clean: str, repo: Repo) -> None:
    """What was edited in the guest stays beside, until the next time."""
    prepare(home, repo)
    inside(home, "echo mine > /root/my-repo/file")
    repo.write("file", b"yours\n")
    prepare(home, repo)
    assert inside(home, "cat /root/my-repo/file /root/.banger/my-repo/before/tree/file") == b"yours\nmine\n"
    assert exported(home) == b""


def test_a_directory_of_the_users_is_not_taken(home: Home, clean: str, repo: Repo) -> None:
    """What banger did not bring, it does not replace."""
    inside(home, "mkdir /root/my-repo; echo mine > /root/my-repo/file")
    refused = home.banger("vm", "workspace", "prepare", "web", str(repo.root))
    assert refused.returncode == 4
    assert "not a workspace" in refused.stderr
    assert inside(home, "cat /root/my-repo/file") == b"mine\n"


def test_a_full_disk_leaves_the_old_one(home: Home, clean: str, repo: Repo) -> None:
    """Both when it can be told before, and when the room goes while the workspace comes."""
    prepare(home, repo)
    repo.write("large", os.urandom(80 << 20))
    repo.git("add", "large")
    told = home.banger("vm", "workspace", "prepare", "web", str(repo.root))
    assert told.returncode == 6
    assert "MiB left" in told.stderr
    repo.write("large", os.urandom(24 << 20))
    inside(home, "rm -rf /root/.banger/my-repo/before")
    # What looks free is promised to another: ext4 counts it when it is written.
    inside(home, "cd /root; (sleep 2; dd if=/dev/zero of=filler bs=1M) > /dev/null 2>&1 &")
    full = home.banger("vm", "workspace", "prepare", "web", str(repo.root))
    assert full.returncode == 6, full.stderr
    assert "disk is full" in full.stderr
    assert inside(home, "cd /root/my-repo; git status --porcelain; ls; cat ../.banger/my-repo/ready") != b""
    assert inside(home, "ls -d /root/my-repo/large /root/.banger/my-repo/new || true") == b""
    inside(home, "rm /root/filler")
    assert exported(home) == b""


def test_a_cut_connection_leaves_the_old_one(home: Home, clean: str, repo: Repo) -> None:
    """The ssh program dies half-way: the operation is undone, the guest has what it had."""
    prepare(home, repo)
    repo.write("large", os.urandom(24 << 20))
    repo.git("add", "large")
    asked = home.start("vm", "workspace", "prepare", "web", str(repo.root))
    sending = _ssh_that_sends(home)
    time.sleep(0.5)  # somewhere in the middle; anywhere is right
    proc.kill(sending)
    _, errors = asked.communicate(timeout=60)
    assert asked.returncode != 0
    assert b"old one stays" in errors or b"is there still" in errors
    assert inside(home, "ls -d /root/my-repo/large /root/.banger/my-repo/new || true") == b""
    assert exported(home) == b""
    prepare(home, repo)
    assert inside(home, "wc -c < /root/my-repo/large") == b"%d\n" % (24 << 20)


def _ssh_that_sends(home: Home) -> Any:
    """Wait for the ssh program of the step that sends."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in home.processes():
            words = proc.words(process)
            if words.startswith("ssh ") and "tar -x" in words:
                return process
        time.sleep(0.05)
    raise AssertionError("nothing was sent")


def test_a_workspace_survives_the_power(home: Home, clean: str, repo: Repo) -> None:
    """What was said to be there, is there when the VMM is killed right after."""
    repo.write("noise", os.urandom(1 << 20))
    repo.commit()
    prepare(home, repo)
    assert home.banger("vm", "kill", "web").returncode == 0
    refused = home.banger("vm", "workspace", "prepare", "web", str(repo.root))
    assert (refused.returncode, "is not running" in refused.stderr) == (4, True)
    assert home.banger("vm", "start", "web").returncode == 0
    assert inside(home, "cd /root/my-repo; git status --porcelain; git fsck --strict 2>&1") == b""
    assert exported(home) == b""


def test_commands_start_in_it(home: Home, clean: str, repo: Repo) -> None:
    """`vm exec` starts there, says when the repository moved on, and brings it again when asked to."""
    prepare(home, repo)
    first = home.banger(
        "vm", "exec", "web", "--", "sh", "-c", 'pwd; printf "<%s>" "$@"', "sh", "a b", "", "'\n"
    )
    assert (first.stdout, first.stderr, first.returncode) == ("/root/my-repo\n<a b><><'\n>", "", 0)
    repo.write("file", b"moved\n")
    warned = home.banger("vm", "exec", "web", "--", "cat", "file")
    assert warned.stdout == "one\n"
    assert "has changed since" in warned.stderr
    brought = home.banger("vm", "exec", "--auto-prepare", "web", "--", "cat", "file")
    assert brought.stdout == "moved\n", brought.stderr
    quiet = home.banger("vm", "exec", "web", "--", "sh", "-c", "exit 42")
    assert (quiet.returncode, quiet.stderr) == (42, "")


def test_tools_of_mise_are_there(home: Home, clean: str, repo: Repo) -> None:
    """With a mise file and mise in the guest, commands run below `mise exec`; without either, they do not."""
    inside(home, "mkdir -p .local/bin; printf '%s\\n' '#!/bin/sh' 'echo mise: \"$@\"; shift 2; exec \"$@\"'"
           " > .local/bin/mise; chmod +x .local/bin/mise")  # fmt: skip
    prepare(home, repo)
    assert home.banger("vm", "exec", "web", "--", "echo", "plain").stdout == "plain\n"
    repo.write("mise.toml", b"[tools]\n")
    repo.commit()
    prepare(home, repo)
    assert home.banger("vm", "exec", "web", "--", "echo", "a  b").stdout == "mise: exec -- echo a  b\na  b\n"
    inside(home, "rm -r /root/.local")
    assert home.banger("vm", "exec", "web", "--", "echo", "plain").stdout == "plain\n"


def test_a_dry_run_touches_nothing(home: Home, web: str, repo: Repo) -> None:
    """It lists what would come, and makes neither a VM nor an operation."""
    repo.write("new", b"")
    before = len(home.json("ops", "list")["ops"])
    listed = home.json(
        "vm", "workspace", "prepare", "web", str(repo.root), "--dry-run", "--include-untracked"
    )
    assert "new" in [each["name"] for each in listed["files"]]
    assert home.json("vm", "run", str(repo.root), "--dry-run")["bytes"] > 0
    assert len(home.json("ops", "list")["ops"]) == before


def test_run_in_a_repository(home: Home, repo: Repo) -> None:
    """`vm run --rm REPO -- CMD` twice at once: each in its own checkout, exit codes pass, nothing stays."""
    repo.write("Makefile", b"test:\n\t@grep -q one file && echo tested\nfail:\n\t@exit 7\n")
    repo.write(".tool-versions", b"python 3\n")
    repo.git("add", "Makefile", ".tool-versions")
    before = home.json("vm", "list")
    runs = [home.start("vm", "run", "--rm", str(repo.root), "--", "make", word) for word in ("test", "fail")]
    ends = [(run.communicate(timeout=120), run.returncode) for run in runs]
    (tested, said), code = ends[0]
    assert (tested, code) == (b"tested\n", 0), said
    assert b"--nat" in said
    assert (ends[1][0][0], ends[1][1]) == (b"", 2)  # make's own word for a rule that failed
    assert home.json("vm", "list")["vms"] == before["vms"]


@pytest.mark.parametrize(
    "words",
    [
        ["vm", "run", "--rm", "NOT-THERE", "--", "true"],
        ["vm", "run", "--branch", "b", "--rm", "--", "true"],
        ["vm", "run", "-d", "--rm"],
        ["vm", "run", "-d", "REPO", "--", "true"],
        ["vm", "run", "--rm", "REPO", "--branch", "..", "--", "true"],
        ["vm", "run", "--rm", "REPO", "--memory", "1M", "--", "true"],
        ["vm", "run", "--rm", "REPO", "--name", "UPPER", "--", "true"],
    ],
)
def test_a_run_that_makes_no_sense_leaves_no_row(home: Home, repo: Repo, words: list[str]) -> None:
    """It is refused before there is a VM."""
    before = home.json("vm", "list"), home.json("ops", "list")
    refused = home.banger(*(str(repo.root) if word == "REPO" else word for word in words))
    assert refused.returncode == 2, refused.stderr
    assert (home.json("vm", "list"), home.json("ops", "list")) == before


def test_nothing_is_left(home: Home, web: str) -> None:
    """After all of that: the ledger and the host agree, and a deleted VM leaves nothing."""
    assert home.banger("vm", "delete", web).returncode == 0
    assert home.leftovers() == []
    assert home.json("ops", "audit")["leaked"] == []


def test_in_an_image_that_is_nothing_but_busybox(repo: Repo, tmp_path: Path) -> None:
    """Tools of banger's own bring it and read it back; commands start in it."""
    tree_of_image: roots.Tree = {
        "bin/busybox": roots.BUSYBOX.read_bytes(),
        **{f"bin/{name}": "->busybox" for name in ("sh", "tar", "cat")},
    }
    image = tmp_path / "root.squashfs"
    image.write_bytes(tiny.squashfs(roots.archive(tmp_path / "root.tar", tree_of_image).read_bytes()))
    vmlinuz, initrd = kernels.kernel_paths(
        kernels.build(kernels.RECIPES["debian-12"], config.find_dirs().cache)
    )
    with Home(cache=tmp_path / "cache") as home:
        home.configure("memory_mib = 256\n")
        home.json("kernel", "import", "mine", str(vmlinuz), "--initrd", str(initrd))
        home.json("image", "register", "own", str(image), "--kernel", "mine")
        made = home.banger("vm", "create", "web", "--image", "own", "--wait")
        assert made.returncode == 0, made.stderr
        prepare(home, repo, "--include-untracked")
        assert in_guest(home, "/root/my-repo", tmp_path / "before") == tree(repo.root)
        assert home.banger("vm", "exec", "web", "--", "cat", "file").stdout == "one\n"
        assert home.banger("vm", "exec", "web", "--", "sh", "-c", "echo two >> file").returncode == 0
        patch = exported(home)
        subprocess.run(["git", "-C", repo.root, "apply", "-"], input=patch, check=True)
        assert (repo.root / "file").read_bytes() == b"one\ntwo\n"


def test_many_files_there_and_back(tmp_path: Path) -> None:
    """A repository of 500 files and 10 MiB, edited all over in the guest, is equal on the host after."""
    with Home() as roomy:
        roomy.configure("memory_mib = 512\n")
        there_and_back(roomy, tmp_path, files=500, size_mib=10)


def there_and_back(home: Home, tmp_path: Path, *, files: int, size_mib: int) -> None:
    """Bring a repository, edit every tenth file, delete and add some, and bring the changes back."""
    root = tmp_path / "large"
    bench.make(root, files, size_mib)
    made = home.banger("vm", "create", "web", "--wait")
    assert made.returncode == 0, made.stderr
    answer = home.json("vm", "workspace", "prepare", "web", str(root), timeout_s=600)
    assert answer.get("fate") == "done", answer
    inside(home, LARGE_EDITS)
    subprocess.run(["git", "-C", root, "apply", "--binary", "-"], input=exported(home), check=True)
    assert in_guest(home, "/root/large", tmp_path / "after") == tree(root)
