import sys
from pathlib import Path

import pytest

from banger import proc
from banger.errors import ProgramFailed
from banger.images import elf


def test_it_names_the_libraries_of_a_real_program() -> None:
    """What this interpreter needs includes the C library."""
    assert "libc.so.6" in elf.needed(Path(sys.executable).resolve().read_bytes())


def test_a_static_program_needs_nothing() -> None:
    """busybox-static has no dynamic section that names a library."""
    assert elf.needed(Path(proc.which("busybox", "busybox-static")).read_bytes()) == []


def test_what_is_no_program_is_refused() -> None:
    """A script is an error, not an empty list."""
    with pytest.raises(ProgramFailed):
        elf.needed(b"#!/bin/sh\n" + b"\0" * 100)
