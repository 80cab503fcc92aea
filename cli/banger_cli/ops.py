"""`banger ops`: what was asked for, step by step, and what became of it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from banger import layout
from banger.errors import BangerError, Cancelled, WrongState
from banger_cli import wire
from banger_cli.bundle import replayed
from banger_cli.commands import Branch, Leaf, wait_options
from banger_cli.follow import events, follow, settle, wait
from banger_cli.interrupt import Interruption
from banger_cli.output import Out, shortened
from banger_cli.screen import Screen

Json = dict[str, Any]

branch = Branch(
    "ops",
    {
        "list": "ops:list_",
        "show": "ops:show",
        "follow": "ops:follow_",
        "cancel": "ops:cancel",
        "retry": "ops:retry",
        "retry-undo": "ops:retry_undo",
        "abandon": "ops:abandon",
        "audit": "ops:audit",
        "bundle": "bundle:bundle",
    },
    aliases={"ls": "list"},
    help="See what was asked for and what became of it, step by step.",
    epilog="""\
Examples:
  banger ops list                what goes on, and what went before
  banger ops show op-k3f9a2      one, with its steps, their times and its error
  banger ops follow op-k3f9a2    watch it, from its first event""",
)

_MARKS = {"done": "✓", "failed": "✗", "undone": "↩", "started": "·", "pending": " "}


@click.command("list", cls=Leaf, epilog="""\
Examples:
  banger ops list
  banger ops list --vm web --limit 5""")  # fmt: skip
@click.option("--vm", metavar="NAME", help="Of this VM only.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="The latest so many.")
@click.pass_obj
def list_(out: Out, vm: str | None, limit: int) -> None:
    """List operations, the latest first."""
    ops = wire.call("ops.list", vm=vm, limit=limit)["ops"]
    rows = [
        (
            op["id"],
            op["kind"],
            op["name"],
            op["fate"] or op["state"],
            op["reason"] or op["step"],
            _took(op),
            _asked(op),
        )
        for op in ops
    ]
    out.show({"ops": ops}, layout.table(("OP", "KIND", "NAME", "STATE", "STEP", "TOOK", "ASKED"), rows))


def _took(op: Json) -> str | None:
    return None if op["seconds"] is None else layout.seconds(op["seconds"])


def _asked(op: Json) -> str:
    return f"{layout.ago(op['requested_us'])} ago"


@click.command("show", cls=Leaf, epilog="""\
Examples:
  banger ops show op-k3f9a2
  banger ops show op-k3f9a2 --json
  banger ops show --bundle op-k3f9a2.bundle.json""")  # fmt: skip
@click.argument("op", metavar="OP", required=False)
@click.option("--bundle", type=click.Path(path_type=Path), metavar="FILE", help="Tell it from a bundle.")
@click.pass_obj
def show(out: Out, op: str | None, bundle: Path | None) -> None:
    """Show one operation, step by step; from a bundle without a daemon."""
    found = _found(op) if bundle is None else replayed(bundle, op)
    out.show({"op": found}, _story(found))


def _found(op: str | None) -> Json:
    if op is None:
        raise click.UsageError("Missing argument 'OP'.", click.get_current_context())
    found: Json = wire.call("ops.show", op=op)["op"]
    return found


def _story(op: Json) -> Iterator[str]:
    yield from layout.pairs(
        [
            ("op", op["id"]),
            ("kind", op["kind"]),
            ("vm", f"{op['name']} ({op['vm']})" if op["vm"] else None),
            ("state", op["fate"] or op["state"]),
            ("waits", (op["reason"] or "").removeprefix("waits ") or None),
            ("for", op["parent"]),
            ("asked", layout.moment(op["requested_us"])),
            ("took", _took(op)),
            ("claims", op["epoch"] if op["epoch"] > 1 else None),
            *([("error", op["error"]["message"])] if op["error"] else []),
            *([("hint", op["error"]["hint"])] if op["error"] and op["error"].get("hint") else []),
        ]
    )
    yield from (f"undo error:  {words}" for words in dict.fromkeys(_messages(op.get("undo_errors", ()))))
    if op["steps"]:
        yield ""
        yield from layout.table(("  STEP", "TOOK", "TRIES", "UNDO", "FACTS"), map(_step, op["steps"]))
    if op["resources"]:
        rows = [(each["kind"], each["id"], each["state"], each["step"]) for each in op["resources"]]
        yield from ("", *layout.table(("RESOURCE", "ID", "STATE", "STEP"), rows))
    yield from _by_root(op.get("root", ()))


def _by_root(lines: list[Json] | None) -> Iterator[str]:
    """Show root's own account beside the owner's."""
    if lines is None:
        yield from ("", "The root helper does not tell what it did: it does not answer.")
    elif lines:
        rows = [
            (
                layout.moment(each["time_us"]),
                *(each[key] or None for key in ("step", "verb", "outcome", "message")),
            )
            for each in lines
        ]
        yield from ("", *layout.table(("BY ROOT", "STEP", "VERB", "OUTCOME", "MESSAGE"), rows))


def _messages(errors: Iterable[Json]) -> Iterator[str]:
    return (error["message"] for error in errors)


def _step(step: Json) -> tuple[str, str | None, int | None, str | None, str]:
    took = step["seconds"]
    undo = step["undo_seconds"]
    said = step["error"]["message"] if step["error"] else _facts(step["facts"])
    return (
        f"{_MARKS.get(step['state'], '?')} {step['title']}",
        None if took is None else layout.seconds(took),
        step["attempts"] or None,
        layout.seconds(undo) if undo is not None else "yes" if step["undone"] else None,
        said,
    )


def _facts(facts: Json) -> str:
    return " ".join(f"{key}={shortened(value)}" for key, value in facts.items())


@click.command("follow", cls=Leaf, epilog="""\
Examples:
  banger ops follow op-k3f9a2
  banger ops follow op-k3f9a2 --after 1041 --json    from a cursor, one event per line""")  # fmt: skip
@click.argument("op", metavar="OP")
@click.option("--after", type=click.IntRange(0), default=0, help="Begin after the event with this number.")
@click.pass_obj
def follow_(out: Out, op: str, after: int) -> None:
    """Watch an operation from its first event until it ends.

    Exits by its fate. Nothing is lost or repeated, also when the daemon dies meanwhile.
    Ctrl-C leaves it alone.
    """
    if out.as_json:
        result: Json = {}
        for line in events(op, after=after):
            out.document(line)
            result = line.get("result", result)
        raise click.exceptions.Exit(_exit_code(result))
    result = settle(follow(op, Screen(sys.stdout), after=after))
    out.lines([f"done in {layout.seconds(result['seconds'])}"])


def _exit_code(result: Json) -> int:
    try:
        settle(result)
    except BangerError as error:
        return error.exit_code  # the error itself is in the last line already
    return 0


@click.command("cancel", cls=Leaf, epilog="""\
Examples:
  banger ops cancel op-k3f9a2""")  # fmt: skip
@click.argument("op", metavar="OP")
@wait_options
@click.pass_obj
def cancel(out: Out, op: str, waits: bool, on_interrupt: str | None) -> None:
    """Stop an operation and undo what it has done.

    Fails when it ended before it could be stopped.
    """
    reply = wire.call("ops.cancel", op=op)
    if not waits:
        out.show(reply, [f"{reply['op']} is asked to stop"])
        return
    result = follow(reply["op"], out.screen, interruption=Interruption(out.screen, on_interrupt, reply["op"]))
    if result["fate"] == "done":
        raise WrongState("It was done before it could be stopped.", op=reply["op"])
    try:
        settle(result)
    except Cancelled:
        out.show(result, [f"{reply['op']} is undone"])


@click.command("retry", cls=Leaf, epilog="""\
Examples:
  banger ops retry op-k3f9a2""")  # fmt: skip
@click.argument("op", metavar="OP")
@wait_options
@click.pass_obj
def retry(out: Out, op: str, waits: bool, on_interrupt: str | None) -> None:
    """Go on with an operation that is stuck, from the step that failed; finished steps stay.

    One that was undone is asked for anew, as another operation.
    """
    _try_again(out, "ops.retry", op, waits, on_interrupt, ("done",))


@click.command("retry-undo", cls=Leaf, epilog="""\
Examples:
  banger ops retry-undo op-k3f9a2""")  # fmt: skip
@click.argument("op", metavar="OP")
@wait_options
@click.pass_obj
def retry_undo(out: Out, op: str, waits: bool, on_interrupt: str | None) -> None:
    """Go on undoing an operation that is stuck, from the step that could not be undone."""
    _try_again(out, "ops.retry-undo", op, waits, on_interrupt, ("undone", "cancelled"))


def _try_again(
    out: Out, method: str, op: str, waits: bool, on_interrupt: str | None, wanted: tuple[str, ...]
) -> None:
    reply = wire.call(method, op=op)
    if not waits:
        out.show(reply, [f"op: {reply['op']}"])
        return
    result = follow(reply["op"], out.screen, interruption=Interruption(out.screen, on_interrupt, reply["op"]))
    if result["fate"] not in wanted:
        settle(result)
    out.show({**reply, **result}, [f"{reply['op']} is {result['fate']}"])


@click.command("abandon", cls=Leaf, epilog="""\
Examples:
  banger ops abandon op-k3f9a2""")  # fmt: skip
@click.argument("op", metavar="OP")
@click.pass_obj
def abandon(out: Out, op: str) -> None:
    """Give up an operation that is stuck. What it still holds stays in the ledger."""
    reply = wire.call("ops.abandon", op=op)
    out.show(reply, [f"{reply['op']} is given up"])


@click.command("audit", cls=Leaf, epilog="""\
Examples:
  banger ops audit
  banger ops audit --fix       and remove what is nobody's""")  # fmt: skip
@click.option("--fix", is_flag=True, help="Remove what is on the host and belongs to nobody.")
@click.pass_obj
def audit(out: Out, fix: bool) -> int:
    """Compare what operations acquired and released with what is really on the host.

    Exits with 1 when something leaked or is missing, or what root made could not be looked at.
    """
    found = wire.call("ops.audit")
    if fix and found["leaked"]:
        wait(wire.call("ops.sweep")["op"], out)
        before = found["leaked"]
        found = wire.call("ops.audit")
        found["removed"] = [each for each in before if each not in found["leaked"]]
    out.show(found, _audited(found))
    return 1 if found["leaked"] or found["missing"] or found["unseen"] else 0


def _audited(found: Json) -> Iterator[str]:
    yield (
        f"acquired {found['acquired']}, released {found['released']}, held {found['held']},"
        f" leaked {len(found['leaked'])}, missing {len(found['missing'])}"
    )
    for word in ("leaked", "missing", "removed"):
        for each in found.get(word, ()):
            by = f" by {each['op']} on {layout.moment(each['time_us'])}" if each["op"] else ""
            yield f"  {word}: {each['kind']} {each['id']} of {each['vm']}{', acquired' + by if by else ''}"
    if found["unseen"]:
        yield f"Taps and rules were not looked at. {found['unseen']}"
    if found["leaked"]:
        yield "`banger ops audit --fix` removes what leaked."
