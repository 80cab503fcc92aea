"""A fresh clone in the hands of a user who is nobody special."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import proc
from tests.e2e.conftest import REPOSITORY, readme_commands

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

# What a machine tells every program about its network; nothing else of our environment goes along.
PASSED_ON = re.compile(r"PIP_\w+|UV_\w+|\w*(SSL|CERT|CA_BUNDLE)\w*|\w+_proxy", re.IGNORECASE)
SUDO = '#!/bin/sh\necho "$@" >> "$HOME/sudo-was-called"\nexit 1\n'


class Person:
    """Somebody with a home directory and a clone of this repository in it."""

    def __init__(self, home: Path, as_user: list[str]):
        self.home = home
        self.clone = home / "banger"
        self._as_user = as_user
        passed = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
        self.environ = {
            **passed,
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "PATH": f"{home}/bin:/usr/local/bin:/usr/bin:/bin",
            "XDG_STATE_HOME": str(home / "state"),
        }

    def does(self, *argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program as this person, in the clone."""
        return subprocess.run(
            [*self._as_user, *argv], cwd=self.clone, env=self.environ, input=stdin,
            capture_output=True, text=True, timeout=480, check=False,
        )  # fmt: skip


def clone(into: Path) -> None:
    """Copy what git knows of this checkout, as it is now."""
    listed = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(
        None, subprocess.run(listed, stdout=subprocess.PIPE, text=True, check=True).stdout.split("\0")
    ):
        if (REPOSITORY / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, into / name)


def end_all_of(uid: int) -> None:
    """End every process of a user that was made for this test."""
    while found := [
        process
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _owner(entry) == uid and (process := proc.identify(int(entry.name)))
    ]:
        for process in found:
            proc.kill(process)


def _owner(entry: Path) -> int | None:
    try:
        return entry.stat().st_uid
    except FileNotFoundError:
        return None


@pytest.fixture
def person() -> Iterator[Person]:
    """A user made for this test, or whoever runs it; no trace of either stays."""
    directory = Path(tempfile.mkdtemp(prefix="bg-"))
    home = directory / "home"
    name = f"banger-{os.getpid()}"
    try:
        if os.getuid() == 0:
            directory.chmod(0o755)
            subprocess.run(["useradd", "--create-home", "--home-dir", home, name], check=True)
            user = pwd.getpwnam(name)
            as_user = [
                "setpriv",
                f"--reuid={user.pw_uid}",
                f"--regid={user.pw_gid}",
                "--init-groups",
            ]
            somebody = Person(home, as_user)
        else:
            somebody = Person(home, [])
        (home / "bin").mkdir(parents=True)
        (home / "bin" / "sudo").write_text(SUDO)
        (home / "bin" / "sudo").chmod(0o755)
        clone(somebody.clone)
        if os.getuid() == 0:
            subprocess.run(["chown", "-R", f"{name}:", home], check=True)
        yield somebody
    finally:
        for process in proc.find_by_environ("XDG_STATE_HOME", str(home / "state")):
            proc.kill(process)
        if os.getuid() == 0:
            end_all_of(pwd.getpwnam(name).pw_uid)
            # By force: a zombie that its parent has not yet reaped counts as a login.
            subprocess.run(["userdel", "--force", name], check=True, stderr=subprocess.PIPE)
        shutil.rmtree(directory)


def test_make_demo_then_the_readme(person: Person) -> None:
    """`make demo`, then the README's commands, work in a fresh clone: no sudo, no process of root's."""
    demo = person.does("make", "demo")
    assert demo.returncode == 0, demo.stderr
    assert re.search(r"^Linux \S+ .* GNU/Linux$", demo.stdout, re.MULTILINE), demo.stdout
    owners, op = set(), ""
    for words in readme_commands():
        given = [word.replace("op-XXXXXX", op) for word in words]
        done = person.does(".venv/bin/banger", *given, stdin="echo I am in\n")
        assert done.returncode == (42 if "exit 42" in words[-1] else 0), (words, done.stdout, done.stderr)
        if words[:2] == ["vm", "create"]:
            found = re.search(r"^op: (op-\w+)$", done.stdout, re.MULTILINE)
            assert found, done.stdout
            op = found[1]
            ours = proc.find_by_environ("XDG_STATE_HOME", person.environ["XDG_STATE_HOME"])
            owners |= {_owner(Path(f"/proc/{process.pid}")) for process in ours}
        if words[:2] == ["vm", "ssh"]:
            assert "I am in\n" in done.stdout
    assert owners == {person.home.stat().st_uid}, "everything runs as the user"
    assert 0 not in owners
    assert not (person.home / "sudo-was-called").exists()
    assert list((person.home / "state" / "banger" / "vms").iterdir()) == []
