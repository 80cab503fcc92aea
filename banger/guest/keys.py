"""SSH keys, made on the host: it knows a guest's host key before the first connection."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_NAME = b"ssh-ed25519"


def make_key() -> bytes:
    """Make an ed25519 private key in OpenSSH's format, without a passphrase."""
    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def make_key_file(path: Path) -> bytes:
    """Make it so that a private key (0600) is at `path`, its public half beside it with `.pub`.

    Returns the private key. Two who make it at once get the same one.
    """
    public = path.with_name(path.name + ".pub")
    with _alone(path.parent):
        for left in path.parent.glob(f".{path.name}.*"):  # by one that was killed at it
            left.unlink()
        if not path.exists():
            _place(path, make_key())
        key = path.read_bytes()
        if not public.exists():  # a crash may have come between the two
            _place(public, public_line(key).encode() + b"\n")
    return key


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold a lock on a directory; the kernel frees a dead holder's (flock(2))."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _place(path: Path, content: bytes) -> None:
    """Write a file whole and link it into place, unless one is there already."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.") as whole:  # made 0600
        whole.write(content)
        whole.flush()
        os.fsync(whole.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(whole.name, path)


def _load(pem: bytes) -> Ed25519PrivateKey:
    key = serialization.load_ssh_private_key(pem, password=None)
    assert isinstance(key, Ed25519PrivateKey)
    return key


def public_line(pem: bytes) -> str:
    """Give the public half as one line of authorized_keys."""
    public = _load(pem).public_key()
    line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line.decode("ascii")


def known_hosts_line(host: str, pem: bytes) -> str:
    """Give the line of known_hosts that pins this key to a host name (sshd(8))."""
    return f"{host} {public_line(pem)}"


def dropbear_form(pem: bytes) -> bytes:
    """Give the key in dropbear's own file format: name, then 64 bytes of private and public key.

    Source: dropbear's ed25519.c, buf_put_ed25519_priv_key; lengths are SSH's uint32.
    """
    key = _load(pem)
    private = key.private_bytes_raw()
    public = key.public_key().public_bytes_raw()
    return struct.pack(">I", len(_NAME)) + _NAME + struct.pack(">I", 64) + private + public
