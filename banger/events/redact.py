"""Take out of a document what tells whose machine it came from, and every secret in it.

Redaction looks at strings only and is deterministic: equal strings stay equal, so the events of a
bundle still fold to the same state. It errs on the side of taking out too much.
"""

from __future__ import annotations

import functools
import os
import pwd
import re
import socket
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from banger.config import Dirs
from banger.events import vocabulary as ev
from banger.model import Value

SECRET = "<secret>"  # noqa: S105  what is written in its place
_KEY = "<key>"
_LOGIN = "<login>"

# -- what secrets look like -------------------------------------------------------------------
# Strings come from programs' output: each pattern takes time proportional to the string's length,
# which is what the atomic groups and possessive repeats (`(?>…)`, `*+`) are for.

_BEGIN = r"(?<![\w-])"
_LINE_NAME = r"(?>[\w-]*?(?:authori[sz]ation|cookie)[\w-]*)"
_NAME = (
    r"(?>[\w-]*?(?:passw(?:or)?d|passphrase|secret|token|credential)[\w-]*"
    # A key, unless it is a public one or only the id of one: public_key, access_key_id.
    r"|(?![\w-]*pub)[\w-]*?(?:[_-]|api|access|private|signing|encryption)key(?![\w-]))"
)
_IS = r"""\\*["']?\s*[=:]>?\s*"""
_QUOTED = r"""(?P<quote>\\*["']).*?(?:(?<!\\)(?P=quote)|\Z)"""
_SSH_KEY = r"(?:ssh|ecdsa|sk)-[\w@.-]{1,64}\s+AAAA[\w+/=]+(?:[ \t]+\S+@\S+)?"
# After a secret's name, also where more names or the kind of secret come first. (An atomic group: Python
# 3.11.2, which is Debian 12's, forgets the rest of a group that is repeated possessively.)
_VALUE = rf"""(?>(?:[\w-]++\\*["']?[=:]\s++)*)(?:{_QUOTED}|(?:bearer|basic|digest)\s+\S++|{_SSH_KEY}|\S*+)"""

_SECRET_NAME = re.compile(f"{_BEGIN}(?:{_LINE_NAME}|{_NAME})", re.IGNORECASE)
_FLAG = re.compile(rf"{_BEGIN}--?{_NAME}\Z", re.IGNORECASE)

# What the group `goes` matches is replaced. A value is only looked at: another name may begin in it.
_SECRETS = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), stand)
    for pattern, stand in (
        (rf"{_BEGIN}{_LINE_NAME}{_IS}(?P<goes>{_QUOTED}|[^\r\n]++)", SECRET),
        (rf"{_BEGIN}{_NAME}{_IS}(?=(?P<goes>{_VALUE}))", SECRET),
        (rf"""{_BEGIN}--?{_NAME}\\*["']?[\s,]+(?=(?P<goes>{_VALUE}))""", SECRET),
        (r"""\b(?:bearer|basic)\s+(?=(?P<goes>[^\s"']++))""", SECRET),
        (f"(?P<goes>{_SSH_KEY})", _KEY),
        (r"(?<=://)(?P<goes>[^\s/?#]*)@", _LOGIN),
        (r"(?P<goes>-{4,5} ?BEGIN [^-\n]{1,64}-{4,5}.*?(?:-{4,5} ?END [^-\n]{1,64}-{4,5}|\Z))", _KEY),
    )
)
_PEM_END = re.compile(r"-{4,5} ?END [^-\n]{1,64}-{4,5}")
_PEM_BODY = string.ascii_letters + string.digits + "+/=\r\n\\"

_NAME_ROOM = 256
"""Characters of a secret's name and what is between it and its value, at most."""

Span = tuple[int, int, str]
"""Where something begins and ends in a string, and what is written instead."""


class Private(Value):
    """What names a person or a machine: each path with its stand-in, and names."""

    paths: tuple[tuple[str, str], ...] = ()
    users: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()


def private_here(dirs: Dirs) -> Private:
    """Find the names of this user and this host, and the paths that contain them."""
    home = os.environ.get("HOME") or str(Path.home())
    stands = {
        str(dirs.state): "$STATE",
        str(dirs.cache): "$CACHE",
        str(dirs.runtime): "$RUNTIME",
        str(dirs.config): "$CONFIG",
        home: "~",
        f"/run/user/{os.getuid()}": "/run/user/<uid>",
    }
    node = socket.gethostname()
    return Private(
        paths=tuple(_also_resolved(stands)),
        users=tuple(sorted({_account(), *(os.environ.get(name, "") for name in ("USER", "LOGNAME"))} - {""})),
        hosts=tuple(sorted({node, node.partition(".")[0]})),
    )


def _also_resolved(stands: dict[str, str]) -> Iterator[tuple[str, str]]:
    for path, stand in stands.items():
        yield from ((each, stand) for each in sorted({path, os.path.realpath(path)}))


def _account() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return ""


class Redactor:
    """Redacts values, and counts in `counts` what it took out, by what it wrote instead."""

    def __init__(self, private: Private):
        self.counts: Counter[str] = Counter()
        self._stands = {path.rstrip("/"): stand for path, stand in private.paths if len(path) > 1}
        # A path begins a word, or follows a one-letter option as in -I/home/me; it ends with a part.
        self._paths = re.compile(rf"(?:(?<![\w.-])|(?<=-[A-Za-z]))(?:{_any(self._stands)})(?![\w-]|\.\w)")
        self._names = [(_whole_words(private.users), "<user>"), (_whole_words(private.hosts), "<host>")]

    def redact(self, value: Any) -> Any:
        """Give a JSON value with every string in it redacted, the keys of objects too."""
        match value:
            case str():
                return self.text(value)
            case dict():
                return {
                    self.text(key): self._member(key, each) for key, each in value.items() if key != "uid"
                }
            case list() | tuple():
                return self._words(value)
            case _:
                return value

    def _member(self, key: str, value: Any) -> Any:
        return self._hide(value) if _SECRET_NAME.search(key) else self.redact(value)

    def _words(self, values: Iterable[Any]) -> list[Any]:
        """Redact a list; what follows an option such as `--password` in it is a secret."""
        found: list[Any] = []
        before: Any = None
        for value in values:
            secret = isinstance(before, str) and _FLAG.search(before)
            found.append(self._hide(value) if secret else self.redact(value))
            before = value
        return found

    def _hide(self, value: Any) -> Any:
        match value:
            case None | bool() | "":
                return value
            case dict():
                return {self.text(key): self._hide(each) for key, each in value.items() if key != "uid"}
            case list() | tuple():
                return [self._hide(each) for each in value]
            case _:
                return self._instead(SECRET)

    def text(self, text: str) -> str:
        """Redact one string."""
        pieces, begin = [], 0
        for start, end, stand in _merged([*_secrets(text), *self._private(text)]):
            pieces += [text[begin:start], self._instead(stand)]
            begin = end
        return "".join([*pieces, text[begin:]])

    def _private(self, text: str) -> Iterator[Span]:
        for found in self._paths.finditer(text):
            yield *found.span(), self._stands[found[0]]
        for pattern, stand in self._names:
            yield from ((*found.span(), stand) for found in pattern.finditer(text))

    def _instead(self, stand: str) -> str:
        self.counts[stand] += 1
        return stand


def _secrets(text: str) -> Iterator[Span]:
    for pattern, stand in _SECRETS:
        found = pattern.search(text)
        while found:
            yield *found.span("goes"), stand
            # Only a name at the very end of a value can have a value that ends after it.
            found = pattern.search(text, max(found.end(), found.end("goes") - _NAME_ROOM))
    for end in _PEM_END.finditer(text):  # the beginning of the key may have been cut off
        yield len(text[: end.start()].rstrip(_PEM_BODY)), end.end(), _KEY


def _merged(spans: list[Span]) -> Iterator[Span]:
    """Give spans in order; those that overlap become one, with the stand-in of the first given."""
    rank = {span: number for number, span in reversed([*enumerate(spans)])}
    current: Span | None = None
    for span in sorted(rank, key=lambda span: span[:2]):
        if current is not None and span[0] < current[1]:
            first = min(current, span, key=lambda span: rank.get(span, 0))
            current = current[0], max(current[1], span[1]), first[2]
            rank[current] = rank[first]
            continue
        if current is not None:
            yield current
        current = span
    if current is not None:
        yield current


def _any(words: Iterable[str]) -> str:
    """Match any of some words, the longest that fits; without words nothing."""
    return "|".join(re.escape(word) for word in sorted(words, key=lambda word: (-len(word), word))) or r"(?!)"


def _whole_words(names: Iterable[str]) -> re.Pattern[str]:
    telling = [name for name in names if name.lower() not in common_words()]
    return re.compile(rf"(?<![^\W_])(?:{_any(telling)})(?![^\W_])", re.IGNORECASE)


@functools.cache
def common_words() -> frozenset[str]:
    """Give the names that tell nothing: those every host has, and the words of the log's own language.

    A bundle of a host named `vm` or of a user named `image` could not be read without them.
    """
    words: set[str] = {"root", "localhost"}
    for shape in _shapes(msgspec.json.schema(ev.AnyEvent)):
        for text in (*shape.get("properties", ()), *shape.get("enum", ())):
            words.update(re.findall(r"[a-z]+", str(text)))
    return frozenset(words)


def _shapes(schema: Any) -> Iterator[dict[str, Any]]:
    """Walk through a JSON schema's objects."""
    if isinstance(schema, dict):
        yield schema
        for each in schema.values():
            yield from _shapes(each)
    elif isinstance(schema, list):
        for each in schema:
            yield from _shapes(each)
