"""A real registry on this machine's loopback, with a directory of its own, for as long as a test needs it."""

from __future__ import annotations

import gzip
import hashlib
import re
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import requests

from banger import proc

READY = re.compile(rb"listening on (127\.0\.0\.1:\d+)")
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"


class Registry:
    """Debian's docker-registry, on a port of its choice; `host` is 127.0.0.1:PORT.

    `auth` is what its configuration has below `auth:` (YAML, which JSON is); what is pushed has `headers`.
    """

    def __init__(self, directory: Path, *, auth: dict[str, Any] | None = None):
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "version": 0.1,
            "storage": {"filesystem": {"rootdirectory": str(directory / "data")}},
            "http": {"addr": "127.0.0.1:0", "secret": "of no use to anybody"},
            **({"auth": auth} if auth else {}),
        }
        path = directory / "config.yml"
        path.write_bytes(msgspec.json.encode(config))
        self.headers: dict[str, str] = {}
        # Port 0 lets the kernel choose; the registry tells which in its log.
        self._process = subprocess.Popen(
            [proc.which("docker-registry"), "serve", path],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={"PATH": proc.SEARCH_PATH, "OTEL_TRACES_EXPORTER": "none"},
        )
        self.host = self._wait()
        self._drain = threading.Thread(target=self._read_on, daemon=True)
        self._drain.start()

    def _wait(self) -> str:
        assert self._process.stderr is not None
        said = b""
        for line in self._process.stderr:
            if found := READY.search(line):
                return found.group(1).decode()
            said += line
        raise AssertionError(f"docker-registry did not start: {said.decode()}")

    def _read_on(self) -> None:
        assert self._process.stderr is not None
        while self._process.stderr.read1(65536):  # type: ignore[attr-defined]
            pass

    def blob(self, name: str, data: bytes) -> dict[str, Any]:
        """Push a blob; give its descriptor without a media type."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        begun = requests.post(
            f"http://{self.host}/v2/{name}/blobs/uploads/", headers=self.headers, timeout=30
        )
        begun.raise_for_status()
        pushed = requests.put(
            begun.headers["Location"], params={"digest": digest}, data=data, headers=self.headers, timeout=60
        )
        pushed.raise_for_status()
        return {"digest": digest, "size": len(data)}

    def manifest(self, name: str, tag: str, document: dict[str, Any]) -> dict[str, Any]:
        """Push a manifest or index under a tag; give its descriptor."""
        kind, data = document["mediaType"], msgspec.json.encode(document)
        requests.put(
            f"http://{self.host}/v2/{name}/manifests/{tag}",
            data=data,
            headers={"Content-Type": kind, **self.headers},
            timeout=30,
        ).raise_for_status()
        return {"mediaType": kind, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}

    def image(
        self, name: str, tag: str, *layers: bytes, compress: bool = False, **config: Any
    ) -> dict[str, Any]:
        """Push an image of tar layers, oldest first, plain or with gzip; give its manifest's descriptor."""
        ids = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
        kind = f"{LAYER}+gzip" if compress else LAYER
        blobs = [gzip.compress(layer, 6) for layer in layers] if compress else layers
        about = {
            "os": "linux",
            "architecture": "amd64",
            "rootfs": {"type": "layers", "diff_ids": ids},
            **config,
        }
        document = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, **self.blob(name, msgspec.json.encode(about))},
            "layers": [{"mediaType": kind, **self.blob(name, blob)} for blob in blobs],
        }
        return self.manifest(name, tag, document)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._drain.join()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()
