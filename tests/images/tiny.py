"""Root file systems of a few entries, as small as they can be and still be read."""

from __future__ import annotations

import io
import subprocess
import tarfile
import tempfile
from pathlib import Path

from banger import proc


def squashfs(archive: bytes | None = None) -> bytes:
    """Make one from a tar archive; by default with a file in /root."""
    with tempfile.TemporaryDirectory() as beside:
        path = Path(beside, "root.squashfs")
        words = [proc.which("tar2sqfs"), "--quiet", "--no-skip", "--compressor", "lz4", str(path)]
        subprocess.run(words, input=archive or home(), check=True, capture_output=True)
        return path.read_bytes()


def home(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """Make a tar archive with a /root: these members, or else one file."""
    plain = file("root/.profile", 5)
    (top := tarfile.TarInfo("root")).type, top.mode = tarfile.DIRTYPE, 0o755
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, content in ((top, b""), *(members or ((plain, b"tiny\n"),))):
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def file(name: str, size: int) -> tarfile.TarInfo:
    """Make a member for a file of so many bytes."""
    (member := tarfile.TarInfo(name)).size = size
    return member
