"""Write a command down so that a POSIX shell in a guest runs it word by word, byte by byte."""

from __future__ import annotations

import shlex

from banger.errors import InvalidRequest
from banger.model import Value

BUSYBOX = "/run/banger/bin/busybox"
LONGEST_WORD = 131_071
"""Bytes: Linux takes no longer one (execve(2), MAX_ARG_STRLEN)."""

MOST_BYTES = 512 << 10
"""Of a whole command: its request is one line of less than a MiB, also in base64."""

NOT_STARTED = 126
"""The exit code when a directory or a user is not there, as shells and `docker exec` have it."""

# What a shell does itself: some have no program of this name, and for the others it is cheaper.
_BUILTIN = frozenset(
    ": . [ alias bg cd command echo eval exec exit export false fg getopts hash jobs kill printf pwd read"
    " readonly set shift test times trap true type ulimit umask unalias unset wait".split()
)


class Command(Value):
    """A command and where it starts. Text holds bytes that are no UTF-8 as surrogates (PEP 383).

    Without a directory it starts in its user's home, without a user it is root's.
    """

    words: tuple[str, ...]
    directory: str | None = None
    environ: tuple[tuple[str, str], ...] = ()
    user: str | None = None


def check(command: Command) -> None:
    """Refuse what no Linux could run. Raises InvalidRequest."""
    if not command.words:
        raise InvalidRequest("The command has no words.")
    texts = [*command.words, *(f"{name}={value}" for name, value in command.environ)]
    texts += [text for text in (command.directory, command.user) if text is not None]
    sizes = [len(as_bytes(text)) for text in texts]
    if max(sizes) > LONGEST_WORD or sum(sizes) > MOST_BYTES:
        raise InvalidRequest(
            f"The command is too long: a word may have {LONGEST_WORD} bytes, all together {MOST_BYTES}.",
            hint="Standard input has no end: `banger vm exec NAME -- xargs -0 CMD < FILE`.",
        )
    if any("\0" in text for text in texts):
        raise InvalidRequest("No word of a command can hold a NUL byte.")
    for name, _ in command.environ:
        if not (name.isascii() and name.isidentifier()):
            raise InvalidRequest(f"{name!r} is no name of a variable.", hint="Letters, digits and _ only.")


def as_bytes(text: str) -> bytes:
    """Give back the bytes that a text stands for."""
    return text.encode("utf-8", "surrogateescape")


def script(command: Command, *, home: bool = True) -> str:
    """Give the line that makes a shell, whose own name is its `$0`, become the command.

    Without a directory it starts at home, or, unless `home`, where the shell is.
    """
    if command.user is None:
        return _own(command, home=home)
    user = shlex.quote(command.user)
    inner = shlex.quote(_own(command, home=True))
    return (
        f"{BUSYBOX} id -u {user} > /dev/null 2>&1 ||"
        f" {{ echo banger: there is no user {user} in the guest >&2; exit {NOT_STARTED}; }};"
        f' exec {BUSYBOX} su -s "$0" -c {inner} -- {user}'
    )


def _own(command: Command, *, home: bool) -> str:
    place = ("cd 2> /dev/null" if home else ":") if command.directory is None else _enter(command.directory)
    exports = [f"export {name}={shlex.quote(value)}" for name, value in command.environ]
    return "; ".join([place, *exports, _become(command.words)])


def _enter(directory: str) -> str:
    word = shlex.quote(f"./{directory}" if directory.startswith("-") else directory)
    return f"cd {word} || exit {NOT_STARTED}"


def _become(words: tuple[str, ...]) -> str:
    quoted = shlex.join(words)
    if words[0] in _BUILTIN:
        return f"{quoted}; exit"
    # Some shells take a first word with a dash for an option of `exec`, and not all know its end, `--`.
    return f"{quoted}; exit" if words[0].startswith("-") else f"exec {quoted}"
