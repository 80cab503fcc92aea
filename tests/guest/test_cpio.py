import stat
import subprocess
from pathlib import Path

from banger import proc
from banger.guest import cpio

ENTRIES = [
    cpio.file("deep/er/odd.txt", b"12345", 0o600),
    cpio.file("empty", b""),
    cpio.link("link", "deep/er/odd.txt"),
]


def test_another_program_unpacks_it(tmp_path: Path) -> None:
    """The cpio of busybox finds content, modes, links and the directories that were not named."""
    subprocess.run(
        [proc.which("busybox", "busybox-static"), "cpio", "-i"],
        input=cpio.archive(ENTRIES),
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    odd = tmp_path / "deep/er/odd.txt"
    assert (odd.read_bytes(), stat.S_IMODE(odd.stat().st_mode)) == (b"12345", 0o600)
    assert (tmp_path / "link").readlink() == Path("deep/er/odd.txt")
    assert (tmp_path / "empty").read_bytes() == b""


def test_equal_content_makes_equal_bytes() -> None:
    """Nothing of the moment or the machine gets into an archive."""
    assert cpio.archive(ENTRIES) == cpio.archive(list(ENTRIES))
