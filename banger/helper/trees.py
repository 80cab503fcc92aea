"""Removal of a directory tree that somebody else filled: by descriptors, without a limit of depth."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(above: int, name: str) -> None:
    """Remove a directory and all in it; what is gone is no error.

    `above` is held open and root's own, nothing is mounted inside the tree, and nobody changes it
    meanwhile. No link is followed. Unlike `shutil.rmtree` it holds three descriptors however deep the
    tree is: what is nested is first moved to its top.
    """
    try:
        top = os.open(name, _DIRECTORY, dir_fd=above)
    except FileNotFoundError:
        return
    try:
        while found := entries(top):
            for entry in found:
                _remove(top, entry)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=above)


def entries(directory: int) -> list[str]:
    """List what is in a directory that is held open."""
    with os.scandir(directory) as found:
        return [entry.name for entry in found]


def _remove(top: int, name: str) -> None:
    """Remove an entry; of a directory that is not empty, bring what is nested in it to the top."""
    if _unlink(top, name):
        return
    below = os.open(name, _DIRECTORY, dir_fd=top)
    try:
        for entry in entries(below):
            if not _unlink(below, entry):
                # Not an entry's own name: whoever filled the tree could have it lie here already.
                os.rename(entry, secrets.token_hex(16), src_dir_fd=below, dst_dir_fd=top)
    finally:
        os.close(below)
    os.rmdir(name, dir_fd=top)


def _unlink(directory: int, name: str) -> bool:
    """Remove what is not a directory, or an empty one; tell False for one that is not empty."""
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
        with contextlib.suppress(FileNotFoundError):
            return _rmdir(directory, name)
    return True


def _rmdir(directory: int, name: str) -> bool:
    try:
        os.rmdir(name, dir_fd=directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True
