"""Repositories to bring, made by git."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

WEIRD = b"a 'b' \"c\"\n\xff\\d"
"""A name with spaces, quotes, a newline, a backslash, and a byte that is no UTF-8."""


class Repo:
    """A repository with a commit: a file, a program, a link, and a file with a weird name."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(parents=True)
        self.git("init", "--quiet", "--initial-branch=main")
        self.write("file", b"one\n")
        self.write("program", b"#!/bin/sh\n").chmod(0o755)
        (root / "link").symlink_to("nowhere")
        self.weird.write_bytes(b"\0weird")
        self.write(".gitignore", b"*.ignored\n")
        self.commit()

    @property
    def weird(self) -> Path:
        return self.root / os.fsdecode(WEIRD)

    def git(self, *words: str) -> bytes:
        who = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "protocol.file.allow=always"]
        argv = ["git", "-C", str(self.root), *who, *words]
        return subprocess.run(argv, check=True, capture_output=True).stdout

    def write(self, name: str, content: bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message=a commit")


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    return Repo(tmp_path / "my repo")
