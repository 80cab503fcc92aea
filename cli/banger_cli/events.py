"""`banger events` and `banger state`: the log itself, and what is made from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from banger import layout
from banger.errors import Busy
from banger_cli import wire
from banger_cli.commands import Branch, Leaf, stacked
from banger_cli.output import Out

Json = dict[str, Any]

branch = Branch(
    "events",
    {
        "list": "events:list_",
        "tail": "events:tail",
        "export": "events:export",
        "verify": "events:verify",
    },
    aliases={"ls": "list"},
    help="The log: everything that happened, in the order in which it happened.",
    epilog="""\
Examples:
  banger events list --op op-k3f9a2     what one operation did
  banger events tail                    everything, as it happens
  banger events export > log.jsonl      the whole log, one event per line
  banger events verify                  is it what was written?""",
)

state = Branch(
    "state",
    {"rebuild": "events:rebuild", "salvage": "events:salvage"},
    help="What is known of VMs, operations and resources: a projection of the log.",
    epilog="Examples:\n  banger state rebuild\n  banger state salvage       after damage to the log",
)


_filters = stacked(
    [
        click.option("--op", metavar="OP", help="Of this operation only."),
        click.option("--vm", metavar="NAME", help="Of this VM only; also when it is gone."),
        click.option("--type", "kind", metavar="TYPE", help="Of this type only, for example step.failed."),
        click.option("--after", type=click.IntRange(0), default=0, help="Begin after this number."),
    ]
)


@click.command("list", cls=Leaf, epilog="""\
Examples:
  banger events list --vm web
  banger events list --type step.failed --json""")  # fmt: skip
@_filters
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True, help="So many at most.")
@click.pass_obj
def list_(out: Out, op: str | None, vm: str | None, kind: str | None, after: int, limit: int) -> None:
    """List events, the oldest first."""
    reply = wire.call("events.list", op=op, vm=vm, type=kind, after=after, limit=limit)
    out.show(reply, map(_line, reply["events"]))
    if len(reply["events"]) == limit:
        out.note(f"There may be more: --after {reply['events'][-1]['seq']} goes on.")


@click.command("tail", cls=Leaf, epilog="""\
Examples:
  banger events tail
  banger events tail --after 0 --json      everything there ever was, then what comes""")  # fmt: skip
@click.option("--after", type=click.IntRange(0), help="Begin after this number; by default with what comes.")
@click.pass_obj
def tail(out: Out, after: int | None) -> None:
    """Show events as they happen, until Ctrl-C. Nothing is lost when the daemon dies meanwhile."""
    if after is None:
        newest = wire.call("events.list", limit=1, newest=True)["events"]
        after = newest[-1]["seq"] if newest else 0
    while True:
        try:
            with wire.connect() as daemon:
                for line in daemon.stream("events.tail", after=after):
                    after = line["event"]["seq"]
                    out.show(line["event"], [_line(line["event"])])
        except wire.ConnectionLost:
            out.note("banger: the daemon went away; connecting again")


def _line(event: Json) -> str:
    words = " ".join(f"{key}={_value(value)}" for key, value in event["data"].items())
    return (
        f"{event['seq']:>6}  {layout.moment(event['time_us'])}  {event['stream']}  {event['type']}  {words}"
    )


def _value(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@click.command("export", cls=Leaf, epilog="""\
Examples:
  banger events export > log.jsonl
  banger events verify --file log.jsonl""")  # fmt: skip
@click.pass_obj
def export(out: Out) -> None:
    """Print the whole log, one row as JSON per line, with its hashes. Needs no daemon."""
    from banger.events import verify as check

    database = _database()
    end = check.stored_end(database)
    rows = (row for row in check.stored_rows(database) if end is None or row[0] <= end.rows)
    for line in check.export(rows, end):
        click.echo(line)
    out.note("exported")


@click.command("verify", cls=Leaf, epilog="""\
Examples:
  banger events verify
  banger events verify --file log.jsonl""")  # fmt: skip
@click.option("--file", "file", type=click.Path(path_type=Path), help="An exported log instead of our own.")
@click.pass_obj
def verify(out: Out, file: Path | None) -> None:
    """Check that no event was changed, moved or taken away. Needs no daemon.

    Names the first row that is not what was written. Note the last hash elsewhere to see later
    whether rows were cut off the end.
    """
    from banger.events import verify as check

    verdict = check.verify_export(file) if file else check.verify_log(_database())
    verdict.require_good()
    document = {"rows": verdict.rows, "head": verdict.head, "ok": True}
    out.show(
        document, [f"{verdict.rows} events, every one as it was written; the last hash is {verdict.head}"]
    )


def _database() -> Path:
    from banger import config

    return config.find_dirs().database


@click.command("rebuild", cls=Leaf, epilog="Examples:\n  banger state rebuild")
@click.pass_obj
def rebuild(out: Out) -> None:
    """Throw away what was derived from the log and derive it again.

    The result is identical, unless something else has written to the database: then it says what.
    """
    reply = wire.call("state.rebuild")
    out.show(reply, _rebuilt(reply))


def _rebuilt(reply: Json) -> Iterator[str]:
    yield f"rebuilt from {reply['events']} events in {layout.seconds(reply['seconds'])}"
    if reply["changed"]:
        yield f"these were not what the log says, and are now: {', '.join(reply['changed'])}"
    else:
        yield "identical to what it was"


@click.command("salvage", cls=Leaf, epilog="Examples:\n  banger events verify\n  banger state salvage")
@click.pass_obj
def salvage(out: Out) -> None:
    """Go on with the good rows of a damaged log. The damaged file is kept beside it.

    Operations that were under way at the last good row go on from there. Needs the daemon stopped.
    """
    from banger import config
    from banger.events.salvage import salvage as begin_anew
    from banger.rpc.daemon import only_one

    if wire.dial() is not None:
        raise Busy("A daemon has the log open.", hint="`banger daemon stop` ends it.")
    dirs = config.find_dirs()
    with only_one(dirs):
        found = begin_anew(dirs.database)
    document = {"rows": found.rows, "why": found.why, "kept": str(found.kept) if found.kept else None}
    out.show(document, _salvaged(document))


def _salvaged(found: Json) -> Iterator[str]:
    if found["kept"] is None:
        yield f"The log is good, all {found['rows']} events of it: it is left as it is."
        return
    yield f"The log goes on after its {found['rows']} good events. Row {found['rows'] + 1}: {found['why']}"
    yield f"What was found is kept in {found['kept']}"
    yield "`banger ops audit` tells what is on the host and not in the log."
