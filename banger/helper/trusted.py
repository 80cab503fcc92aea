"""Paths that only root can have made: every part root's own, and nobody else may change any of them."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path, PurePosixPath

from banger.errors import HostLacks

MAX_LINKS = 40
"""The kernel's own limit (path_resolution(7))."""

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def open_trusted(path: str) -> int:
    """Open an absolute path as O_PATH, part by part from `/`, checking each by its descriptor.

    A symbolic link is refused wherever it is: what it names could have another owner. Whoever is not
    root cannot rename or replace what was checked, so the path may be used by its name afterwards.
    Raises HostLacks when it is not there or another than root may write to it.
    """
    held = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _check(held, "/", path)
        for part in _parts(path):
            below = _step(held, part, path)
            os.close(held)
            held = below
            _check(held, part, path)
    except BaseException:
        os.close(held)
        raise
    return held


def check_trusted(path: str) -> None:
    """Raise HostLacks when the path is not there or another than root may write to it."""
    os.close(open_trusted(path))


def check_trusted_file(path: str) -> None:
    """Raise HostLacks unless only root could decide what the path leads to, if need be by symbolic links.

    Each link must be in a directory that `check_trusted` takes; no directory may itself be a link.
    """
    for _ in range(MAX_LINKS):
        above = PurePosixPath(path).parent
        check_trusted(str(above))
        target = _target(path)
        if target is None:
            check_trusted(path)
            return
        path = os.path.normpath(above / target)
    raise HostLacks(f"{path} cannot be trusted: too many symbolic links lead to each other.")


def make_private(path: str) -> int:
    """Open a directory of mode 0700 that nobody but root can enter, made when it is not there.

    Give its descriptor. Raises HostLacks when it, or a directory above it, is anyone else's.
    """
    parent, name = os.path.split(path.rstrip("/"))
    above = open_trusted(parent)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=above)
        held = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    except OSError as error:
        raise HostLacks(f"{path} cannot be used: {error.strerror}.") from None
    finally:
        os.close(above)
    found = os.fstat(held)
    if (found.st_uid, stat.S_IMODE(found.st_mode)) != (0, 0o700):
        os.close(held)
        raise HostLacks(f"{path} is not root's own.", hint=f"chown root:root {path}; chmod 0700 {path}")
    return held


def _target(path: str) -> str | None:
    """Give what a symbolic link says; None for what is none."""
    try:
        return str(Path(path).readlink())
    except OSError:
        return None


def _parts(path: str) -> tuple[str, ...]:
    root, *parts = PurePosixPath(path).parts or ("",)
    if root != "/" or ".." in parts:
        raise HostLacks(f"{path!r} is not an absolute path without `..`.")
    return tuple(parts)


def _step(above: int, part: str, path: str) -> int:
    try:
        return os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    except OSError as error:
        raise HostLacks(f"{path} cannot be used: {error.strerror}.") from None


def _check(fd: int, part: str, path: str) -> None:
    found = os.fstat(fd)
    if stat.S_ISLNK(found.st_mode):
        raise HostLacks(f"{path} cannot be trusted: {part} is a symbolic link.")
    if found.st_uid != 0 or found.st_mode & _OTHERS_WRITE:
        raise HostLacks(f"{path} cannot be trusted: others than root may change {part}.")
