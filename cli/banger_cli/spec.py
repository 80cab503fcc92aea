"""What may be asked for when a VM is made: options, sizes, names, and how the answer reads."""

from __future__ import annotations

import re
from typing import Any

import click

from banger_cli.commands import Leaf, WithWords, stacked

Json = dict[str, Any]
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([MGT]?)(?:i?B)?", re.IGNORECASE)
_UNITS = {"": 1, "M": 1, "G": 1024, "T": 1024 * 1024}


def size(text: str) -> int:
    """Read a size as whole MiB, at least one: `512`, `512M`, `1.5G`."""
    match = _SIZE.fullmatch(text.strip())
    mebibytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if mebibytes < 1:
        raise click.BadParameter(f"{text!r} is not a size; for example 512M or 2G.")
    return mebibytes


def name(text: str) -> str:
    """Give a VM's name as it is; raises InvalidRequest when it is not a DNS label."""
    from banger.model import check_vm_name

    return check_vm_name(text)


spec_options = stacked(
    [
        click.option("--name", type=name, help="A DNS label; a random one if none is given."),
        click.option("--image", help="The root file system; see `banger image list`."),
        click.option("--kernel", help="The kernel; see `banger kernel list`."),
        click.option("--vcpu", type=click.IntRange(1), help="Virtual CPUs."),
        click.option("--memory", "memory_mib", type=size, help="RAM: 512M, 2G (MiB by default)."),
        click.option("--disk-size", "disk_mib", type=size, help="Size of the disk at /root."),
        click.option("--nat/--no-nat", default=None, help="Let it reach the network."),
        click.option(
            "--network",
            type=click.Choice(["user", "bridge"]),
            help="QEMU's own network, or an address on a bridge (needs the root helper).",
        ),
        click.option(
            "--root-disk",
            type=click.Choice(["overlay", "snapshot"]),
            help="Image and changes joined in the guest, or on the host (needs the root helper).",
        ),
    ]
)


def spec_line(spec: Json) -> str:
    """Show what a VM is made of, every value that was not given resolved."""
    return (
        f"spec: name={spec['name']} image={spec['image']} vcpu={spec['vcpu']} "
        f"memory={spec['memory_mib']}MiB disk={spec['disk_mib']}MiB "
        f"network={spec['network']} nat={'on' if spec['nat'] else 'off'}"
    )


def _resolved_defaults() -> str:
    from banger import config

    try:
        settings = config.load(config.find_dirs())
    except Exception as error:  # a help page is shown, whatever is wrong
        return f"unknown: {error}"
    sizes = config.sizes(settings)
    nat = "on" if settings.nat else "off"
    return (
        f"--image {settings.image} --kernel {settings.kernel} --vcpu {sizes.vcpu.value} "
        f"--memory {sizes.memory_mib.value}M --disk-size {sizes.disk_mib.value}M, nat {nat}"
    )


class Creates(Leaf):
    """A command that makes a VM; its help shows what that would be here."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show what this host gives when nothing is asked for, then the examples."""
        formatter.write(f"\nDefaults here (config.toml, else this host):\n  {_resolved_defaults()}\n")
        super().format_epilog(ctx, formatter)


class CreatesWithWords(Creates, WithWords):
    """A command that makes a VM and then runs the words after `--`."""
