"""Where images and kernels come from: registries, catalogs, files; and the cache beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from banger import layout
from banger_cli import wire
from banger_cli.artifacts import catalogs, ended
from banger_cli.commands import Branch, Leaf, key_option, wait_options
from banger_cli.follow import wait
from banger_cli.output import Out

Json = dict[str, Any]

cache = Branch(
    "cache",
    {"prune": "getting:prune"},
    help="What images and kernels are made from, and those that nothing stands for any more.",
    epilog="Examples:\n  banger image cache prune --dry-run",
)


def _entry(out: Out, kind: str, name: str) -> Json:
    """Find a name in the catalogs, and what they say it is."""
    import msgspec

    entry: Json = msgspec.to_builtins(catalogs(out).find(kind, name))  # type: ignore[arg-type]  # image or kernel
    return entry


def _pull(out: Out, kind: str, what: str, name: str | None, key: str | None) -> Json:
    entry = _entry(out, kind, what)
    source, named = entry["source"], {"vm_kernel": entry["vm_kernel"]} if kind == "image" else {}
    match source.pop("type"):
        case "bundle":
            return wire.call(f"{kind}.install", name=name or what, bundle=source, key=key, **named)
        case "reference":
            return wire.call("image.pull", reference=source["text"], name=name or what, key=key, **named)
        case _:
            method = "image.build" if kind == "image" else "kernel.pull"
            return {**wire.call(method, key=key, **{kind: source["name"]}), "name": source["name"]}


@click.command("pull", cls=Leaf, epilog="""\
Examples:
  banger image pull registry.example:5000/tools/builder:3
  banger image pull 127.0.0.1:5000/app@sha256:... --name app
  banger image pull debian-12                     a name of a catalog

Next: banger vm create --image builder-3 --wait""")  # fmt: skip
@click.argument("what", metavar="REFERENCE|NAME")
@click.option("--name", help="What it is called here; by default its last word and its tag.")
@wait_options
@key_option
@click.pass_obj
def pull_image(
    out: Out, what: str, name: str | None, waits: bool, on_interrupt: str | None, key: str | None
) -> None:
    """Pull an image from a registry, or one that a catalog has under a name.

    A reference has a `/` or a `:`. What of it is here already is not fetched again, what came so far
    of a pull that was cut off is gone on with, and every byte is checked by its digest.
    """
    if "/" in what or ":" in what:
        reply = wire.call("image.pull", reference=what, name=name, key=key)
    else:
        reply = _pull(out, "image", what, name, key)
    ended(out, reply, waits, on_interrupt, f"{reply['name']} is here")


@click.command(
    "pull", cls=Leaf, epilog="Examples:\n  banger kernel list --available\n  banger kernel pull debian-12"
)
@click.argument("what", metavar="NAME")
@wait_options
@key_option
@click.pass_obj
def pull_kernel(out: Out, what: str, waits: bool, on_interrupt: str | None, key: str | None) -> None:
    """Fetch a kernel that a catalog has under a name, with its initrd."""
    reply = _pull(out, "kernel", what, None, key)
    ended(out, reply, waits, on_interrupt, f"{reply['name']} is here")


@click.command("register", cls=Leaf, epilog="""\
Examples:
  banger image register mine /srv/root.ext4
  banger image promote mine                       and a copy of banger's own

Next: banger vm create --image mine --wait""")  # fmt: skip
@click.argument("name", metavar="NAME")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--kernel", help="The kernel of its VMs; see `banger kernel list`.")
@wait_options
@key_option
@click.pass_obj
def register(
    out: Out,
    name: str,
    file: Path,
    kernel: str | None,
    waits: bool,
    on_interrupt: str | None,
    key: str | None,
) -> None:
    """Use a root file system (ext4 or squashfs) as an image, where it is.

    It must stay as it is: VMs share it, and do not start when it has changed.
    """
    reply = wire.call("image.register", name=name, file=str(file.absolute()), vm_kernel=kernel, key=key)
    ended(out, reply, waits, on_interrupt, f"{reply['name']} is registered")


@click.command("promote", cls=Leaf, epilog="Examples:\n  banger image promote mine")
@click.argument("name", metavar="NAME")
@wait_options
@key_option
@click.pass_obj
def promote(out: Out, name: str, waits: bool, on_interrupt: str | None, key: str | None) -> None:
    """Copy the file of a registered image into the cache, so that the file may change or go."""
    reply = wire.call("image.promote", name=name, key=key)
    ended(out, reply, waits, on_interrupt, f"{reply['name']} has a copy of its own")


@click.command("import", cls=Leaf, epilog="""\
Examples:
  banger kernel import mine ./bzImage --modules ./lib/modules/6.9.1
  banger kernel import mine ./vmlinux --initrd ./initrd.img

Next: banger vm create --kernel mine --wait""")  # fmt: skip
@click.argument("name", metavar="NAME")
@click.argument("kernel", type=click.Path(path_type=Path))
@click.option("--initrd", type=click.Path(path_type=Path), help="Used as it is; without one, ours is made.")
@click.option("--modules", type=click.Path(path_type=Path), help="The kernel's modules, for our initrd.")
@wait_options
@key_option
@click.pass_obj
def import_kernel(
    out: Out,
    name: str,
    kernel: Path,
    initrd: Path | None,
    modules: Path | None,
    waits: bool,
    on_interrupt: str | None,
    key: str | None,
) -> None:
    """Take over a kernel (bzImage or vmlinux) that is there as a file."""
    files = {"initrd": initrd, "modules": modules}
    given = {word: str(path.absolute()) for word, path in files.items() if path is not None}
    reply = wire.call("kernel.import", name=name, kernel=str(kernel.absolute()), key=key, **given)
    ended(out, reply, waits, on_interrupt, f"{reply['name']} is here")


@click.command("prune", cls=Leaf, epilog="""\
Examples:
  banger image cache prune --dry-run
  banger image cache prune""")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only tell what would go.")
@click.pass_obj
def prune(out: Out, dry_run: bool) -> None:
    """Remove what no image, kernel or VM stands for. A pull in flight keeps what it needs."""
    from banger import config

    op = wire.call("cache.prune", dry_run=dry_run)["op"]
    wait(op, out)
    pruned = wire.call("ops.show", op=op)["op"]["steps"][0]["facts"]["pruned"]
    out.show(pruned, _pruned(pruned, str(config.find_dirs().cache), dry_run=dry_run))


def _pruned(found: Json, directory: str, *, dry_run: bool) -> Iterator[str]:
    verb = "would be freed" if dry_run else "are freed"
    counts = f"{len(found['artifacts'])} images and kernels, {found['blobs']} blobs"
    beginnings = f"{found['partial']} beginnings, {found['bundles']} bundles"
    yield f"{layout.size(found['size_bytes'])} {verb} in {directory}: {counts}, {beginnings}"
    if found["busy"]:
        yield "A pull is under way, so all blobs stay."
