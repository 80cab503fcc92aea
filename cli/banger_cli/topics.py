"""`banger help`: pages that belong to no command."""

from __future__ import annotations

import click

from banger_cli import page
from banger_cli.commands import Leaf

_PAGES = {"top": page.TOP, "exit-codes": page.EXIT_CODES}


@click.command("help", cls=Leaf)
@click.argument("name", metavar="[exit-codes]", type=click.Choice(list(_PAGES)), default="top")
def topic(name: str) -> None:
    """Show what there is, or what the exit codes mean."""
    click.echo(_PAGES[name].rstrip())
