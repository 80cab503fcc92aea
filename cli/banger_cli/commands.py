"""What every command has: --json, lazily loaded rooms, words after `--`, options in common."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from banger_cli.output import Out

Function = TypeVar("Function", bound=Callable[..., Any])

_SETTINGS = {"help_option_names": ["-h", "--help"]}


def _use_json(ctx: click.Context, _: click.Parameter, value: object) -> None:
    if value in (True, "json"):
        ctx.ensure_object(Out).as_json = True


def _json_options() -> list[click.Parameter]:
    return [
        click.Option(
            ["--json"], is_flag=True, expose_value=False, callback=_use_json, help="Print JSON, errors too."
        ),
        click.Option(
            ["-o", "--output"],
            type=click.Choice(["text", "json"]),
            default="text",
            expose_value=False,
            callback=_use_json,
            hidden=True,
        ),
    ]


class Leaf(click.Command):
    """A command that does something; its examples are printed as they are written."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("context_settings", _SETTINGS)
        super().__init__(*args, **kwargs)
        self.params.extend(_json_options())

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Print the examples unwrapped (click's signature)."""
        if self.epilog:
            formatter.write("\n" + self.epilog.rstrip() + "\n")


class WithWords(Leaf):
    """A command that ends in `-- CMD...`: words that belong to the guest, exactly as typed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Set the words after the first `--` aside, and parse the rest."""
        cut = args.index("--") if "--" in args else len(args)
        ctx.params["words"] = tuple(args[cut + 1 :])
        return super().parse_args(ctx, args[:cut])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Show `-- CMD...` at the end of the usage line."""
        return [*super().collect_usage_pieces(ctx), "[-- CMD...]"]


class Branch(click.Group):
    """A group whose commands are imported when they are asked for."""

    def __init__(
        self, name: str, rooms: dict[str, str], aliases: dict[str, str] | None = None, **kwargs: Any
    ):
        kwargs.setdefault("context_settings", _SETTINGS)
        super().__init__(
            name, no_args_is_help=False, invoke_without_command=True, callback=_show_help, **kwargs
        )
        self._rooms = rooms
        self._aliases = aliases or {}
        self.params.extend(_json_options())

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Name the commands in the order in which they are useful (click's signature)."""
        return list(self._rooms)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import one command; None when there is none of this name (click's signature)."""
        target = self._rooms.get(self._aliases.get(cmd_name, cmd_name))
        if target is None:
            return None
        module, _, attribute = target.partition(":")
        command: click.Command = getattr(importlib.import_module(f"banger_cli.{module}"), attribute)
        return command

    format_epilog = Leaf.format_epilog


@click.pass_context
def _show_help(ctx: click.Context) -> None:
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def stacked(options: Sequence[Callable[[Function], Function]]) -> Callable[[Function], Function]:
    """Give a decorator that adds several options, shown in the order given."""

    def add(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return add


interrupt_option = click.option(
    "--on-interrupt",
    type=click.Choice(["detach", "cancel"]),
    help="What Ctrl-C does to it while you wait: leave it alone, or undo it. On a terminal you are asked.",
)

key_option = click.option(
    "--idempotency-key", "key", metavar="KEY", help="Repeated with its key, a request follows the first one."
)


def op_line(reply: dict[str, Any]) -> str:
    """Show the operation that a request became, or that it joined."""
    return f"op: {reply['op']}{' (asked for before: joined)' if reply.get('joined') else ''}"


wait_options = stacked(
    [
        click.option(
            "--wait/--no-wait", "waits", default=True, help="Wait until it is done.", show_default=True
        ),
        interrupt_option,
    ]
)
