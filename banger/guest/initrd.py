"""The guest's first root file system: the kernel bundle's archive, then one VM's own files."""

from __future__ import annotations

import tempfile
from pathlib import Path

from banger.guest import cpio, keys
from banger.model import Value

KERNEL_WORDS = (
    "console=ttyS0",
    "quiet",
    "loglevel=4",
    "cryptomgr.notests",
    "panic=-1",
    "random.trust_cpu=on",
)
"""The kernel's command line: a panic ends the VM, self-tests of ciphers cost 0.2 s."""


class GuestFiles(Value):
    """What makes a guest itself. `host_key_pem` is in OpenSSH's format; `address` has its prefix length."""

    hostname: str
    authorized_keys: str
    host_key_pem: bytes
    address: str
    gateway: str
    nameserver: str


def write_initrd(base: Path, out: Path, files: GuestFiles) -> None:
    """Write the initrd of one VM: `base`, then an archive with its files; whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=out.parent, prefix=".initrd.", delete=False) as whole:
        temporary = Path(whole.name)
        try:
            content = base.read_bytes()
            whole.write(content + b"\0" * (-len(content) % 512))
            whole.write(cpio.archive(_entries(files)))
            whole.flush()
            temporary.replace(out)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _entries(files: GuestFiles) -> list[cpio.Entry]:
    hosts = f"127.0.0.1 localhost\n127.0.1.1 {files.hostname}\n::1 localhost ip6-localhost ip6-loopback\n"
    return [
        cpio.file("banger/hostname", f"{files.hostname}\n".encode()),
        cpio.file("banger/hosts", hosts.encode()),
        cpio.file("banger/resolv.conf", f"nameserver {files.nameserver}\n".encode()),
        cpio.file("banger/network", f"{files.address} {files.gateway}\n".encode()),
        cpio.file("banger/authorized_keys", files.authorized_keys.encode(), 0o600),
        cpio.file("banger/host_key", keys.dropbear_form(files.host_key_pem), 0o600),
    ]
