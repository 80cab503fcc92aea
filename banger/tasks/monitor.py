"""Which machine monitor a VM is started with: decided when its start is asked for."""

from __future__ import annotations

from typing import Literal

from banger.config import Config, Dirs
from banger.errors import BangerError, InvalidRequest
from banger.model import VmSpec
from banger.tasks import root, start
from banger.tasks.root import Root
from banger.vmm import accelerator

Monitor = Literal["qemu", "firecracker"]
LEFT_OUT: dict[Monitor, frozenset[str]] = {
    "qemu": frozenset({start.JAIL.name}),
    "firecracker": frozenset({start.VMM.name}),
}
"""The steps of a start that a VM on this machine monitor has no use for."""


def choose(spec: VmSpec, config: Config, dirs: Dirs, asked: Root) -> Monitor:
    """Choose what is configured; for `auto`, Firecracker where all that it takes is there.

    Raises InvalidRequest for a VM that the configured one cannot have.
    """
    if config.vmm == "firecracker" and spec.network == "user":
        raise InvalidRequest(
            f"Firecracker has no network of its own, and {spec.name} is not on a bridge.",
            hint='Make it with --network bridge, or set vmm = "auto" in config.toml.',
        )
    if config.vmm != "auto":
        return config.vmm
    return "firecracker" if spec.network == "bridge" and _is_fit(config, dirs, asked) else "qemu"


def _is_fit(config: Config, dirs: Dirs, asked: Root) -> bool:
    """Tell whether KVM works and root's helper has a Firecracker of a version that is known."""
    from banger.vmm import firecracker, firecracker_api

    try:
        if accelerator.choose(config.accelerator, dirs.accelerator).name != "kvm":
            return False
        found = root.hello(asked)["firecracker"]
        return found is not None and firecracker.is_known(firecracker_api.parse_version(found))
    except BangerError:
        return False
