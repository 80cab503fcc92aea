"""Images and kernels from catalogs, bundles and files of the user's own, from the command line."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from banger import config
from banger.images import bundle
from banger.images import kernel as kernels
from banger.testing.home import Home
from banger.testing.registry import Registry
from tests.e2e.test_pull import inside
from tests.guest import roots
from tests.images import tiny
from tests.images.serving import Site, serving

pytestmark = pytest.mark.guest

TREE: roots.Tree = {
    "bin/busybox": roots.BUSYBOX.read_bytes(),
    "bin/sh": "->busybox",
    "bin/cat": "->busybox",
    "root/kept": "from the image\n",
}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """A banger with a cache of its own, in which nothing is."""
    with Home(cache=tmp_path / "cache") as home:
        home.configure("memory_mib = 256\n")
        yield home


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as site:
        yield site


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A squashfs that answers, with a file in /root."""
    path = tmp_path / "my root.squashfs"
    path.write_bytes(tiny.squashfs(roots.archive(tmp_path / "root.tar", TREE).read_bytes()))
    return path


@pytest.fixture
def kernel() -> tuple[Path, Path]:
    """The kernel and the initrd of the user's own cache, as files."""
    return kernels.kernel_paths(kernels.build(kernels.RECIPES["debian-12"], config.find_dirs().cache))


def publish(site: Site, tmp_path: Path, name: str, **files: Path) -> bundle.Bundle:
    """Put a bundle of files on a site."""
    directory, packed = tmp_path / name, tmp_path / f"{name}.tar.zst"
    directory.mkdir()
    for file, source in files.items():
        shutil.copyfile(source, directory / file.replace("_", "."))
    made = bundle.write(directory, packed)
    site.files[f"/bundles/{packed.name}"] = packed.read_bytes()
    return msgspec.structs.replace(made, place=f"bundles/{packed.name}")


def line(kind: str, name: str, made: bundle.Bundle, **changes: object) -> str:
    """Write a catalog's entry for a bundle, with something changed or added."""
    values = {"name": name, "bundle": made.place, "sha256": made.sha256, "size": made.size, **changes}
    return f"[[{kind}]]\n" + "".join(
        f"{key} = {msgspec.json.encode(value).decode()}\n" for key, value in values.items()
    )


def catalog(home: Home, site: Site, *lines: str) -> None:
    site.files["/catalog.toml"] = "".join(lines).encode()
    home.configure(f'memory_mib = 256\ncatalogs = ["{site.address}/catalog.toml"]\n')


def cached(home: Home) -> list[str]:
    """List what a refused request may not add to."""
    return sorted(
        str(path.relative_to(home.dirs.cache))
        for path in home.dirs.cache.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    )


def ran(home: Home, *words: str) -> str:
    done = home.banger(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_vm_of_what_a_catalog_names(
    home: Home, site: Site, root: Path, kernel: tuple[Path, Path], tmp_path: Path
) -> None:
    """Image and kernel come over http by their names, and the image's VM gets the kernel named beside it."""
    image = publish(site, tmp_path, "web-base", root_squashfs=root)
    fast = publish(site, tmp_path, "fast", vmlinuz=kernel[0], initrd=kernel[1])
    with Registry(tmp_path / "registry") as registry:
        registry.image("team/app", "7", tiny.home())
        catalog(
            home,
            site,
            line("image", "web-base", image, kernel="fast"),
            f'[[image]]\nname = "app"\nreference = "{registry.host}/team/app:7"\n',
            line("kernel", "fast", fast),
        )
        offered = home.json("image", "list", "--available")["images"]
        assert [(each["name"], each["source"]["type"], each["vm_kernel"]) for each in offered] == [
            ("debian-12", "recipe", None),
            ("web-base", "bundle", "fast"),
            ("app", "reference", None),
        ]
        assert "fast" in ran(home, "kernel", "list", "--available")
        pulled = home.json("image", "pull", "app")
    assert home.json("image", "show", "app")["image"]["kernel"] == "debian-12"
    shown = ran(home, "image", "show", "app")
    for words in (pulled["op"], f"{registry.host}/team/app:7", "kernel of its VMs:  debian-12"):
        assert words in shown
    assert "web-base is here" in ran(home, "image", "pull", "web-base")
    refused = home.banger("vm", "create", "early", "--image", "web-base")
    assert (refused.returncode, "no kernel named 'fast'" in refused.stderr) == (3, True), refused.stderr
    ran(home, "kernel", "pull", "fast")
    ran(home, "vm", "create", "web", "--image", "web-base", "--wait")
    assert home.json("vm", "show", "web")["vm"]["kernel"] == "fast"
    assert inside(home, "web", "cat /root/kept") == b"from the image\n"
    ran(home, "vm", "delete", "web")
    assert home.leftovers() == []


def test_a_vm_of_files_of_the_users_own(home: Home, root: Path, kernel: tuple[Path, Path]) -> None:
    """A registered image with an imported kernel makes VMs and is copied with its kernel; its file may go."""
    vmlinuz, initrd = map(str, kernel)
    ran(home, "kernel", "import", "mine", vmlinuz, "--initrd", initrd)
    ran(home, "image", "register", "own", str(root), "--kernel", "mine")
    before = home.json("image", "show", "own")["image"]
    assert (before["kernel"], before["source"]) == ("mine", str(root))
    ran(home, "vm", "create", "old", "--image", "own", "--no-start", "--wait")
    assert "has a copy of its own" in ran(home, "image", "promote", "own")
    after = home.json("image", "show", "own")["image"]
    assert (after["kernel"], after["digest"] == before["digest"]) == ("mine", False)
    root.unlink()
    gone = home.banger("vm", "start", "old")
    assert (gone.returncode, "is gone" in gone.stderr) == (6, True), gone.stderr
    ran(home, "vm", "create", "new", "--image", "own", "--wait")
    assert inside(home, "new", "cat /root/kept") == b"from the image\n"
    ran(home, "vm", "delete", "old", "new")
    assert home.leftovers() == []


def test_what_cannot_be_got_is_told_and_leaves_nothing(
    home: Home, site: Site, root: Path, tmp_path: Path
) -> None:
    """Each bad case is one sentence, most with a hint, and a documented code; the cache has what it had."""
    good = publish(site, tmp_path, "good", root_squashfs=root)
    site.files["/bundles/cut.tar.zst"] = site.files["/bundles/good.tar.zst"][:-9]
    (text := tmp_path / "text").write_text("no file system")
    (cut := tmp_path / "cut.squashfs").write_bytes(root.read_bytes()[:4096])
    catalog(
        home,
        site,
        line("image", "nowhere", good, bundle="bundles/nowhere.tar.zst"),
        line("image", "cut", good, bundle="bundles/cut.tar.zst"),
        line("image", "other", good, sha256="0" * 64),
        line("image", "too-large", good, size=1 << 50),
        line("kernel", "an-image", good),
    )
    cases = (
        ("image pull nowhere", 6, "404"),
        ("image pull cut", 6, ""),
        ("image pull other", 6, ""),
        ("image pull too-large", 6, "are allowed"),
        ("image pull unheard-of", 3, "No catalog has an image named 'unheard-of'"),
        ("kernel pull an-image", 6, "not of one kernel"),
        ("kernel pull unheard-of", 3, "No catalog has a kernel named"),
        (f"image register mine {text}", 6, "neither an ext4 nor a squashfs"),
        (f"image register mine {cut}", 6, "cannot be read"),
        (f"image register mine {tmp_path}/nothing", 2, "nothing"),
        (f"image register debian-12 {text}", 4, "the name of a recipe"),
        (f"image register mine {text} --kernel ../x", 2, "not a valid kernel name"),
        ("image promote debian-12", 4, "the name of a recipe"),
        ("image promote nobody", 3, "not in the cache"),
        (f"kernel import mine {text}", 6, "not a Linux kernel"),
        (f"kernel import mine {tmp_path}/nothing", 2, "nothing"),
    )
    for words, code, sentence in cases:
        refused = home.banger(*words.split(" "), "--json")
        error = msgspec.json.decode(refused.stdout)["error"]
        assert (refused.returncode, sentence in error["message"]) == (code, True), (words, error)
        assert "\n" not in error["message"]
        assert (words, cached(home)) == (words, [])
    assert home.leftovers() == []


def test_a_catalog_that_cannot_be_had_stops_nothing_else(home: Home, site: Site) -> None:
    """It is named in a warning; only a name that it may have is an error."""
    catalog(home, site, "[[image]]\nname = 7\n")
    listed = home.banger("image", "list", "--available")
    assert (listed.returncode, "debian-12" in listed.stdout) == (0, True)
    assert f"{site.address}/catalog.toml" in listed.stderr
    refused = home.banger("image", "pull", "web-base")
    assert (refused.returncode, "could not be read" in refused.stderr) == (6, True), refused.stderr


def test_a_limit_of_the_users_is_heeded(home: Home, site: Site, root: Path, tmp_path: Path) -> None:
    """A lower limit in config.toml refuses what was let through, by name; a senseless one is refused."""
    good = publish(site, tmp_path, "good", root_squashfs=root)
    catalog(home, site, line("image", "good", good))
    settings = home.dirs.config / "config.toml"
    plain = settings.read_text()
    settings.write_text(f"{plain}[limits]\nbundle_content_mib = 1\n")
    refused = home.banger("image", "pull", "good")
    assert (refused.returncode, "`bundle_content_mib`" in refused.stderr) == (6, True), refused.stderr
    assert cached(home) == []
    settings.write_text(f"{plain}[limits]\nparallel = 0\n")
    refused = home.banger("image", "list", "--available")
    assert (refused.returncode, "limits.parallel" in refused.stderr) == (2, True), refused.stderr
    settings.write_text(f"{plain}[limits]\nbundel_mib = 1\n")
    assert "bundel_mib" in home.banger("image", "list", "--available").stderr
