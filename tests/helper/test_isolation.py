"""What root's process is made of: no way to run foreign code is written into it, and little is loaded."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

import banger
from banger.helper import client, wire
from banger.helper.requests import Hello, Listing, Request
from banger.helper.verbs import Caller
from banger.workers import root
from tests.helper.conftest import NEEDS_ROOT, as_user

PACKAGE = Path(banger.__file__).parent
FILES = sorted([*(PACKAGE / "helper").glob("*.py"), PACKAGE / "workers/root.py"])
TREES = {file.name: ast.parse(file.read_text("utf-8")) for file in FILES}

FORBIDDEN_MODULES = set(
    "pickle marshal shelve dill yaml copyreg code codeop pty multiprocessing shutil".split()
)
DOORS = {"program.py", "jailer.py"}
"""The files that may start a program."""
BY_NAME = set("exists isfile isdir islink ismount lexists realpath samefile getsize getmtime".split())
"""Of os.path: what is looked at by its name can be something else when it is used."""
SHELLS = set(
    "system popen fork forkpty execv execve execvp execvpe execl execle execlp spawnv spawnl".split()
)
BY_DESCRIPTOR = set(
    "chmod chown lchown link symlink rename replace renames remove removedirs makedirs".split()
)
"""Of os: only with `dir_fd`, or not at all."""


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield str(node.module)
            yield from (f"{node.module}.{name.name}" for name in node.names)


def dotted(node: ast.AST) -> str:
    """Give the text of `a.b.c`."""
    return ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Name)) else ""


@pytest.mark.parametrize("name", TREES)
def test_h12_nothing_is_imported_that_makes_code_of_data(name: str) -> None:
    """No file of the helper imports pickle, marshal, shelve, YAML or another loader of objects."""
    assert not {module.split(".")[0] for module in imported(TREES[name])} & FORBIDDEN_MODULES


@pytest.mark.parametrize("name", TREES)
def test_the_helper_knows_nothing_of_the_rest(name: str) -> None:
    """Of banger it imports its errors, itself and the version; of others msgspec, huey and pyroute2."""
    ours = {module for module in imported(TREES[name]) if module.split(".")[0] == "banger"}
    allowed = re.compile(r"banger|banger\.errors(\.\w+)?|banger\.helper(\.\w+)*")
    assert [module for module in ours if not allowed.fullmatch(module)] == []
    others = {module.split(".")[0] for module in imported(TREES[name])} - set(sys.stdlib_module_names)
    assert others <= {"banger", "msgspec", "huey", "pyroute2"}


@pytest.mark.parametrize("name", TREES)
def test_no_process_is_addressed_by_its_pid(name: str) -> None:
    """`os.kill` and `os.killpg` are not there: a pid can be another's by the time it is used."""
    assert not [call for call in calls(TREES[name]) if dotted(call.func) in ("os.kill", "os.killpg")]
    assert not {"os.kill", "os.killpg"} & set(imported(TREES[name]))


def test_h3_a_caller_has_no_pid(refused: Callable[..., None]) -> None:
    """Of who asks the helper knows uid and gid; a pid, which could be another's by then, is dropped."""
    assert [field.name for field in dataclasses.fields(Caller)] == ["uid", "gid"]
    assert wire.peer.__annotations__["return"] == "tuple[int, int]"
    refused("H3 pid used again", "no pid is looked at")


@pytest.mark.parametrize("name", TREES)
def test_no_shell_and_no_program_but_through_the_doors(name: str) -> None:
    """Only the doors import subprocess, and never use a shell; no exec, eval or os.system."""
    tree = TREES[name]
    if name not in DOORS:
        assert not {module for module in imported(tree) if module.startswith("subprocess")}
    for call in calls(tree):
        word = dotted(call.func)
        assert word not in ("eval", "exec", "compile", "__import__"), ast.unparse(call)
        assert word.removeprefix("os.") not in SHELLS or not word.startswith("os."), ast.unparse(call)
        shell = [keyword.value for keyword in call.keywords if keyword.arg == "shell"]
        assert all(isinstance(value, ast.Constant) and value.value is False for value in shell)


@pytest.mark.parametrize("name", TREES)
def test_h38_nothing_is_looked_at_by_name_and_used_after(name: str) -> None:
    """No os.path.exists and its like; owner and mode are changed by descriptor or below a held directory."""
    for call in calls(TREES[name]):
        word = dotted(call.func)
        assert not (word.startswith("os.path.") and word.rpartition(".")[2] in BY_NAME), ast.unparse(call)
        if word.startswith("os.") and word.removeprefix("os.") in BY_DESCRIPTOR:
            assert {"dir_fd", "src_dir_fd"} & {keyword.arg for keyword in call.keywords}, ast.unparse(call)
        if isinstance(call.func, ast.Attribute) and not word.startswith("os."):
            assert call.func.attr not in {"chmod", "is_symlink", "write_text", "write_bytes", "symlink_to"}


@pytest.mark.parametrize("name", TREES)
def test_only_the_kernels_own_files_are_opened_by_name(name: str) -> None:
    """The built-in `open` gets a constant below /proc or /sys, or is not there."""
    for call in calls(TREES[name]):
        if dotted(call.func) == "open":
            assert isinstance(call.args[0], ast.Constant), ast.unparse(call)
            assert str(call.args[0].value).startswith(("/proc/", "/sys/")), ast.unparse(call)


def test_one_database_is_opened() -> None:
    """`sqlite3.connect` is in one place, and leads to root's own directory."""
    opened = [
        (name, call)
        for name, tree in TREES.items()
        for call in calls(tree)
        if dotted(call.func) == "sqlite3.connect"
    ]
    assert [(name, ast.unparse(call.args[0])) for name, call in opened] == [
        ("store.py", "PurePosixPath(state, 'root.db')")
    ]


@pytest.mark.parametrize("name", TREES)
def test_patterns_end_at_the_end(name: str) -> None:
    """No pattern ends in `$`, which lets a newline through, or has a digit class of all scripts."""
    for call in calls(TREES[name]):
        assert dotted(call.func) not in ("re.match", "re.search"), ast.unparse(call)
        if dotted(call.func) in ("re.compile", "re.fullmatch", "Meta"):
            for node in ast.walk(call):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    assert not node.value.endswith("$"), ast.unparse(call)
                    assert r"\d" not in node.value, ast.unparse(call)


def loaded(statement: str) -> list[str]:
    """List the modules that are there in a new isolated interpreter after a statement."""
    code = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, check=True, timeout=60)
    return list(json.loads(run.stdout))


def test_nothing_that_acts_for_an_owner_is_loaded() -> None:
    """In root's process there is no event log, no task, no image code, no HTTP, no SSH, no peewee."""
    modules = loaded("import banger.workers.root")
    ours = {name for name in modules if name.startswith("banger.")}
    assert {name for name in ours if not name.startswith("banger.helper")} == {
        "banger.errors",
        "banger.workers",
        "banger.workers.root",
    }
    others = {name.split(".")[0] for name in modules}
    assert not others & set("peewee asyncssh cryptography requests urllib3 oras click structlog dns".split())


def test_the_client_brings_no_queue_and_no_netlink() -> None:
    """The owner's side loads no huey, pyroute2, SQLite or subprocess to ask root for something."""
    modules = set(loaded("import banger.helper.client"))
    assert not modules & {"huey", "pyroute2", "sqlite3", "subprocess", "banger.helper.pool"}


def test_h56_the_start_is_not_led_by_the_environment(tmp_path: Path, refused: Callable[..., None]) -> None:
    """PYTHONPATH, PYTHONSTARTUP, the current directory and PATH bring no code into root's process."""
    (tmp_path / "msgspec.py").write_text("raise SystemExit('evil')")
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('evil')")
    code = (
        "import banger.workers.root, os; from banger.helper import serve; serve.settle();"
        " print(dict(os.environ), os.getcwd())"
    )
    hostile = {name: str(tmp_path) for name in "PYTHONPATH PYTHONHOME PYTHONSTARTUP PATH BASH_ENV".split()}
    run = subprocess.run(
        [sys.executable, "-I", "-c", code],
        capture_output=True,
        check=True,
        cwd=tmp_path,
        env={**hostile, "PYTHONINSPECT": "1", "LD_LIBRARY_PATH": str(tmp_path)},
        text=True,
        timeout=60,
    )
    assert run.stdout.strip() == "{'LANG': 'C', 'PATH': '/usr/sbin:/usr/bin'} /"
    refused("H56 hostile environment", "not looked at")


@NEEDS_ROOT
def test_it_does_not_start_without_root(rooted: Path) -> None:
    """An ordinary user is told that root is needed."""
    argv = ["root", "--state", f"{rooted}/state", "--runtime", f"{rooted}/run", "--from-checkout"]

    def try_it() -> bytes:
        sys.argv = argv
        with pytest.raises(SystemExit) as caught:
            root.main()
        return str(caught.value).encode()

    assert as_user(65534, try_it) == b"banger root helper: The root helper must run as root."
    assert list(rooted.iterdir()) == []


@NEEDS_ROOT
def test_over_the_real_kernel_it_says_hello(rooted: Path) -> None:
    """The helper itself starts, as the unit starts it, and tells what this host offers; SIGTERM ends it."""
    words = [
        "--state",
        rooted / "state",
        "--runtime",
        rooted / "run",
        "--owner",
        os.getuid(),
        "--from-checkout",
    ]
    argv = [sys.executable, "-I", "-m", "banger.workers.root", *map(str, words)]
    # In a network of its own: nothing is done to the machine's.
    with subprocess.Popen(["unshare", "--net", *argv], stdout=subprocess.PIPE, text=True, cwd="/") as helper:
        assert helper.stdout is not None
        lines = [helper.stdout.readline(), helper.stdout.readline()]
        try:
            request = Request(op="op-1", step="step", epoch=1, key="k", ask=Hello())
            facts = client.ask(rooted / "run/helper.sock", request).facts
            listed = client.ask(rooted / "run/helper.sock", msgspec.structs.replace(request, ask=Listing()))
            maps = Path(f"/proc/{helper.pid}/maps").read_text()
        finally:
            helper.terminate()
        assert helper.wait(10) == 0
    assert lines[0].startswith("running from a checkout")
    assert lines[1].startswith("listening")
    assert (facts["version"], facts["uid"], facts["egress"]) == (banger.__version__, os.getuid(), None)
    assert listed.facts == {"held": [], "found": []}
    assert not [line for line in maps.splitlines() if "/home/" in line or "/tmp/" in line]


@NEEDS_ROOT
def test_it_does_not_start_from_a_checkout(rooted: Path) -> None:
    """An editable install is refused: who owns the files owns root."""
    run = start("--state", rooted / "state", "--runtime", rooted / "run")
    assert run.returncode == 1
    assert "does not run from a checkout" in run.stderr
    assert list(rooted.iterdir()) == []


def link(package: Path, mode: int) -> None:
    """Put a file elsewhere, to which a link leads by another link, in a directory of this mode."""
    between, file = package.parents[1] / "between", package / "helper/pool.py"
    between.mkdir()
    between.chmod(mode)
    (between / "pool.py").symlink_to(file.rename(package.parents[1] / "elsewhere.py"))
    file.symlink_to("../../../between/pool.py")


@NEEDS_ROOT
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda _: None, ""),
        (lambda package: link(package, 0o755), ""),
        (lambda package: link(package, 0o1777), "others than root may change between"),
        (
            lambda package: shutil.chown(package / "helper/pool.py", 1000),
            "others than root may change pool.py",
        ),
        (lambda package: (package / "helper").chmod(0o777), "others than root may change helper"),
        (lambda package: package.parent.chmod(0o775), "others than root may change site-packages"),
    ],
)
def test_h11_code_that_another_can_change_is_not_served(
    rooted: Path, spoil: Callable[[Path], object], reason: str, refused: Callable[..., None]
) -> None:
    """An installed package serves only if each file that was loaded, and all above it, is root's own."""
    package = rooted / "site-packages/banger"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    spoil(package)
    words = ["root", "--state", f"{rooted}/state", "--runtime", f"{rooted}/run"]
    code = (
        f"import runpy, sys; sys.path.insert(0, '{package.parent}'); sys.argv = {words};"
        " runpy.run_module('banger.workers.root', run_name='__main__', alter_sys=True)"
    )
    argv = ["unshare", "--net", sys.executable, "-I", "-c", code]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/") as helper:
        assert helper.stdout is not None
        assert helper.stderr is not None
        line = helper.stdout.readline()
        helper.terminate()
        said = helper.stderr.read()
    if not reason:
        assert line.startswith("listening"), said
    else:
        assert (line, helper.returncode) == ("", 1)
        assert reason in said
        assert not (rooted / "state").exists()
        refused("H11 code not root's own", said.strip())


@NEEDS_ROOT
@pytest.mark.parametrize(
    "spoil",
    [
        lambda place: shutil.chown(place, 1000),
        lambda place: place.chmod(0o775),
        lambda place: place.chmod(0o757),
        lambda place: (place / "state").mkdir(mode=0o755),
        lambda place: ((place / "state").mkdir(mode=0o700), shutil.chown(place / "state", 1000)),
        lambda place: ((place / "elsewhere").mkdir(mode=0o700), (place / "state").symlink_to("elsewhere")),
        lambda place: (place / "state").write_text("a file"),
        lambda place: ((place / "run").mkdir(), (place / "run").chmod(0o777)),
    ],
)
def test_h11_it_does_not_start_in_a_place_that_another_can_change(
    rooted: Path, spoil: Callable[[Path], object], refused: Callable[..., None]
) -> None:
    """Its directories and all above them are root's own and no symbolic links, or it does not start."""
    spoil(rooted)
    run = start("--state", rooted / "state", "--runtime", rooted / "run", "--from-checkout")
    assert run.returncode == 1, run
    assert run.stderr.startswith("banger root helper: "), run.stderr
    assert "Traceback" not in run.stderr
    refused("H11 directory not root's own", run.stderr.strip())


def start(*words: object) -> subprocess.CompletedProcess[str]:
    """Start the helper; it is expected to end by itself."""
    argv = [sys.executable, "-I", "-m", "banger.workers.root", *map(str, words)]
    return subprocess.run(argv, capture_output=True, check=False, text=True, timeout=30, cwd="/")
