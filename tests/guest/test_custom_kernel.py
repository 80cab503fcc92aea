"""A kernel that is not of our recipe boots an image that stays where it is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from banger.config import Dirs
from banger.images import base, bundle, debian, local, packages
from banger.images import kernel as kernels
from tests.guest.conftest import NAME, Boot


@pytest.mark.guest
def test_a_bundled_kernel_without_an_initrd_boots_a_registered_image(
    tmp_path: Path, dirs: Dirs, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle of vmlinuz and modules gets our initrd, and boots a file that was only registered."""
    archive, tree, made, cache = (tmp_path / name for name in ("kernel.tar", "tree", "made", "cache"))
    recipe = kernels.RECIPES[NAME]
    packages.bootstrap(
        archive, suite=recipe.suite, variant="extract", include=recipe.include[:1], cancelled=lambda: False
    )
    tree.mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", tree, "./boot", "./lib/modules"], check=True)
    (made / "modules").mkdir(parents=True)
    (vmlinuz,) = tree.glob("boot/vmlinuz-*")
    vmlinuz.rename(made / "vmlinuz")
    for module in tree.glob("lib/modules/*/kernel/**/*.ko"):
        module.rename(made / "modules" / module.name)
    found = bundle.write(made, tmp_path / "kernel.tar.zst")
    kernel = bundle.install(found, "kernel", "mine", cache)
    assert kernel.details["initrd"] == "banger's"
    imported = local.import_kernel(made / "vmlinuz", "mine", cache, modules=made / "modules")
    assert (imported.path / kernels.INITRD).read_bytes() == (kernel.path / kernels.INITRD).read_bytes()

    image = local.register(base.path_of(debian.build(debian.RECIPES[NAME], dirs.cache)), "mine", cache)
    monkeypatch.setattr(kernels, "build", lambda *_, **__: kernel)
    guest = boot(root=base.path_of(image))
    assert guest.run("uname -r").stdout.strip() == kernel.details["version"]
    local.check(image)
