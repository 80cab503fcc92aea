"""banger as a whole host has it: a virtual environment of root's own, made without a network.

What changes seldom, the libraries, is a part of the guest's image; banger itself comes later.
"""

from __future__ import annotations

import io
import re
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

from banger import proc

PLACE = "/opt/banger"
PYTHON = f"{PLACE}/bin/python3"
BANGER = f"{PLACE}/bin/banger"
VERSION = (3, 11)
"""Debian 12's Python: what was compiled for another one does not run on it."""

_SITE = f"{PLACE[1:]}/lib/python3.11/site-packages"
_SETTINGS = "home = /usr/bin\ninclude-system-site-packages = false\n"  # PEP 405
_COMMAND = f"#!{PYTHON} -I\nimport sys\n\nfrom banger_cli.main import main\n\nsys.exit(main())\n"


def libraries(checkout: Path) -> dict[str, str]:
    """Name what a checkout pins to run on, each with the version that is installed here.

    Raises PackageNotFoundError when one is not.
    """
    pinned = (checkout / "requirements" / "runtime.txt").read_text("utf-8")
    names = re.findall(r"^([\w.-]+)==", pinned, re.MULTILINE)
    return {name: metadata.version(name) for name in names}


def add_environment(archive: Path, names: list[str]) -> None:
    """Add to a root file system in a tar archive an environment with libraries that are installed here.

    All of it is root's, for others to read only.
    """
    with tarfile.open(archive, "a") as tar:
        _write(tar, f"{PLACE[1:]}/pyvenv.cfg", _SETTINGS, 0o644)
        _write(tar, BANGER[1:], _COMMAND, 0o755)
        _link(tar, PYTHON[1:], "/usr/bin/python3")
        for name in names:
            _add_library(tar, name)


def pack(checkout: Path) -> bytes:
    """Give a tar archive, to be unpacked in `/`, of banger as it is in a checkout. Raises ProgramFailed."""
    out = io.BytesIO()
    with tempfile.TemporaryDirectory(prefix="bg-") as built, tarfile.open(fileobj=out, mode="w") as tar:
        _build(checkout, Path(built))
        for package in Path(built).glob("banger*"):  # and not its program, which names this Python
            tar.add(package, f"{_SITE}/{package.name}", filter=_for_root)
    return out.getvalue()


def _build(checkout: Path, target: Path) -> None:
    """Install the checkout as its users do, from a wheel."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    proc.run([*pip, "--no-deps", "--no-index", "--no-build-isolation", "--target", target, checkout])


def _add_library(tar: tarfile.TarFile, name: str) -> None:
    """Add a library's files, the bytecode too: an emulated CPU compiles for 20 seconds."""
    for file in metadata.distribution(name).files or ():
        path = Path(str(file.locate()))
        if ".." not in file.parts and path.is_file():  # its programs are elsewhere
            tar.add(path, f"{_SITE}/{file}", filter=_for_root)


def _for_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
    return member


def _write(tar: tarfile.TarFile, name: str, text: str, mode: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(text), mode
    tar.addfile(member, io.BytesIO(text.encode("ascii")))


def _link(tar: tarfile.TarFile, name: str, target: str) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    tar.addfile(member)
