"""`banger image` and `banger kernel`: what VMs boot from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from banger import layout
from banger_cli import wire
from banger_cli.commands import Branch, Leaf, key_option, op_line, wait_options
from banger_cli.follow import wait
from banger_cli.interrupt import Interruption
from banger_cli.output import Out, shortened

if TYPE_CHECKING:
    from banger.images.catalog import Catalog

Json = dict[str, Any]

images = Branch(
    "image",
    {
        "list": "artifacts:list_images",
        "show": "artifacts:show_image",
        "build": "artifacts:build_image",
        "pull": "getting:pull_image",
        "register": "getting:register",
        "promote": "getting:promote",
        "cache": "getting:cache",
        "delete": "artifacts:delete_image",
    },
    aliases={"ls": "list", "rm": "delete"},
    help="Root file systems. `vm create` builds the one it needs; this is for looking and tidying.",
    epilog="""\
Examples:
  banger image list
  banger image pull registry.example:5000/debian:12
  banger image build debian-12""",
)

kernels = Branch(
    "kernel",
    {
        "list": "artifacts:list_kernels",
        "show": "artifacts:show_kernel",
        "pull": "getting:pull_kernel",
        "import": "getting:import_kernel",
        "delete": "artifacts:delete_kernel",
    },
    aliases={"ls": "list", "rm": "delete"},
    help="Kernels. `vm create` pulls the one it needs; this is for looking and tidying.",
    epilog="Examples:\n  banger kernel list\n  banger kernel pull debian-12",
)


def _lister(kind: str) -> click.Command:
    @click.command("list", cls=Leaf, help=f"List the {kind}s that can be used, and which are here already.")
    @click.option("--available", is_flag=True, help="What the catalogs have instead.")
    @click.pass_obj
    def lister(out: Out, available: bool) -> None:
        if available:
            _list_available(out, kind)
            return
        reply = wire.call(f"{kind}.list")
        rows = [
            (
                each["name"],
                "yes" if each["present"] else "when needed",
                None if each["size_bytes"] is None else layout.size(each["size_bytes"]),
                layout.ago(each["created_us"]),
                each["digest"] and shortened(each["digest"]),
            )
            for each in reply[f"{kind}s"]
        ]
        out.show(reply, layout.table((kind.upper(), "HERE", "SIZE", "AGE", "DIGEST"), rows))

    return lister


def catalogs(out: Out) -> Catalog:
    """Read all catalogs, and say which could not be had."""
    from banger import config
    from banger.images import catalog

    found = catalog.read(config.load(config.find_dirs()).catalogs)
    for warning in found.warnings:
        out.note(f"banger: {warning}")
    return found


def ended(out: Out, reply: Json, waits: bool, on_interrupt: str | None, words: str) -> None:
    """Show the operation that a request became, or wait for it and say in words what came of it."""
    if not waits:
        out.show(reply, [op_line(reply)])
        return
    result = wait(reply["op"], out, Interruption.of(out.screen, on_interrupt, reply))
    out.show({**reply, **result}, [f"{words} in {layout.seconds(result['seconds'])}"])


def _list_available(out: Out, kind: str) -> None:
    import msgspec

    found = catalogs(out)
    entries = [entry for entry in found.entries if entry.kind == kind]
    rows = [(entry.name, type(entry.source).__name__.lower(), entry.catalog) for entry in entries]
    document = {f"{kind}s": msgspec.to_builtins(entries)}
    out.show(document, layout.table((kind.upper(), "FROM", "CATALOG"), rows))


def _shower(kind: str) -> click.Command:
    @click.command("show", cls=Leaf, help=f"Show what one {kind} is made of.")
    @click.argument("name", metavar="NAME")
    @click.pass_obj
    def shower(out: Out, name: str) -> None:
        reply = wire.call(f"{kind}.show", **{kind: name})
        out.show(reply, _story(reply.get(kind, reply)))

    return shower


def _story(found: Json) -> Iterator[str]:
    yield from layout.pairs(
        [
            ("name", found["name"]),
            ("digest", found["digest"]),
            ("here", "yes" if found["present"] else "when needed"),
            ("size", None if found["size_bytes"] is None else layout.size(found["size_bytes"])),
            ("created", layout.moment(found["created_us"])),
            ("by", found.get("op")),
            ("kernel of its VMs", found.get("kernel")),
            ("source", found.get("source")),
        ]
    )
    for key, value in (found["details"] or {}).items():
        if value in ("", []) or (key == "kernel" and "kernel" in found):
            continue
        if isinstance(value, list):
            yield from ("", f"{key}:", *(f"  {each}" for each in value))
        else:
            yield f"{key}: {value}"


def _maker(kind: str, verb: str, sentence: str, done: str) -> click.Command:
    @click.command(verb, cls=Leaf, help=sentence, epilog=f"Examples:\n  banger {kind} {verb} debian-12")
    @click.argument("name", metavar="NAME")
    @wait_options
    @key_option
    @click.pass_obj
    def maker(out: Out, name: str, waits: bool, on_interrupt: str | None, key: str | None) -> None:
        reply = wire.call(f"{kind}.{verb}", key=key, **{kind: name})
        ended(out, reply, waits, on_interrupt, f"{name} is {done}")

    return maker


list_images, list_kernels = _lister("image"), _lister("kernel")
show_image, show_kernel = _shower("image"), _shower("kernel")
build_image = _maker("image", "build", "Build an image from the distribution's own packages.", "built")
delete_image = _maker("image", "delete", "Delete an image that no VM uses.", "gone")
delete_kernel = _maker("kernel", "delete", "Delete a kernel that no VM uses.", "gone")
