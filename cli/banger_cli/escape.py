"""Make text from elsewhere harmless on a terminal."""

from __future__ import annotations

# C0, DEL and C1 controls move cursors and set titles; the rest reorder or hide what is beside
# them (Unicode Standard Annex 9, section 2; "Trojan Source", CVE-2021-42574).
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0))
_DIRECTION = (0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFEFF)
_SHOWN = {code: f"\\x{code:02x}" for code in _CONTROLS} | {code: f"\\u{code:04x}" for code in _DIRECTION}
_SHOWN_LINES = {code: shown for code, shown in _SHOWN.items() if code != 0x0A}


def escape(text: str) -> str:
    r"""Show control and direction characters as `\x1b` and `\u202e`; line ends too."""
    return text.translate(_SHOWN)


def escape_lines(text: str) -> str:
    """Do the same, but let line ends be: for text that is laid out in lines already."""
    return text.translate(_SHOWN_LINES)
