from __future__ import annotations

from typing import Any

import msgspec
import pytest

from banger.errors import InvalidImage
from banger.images.remote import manifest
from banger.images.remote.manifest import CONFIGS, INDEXES, LAYERS, MANIFESTS, Manifest
from tests.images.hostile import digest

OCI, DOCKER = MANIFESTS
OCI_INDEX, DOCKER_INDEX = INDEXES


def blob(kind: str, data: bytes = b"x", **more: Any) -> dict[str, Any]:
    return {"mediaType": kind, "digest": digest(data), "size": len(data), **more}


def image(**changes: Any) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": OCI,
        "config": blob(CONFIGS[0], b"config"),
        "layers": [blob(LAYERS[0])],
        **changes,
    }


def index(*entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(entries), **changes}


def read(document: dict[str, Any], kind: str = OCI) -> Any:
    without_none = {key: value for key, value in document.items() if value is not None}
    return manifest.parse(msgspec.json.encode(without_none), kind)


def test_all_known_kinds_are_read() -> None:
    """Both formats, with or without the media type inside, and each kind of layer."""
    for kind in MANIFESTS:
        for told in (kind, None):
            found = read(image(mediaType=told, layers=[blob(one, one.encode()) for one in LAYERS]), kind)
            assert [layer.media_type for layer in found.layers] == list(LAYERS)
    for kind in INDEXES:
        assert len(read(index(blob(OCI), mediaType=kind), kind).manifests) == 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an index sent as a manifest": (index(blob(OCI)), OCI),
    "an index that does not say so": (index(blob(OCI), mediaType=None), OCI),
    "a manifest sent as an index": (image(mediaType=None), OCI_INDEX),
    "both at once": (image(mediaType=None, manifests=[blob(OCI)]), OCI),
    "both at once, as an index": (image(mediaType=OCI_INDEX, manifests=[blob(OCI)]), OCI_INDEX),
    "a manifest with no list of manifests": (image(manifests=[]), OCI),
    "an index with layers": (index(blob(OCI), layers=[]), OCI_INDEX),
    "an index with a configuration": (index(blob(OCI), config=blob(CONFIGS[0])), OCI_INDEX),
    "another kind inside": (image(mediaType=DOCKER), OCI),
    "Docker's first schema": (image(mediaType=None, fsLayers=[]), DOCKER),
    "the first schema's kind": (image(), "application/vnd.docker.distribution.manifest.v1+prettyjws"),
    "no kind": (image(), ""),
    "text": (image(), "text/html"),
    "version 1": (image(schemaVersion=1), OCI),
    "no version": (image(schemaVersion=None), OCI),
    "no layers": (image(layers=[]), OCI),
    "no list of layers": (image(layers=None), OCI),
    "text for layers": (image(layers="null"), OCI),
    "129 layers": (image(layers=[blob(LAYERS[0])] * 129), OCI),
    "100,000 layers": (image(layers=[blob(LAYERS[0])] * 100_000), OCI),
    "no configuration": (image(config=None), OCI),
    "a chart": (image(config=blob("application/vnd.cncf.helm.config.v1+json")), OCI),
    "an unknown layer": (image(layers=[blob("application/octet-stream")]), OCI),
    "a foreign layer": (
        image(layers=[blob("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")]),
        OCI,
    ),
    "a layer from elsewhere": (image(layers=[blob(LAYERS[0], urls=["http://169.254.169.254/"])]), OCI),
    "a configuration from elsewhere": (image(config=blob(CONFIGS[0], urls=["http://10.0.0.1/"])), OCI),
    "another digest": (image(layers=[{**blob(LAYERS[0]), "digest": "sha512:" + "0" * 128}]), OCI),
    "a path for a digest": (image(layers=[{**blob(LAYERS[0]), "digest": "sha256:../../../etc"}]), OCI),
    "a digest and a newline": (image(layers=[{**blob(LAYERS[0]), "digest": digest(b"") + "\n"}]), OCI),
    "a negative size": (image(layers=[{**blob(LAYERS[0]), "size": -1}]), OCI),
    "a size of text": (image(layers=[{**blob(LAYERS[0]), "size": "1"}]), OCI),
    "a size of 2^70": (image(layers=[{**blob(LAYERS[0]), "size": 1e21}]), OCI),
    "one layer with two sizes": (image(layers=[blob(LAYERS[0]), {**blob(LAYERS[0]), "size": 2}]), OCI),
    "one layer of two kinds": (image(layers=[blob(LAYERS[0]), blob(LAYERS[1])]), OCI),
    "a wrong digest in an index": (index({**blob(OCI), "digest": "sha256:x"}), OCI_INDEX),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_just_a_manifest_is_refused(case: str) -> None:
    """One printable sentence for whatever has two meanings, none, or a dangerous one."""
    document, kind = REFUSED[case]
    with pytest.raises(InvalidImage) as told:
        read(document, kind)
    assert told.value.message.isprintable()
    assert len(told.value.message) < 200


def for_platform(os: str, architecture: str, variant: str = "", kind: str = OCI) -> dict[str, Any]:
    platform = {"os": os, "architecture": architecture, **({"variant": variant} if variant else {})}
    return blob(kind, f"{os}{architecture}{variant}".encode(), platform=platform)


def chosen(*entries: dict[str, Any]) -> str:
    return manifest.choose(read(index(*entries), OCI_INDEX)).digest


def test_the_plain_amd64_is_chosen() -> None:
    """Linux on amd64 of the first level, whatever stands before it; else what says nothing of itself."""
    arm, windows = for_platform("linux", "arm64"), for_platform("windows", "amd64")
    unknown, third = for_platform("unknown", "unknown"), for_platform("linux", "amd64", "v3")
    ours, unsaid = for_platform("linux", "amd64"), blob(OCI, b"unsaid")
    other = for_platform("linux", "amd64", kind="application/vnd.example+json")
    assert chosen(arm, windows, unknown, other, third, unsaid, ours) == ours["digest"]
    assert chosen(arm, unsaid, third) == third["digest"]
    assert chosen(arm, unsaid) == unsaid["digest"]


def test_none_for_us_tells_what_there_is() -> None:
    """The platforms that an index has are in the hint, escaped."""
    entries = for_platform("linux", "arm64"), for_platform("\x1b[31m", "x")
    with pytest.raises(InvalidImage, match="no linux/amd64") as told:
        chosen(*entries)
    assert "linux/arm64" in str(told.value.hint)
    assert str(told.value.hint).isprintable()


def config(**changes: Any) -> dict[str, Any]:
    rootfs = {"type": "layers", "diff_ids": [digest(b"")]}
    return {"os": "linux", "architecture": "amd64", "rootfs": rootfs, **changes}


def test_a_configuration_is_data() -> None:
    """What it asks for is kept as it is, and only what is known of it."""
    run: dict[str, Any] = {
        "Env": ["A=$(reboot)"],
        "User": "../../root",
        "Cmd": ["\x1b"],
        "Entrypoint": None,
        "Volumes": {"/": {}},
    }
    found, ids = manifest.parse_config(msgspec.json.encode(config(config=run, created="2024-01-01")), 1)
    assert (found.env, found.user, found.cmd) == (("A=$(reboot)",), "../../root", ("\x1b",))
    assert (found.entrypoint, found.created, ids) == ((), "2024-01-01", [digest(b"")])


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "arm64"},
        {"os": "windows"},
        {"rootfs": None},
        {"rootfs": {"type": "zip", "diff_ids": [digest(b"")]}},
        {"rootfs": {"type": "layers", "diff_ids": []}},
        {"rootfs": {"type": "layers", "diff_ids": [digest(b"")] * 2}},
        {"rootfs": {"type": "layers", "diff_ids": ["sha256:../x"]}},
        {"config": {"Env": ["A=1"] * 5000}},
        {"config": {"Env": "A=1"}},
        {"config": {"User": "a\0b"}},
        {"config": {"User": "a" * 200_000}},
        {"config": {"Cmd": [1]}},
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    """Another platform, other layers, lists and texts beyond all use."""
    with pytest.raises(InvalidImage) as told:
        manifest.parse_config(msgspec.json.encode(config(**changes)), 1)
    assert told.value.message.isprintable()


def test_lone_surrogates_are_refused() -> None:
    """JSON can name characters that no file or terminal can hold."""
    data = msgspec.json.encode(config(config={"User": "x"})).replace(b'"x"', b'"\\ud800"')
    with pytest.raises(InvalidImage):
        manifest.parse_config(data, 1)


def test_nothing_crashes_the_reader() -> None:
    """Each prefix of a manifest is refused as an image, and only the whole is one."""
    data = msgspec.json.encode(image())
    for length in range(len(data)):
        with pytest.raises(InvalidImage):
            manifest.parse(data[:length], OCI)
    assert isinstance(manifest.parse(data, OCI), Manifest)
