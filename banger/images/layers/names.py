"""Names inside an image: bytes that someone else chose. Checked here, and shown escaped."""

from __future__ import annotations

from banger.errors import InvalidImage

LONGEST_NAME = 255
LONGEST_PATH = 4095
DEEPEST = 1000
_SHOWN = 120


def shown(raw: bytes) -> str:
    """Quote a name for people: what does not print or decode is escaped, and long ones are cut."""
    text = raw[:_SHOWN].decode("utf-8", "surrogateescape")
    return repr(text) + ("…" if len(raw) > _SHOWN else "")


def split(path: bytes) -> list[bytes]:
    """Split a path into its components below the image's root; `/`, `.` and `//` mean nothing.

    Raises InvalidImage for a path that is empty, holds NUL or `..`, or that no Linux would take.
    """
    if not path or b"\0" in path:
        raise InvalidImage(f"The path {shown(path)} is empty or holds a NUL byte.")
    if len(path) > LONGEST_PATH:
        raise InvalidImage(f"The path {shown(path)} has more than {LONGEST_PATH} bytes.")
    parts = [part for part in path.split(b"/") if part and part != b"."]
    if b".." in parts:
        raise InvalidImage(f"The path {shown(path)} leads upwards.")
    if len(parts) > DEEPEST:
        raise InvalidImage(f"The path {shown(path)} is more than {DEEPEST} directories deep.")
    if len(path) > LONGEST_NAME and any(len(part) > LONGEST_NAME for part in parts):
        raise InvalidImage(f"The path {shown(path)} has a part of more than {LONGEST_NAME} bytes.")
    return parts
