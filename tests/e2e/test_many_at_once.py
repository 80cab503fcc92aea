"""Many commands in one VM at once."""

from __future__ import annotations

import subprocess

import pytest

from banger.testing.home import Home

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

MANY = 40


def test_forty_commands_beside_a_long_one(home: Home, web: str) -> None:
    """Each gives its own output, and the long one that was there before them is not disturbed."""
    words = ["vm", "exec", web, "--"]
    long = subprocess.Popen(
        home.argv(*words, "sh", "-c", "echo up; read line; echo $line"),
        env=home.environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert long.stdin is not None
    assert long.stdout is not None
    assert long.stdout.readline() == b"up\n"
    many = [
        subprocess.Popen(
            home.argv(*words, "echo", str(number)),
            env=home.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(MANY)
    ]
    answers = [(*each.communicate(), each.returncode) for each in many]
    assert answers == [(f"{number}\n".encode(), b"", 0) for number in range(MANY)]
    output, _ = long.communicate(b"still here\n")
    assert (output, long.returncode) == (b"still here\n", 0)
