"""Images and kernels: what there is, and where more of them comes from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from banger.config import Config, Dirs
from banger.errors import AlreadyExists, NotFound
from banger.events import queries
from banger.events.log import EventLog
from banger.images import debian, store
from banger.images import kernel as kernels
from banger.images.remote import reference as references
from banger.model import check_artifact_name
from banger.rpc import asking, views
from banger.rpc import protocol as p
from banger.tasks import artifacts, supply
from banger.tasks.pipeline import Pipeline


class Artifacts:
    """The methods about images, kernels and the cache."""

    def __init__(self, log: EventLog, dirs: Dirs, config: Config, pipelines: Mapping[str, Pipeline]):
        self.log = log
        self.dirs = dirs
        self.config = config
        self._pipelines = pipelines
        self.answers: dict[type[p.Request], Callable[[Any], dict[str, Any]]] = {
            p.ImageList: lambda _: {"images": self._list("image")},
            p.ImageShow: lambda r: {"image": self._whole("image", r.image)},
            p.ImageBuild: lambda r: self._make("image", r.image, r),
            p.ImagePull: self._pull,
            p.ImageRegister: self._from_files,
            p.ImagePromote: self._from_files,
            p.ImageInstall: self._from_files,
            p.KernelInstall: self._from_files,
            p.KernelImport: self._from_files,
            p.CachePrune: self._prune,
            p.ImageDelete: lambda r: self._delete("image", r.image),
            p.KernelList: lambda _: {"kernels": self._list("kernel")},
            p.KernelShow: lambda r: {"kernel": self._whole("kernel", r.kernel)},
            p.KernelPull: lambda r: self._make("kernel", r.kernel, r),
            p.KernelDelete: lambda r: self._delete("kernel", r.kernel),
        }

    def image_asked(self, word: str) -> tuple[str, str | None]:
        """Tell an image's name from what one is pulled by, which has a `/` or a `:`."""
        if not re.search("[/:]", word):
            return check_artifact_name(word, "image"), None
        wanted = references.parse(word, self.config.registry)
        name = check_artifact_name(wanted.default_name, "image")
        known = queries.artifact(self.log, "image", name)
        if name in debian.RECIPES or (known is not None and known.details.get("reference") != str(wanted)):
            raise AlreadyExists(
                f"Another image is named {name}.",
                hint=f"`banger image pull {word} --name NAME`, then `--image NAME`.",
            )
        return name, str(wanted)

    def _list(self, kind: str) -> list[dict[str, Any]]:
        names = {known.name for known in queries.artifacts(self.log, kind)} | set(_recipes(kind))
        return [self.show(kind, name) for name in sorted(names)]

    def _whole(self, kind: str, name: str) -> dict[str, Any]:
        """Show one, and which operation made it."""
        rows = self.log.read(stream=f"{kind}-{name}", kind="artifact.published", limit=1, newest=True)
        kernel = {"kernel": self.kernel_of(name)} if kind == "image" else {}
        return self.show(kind, name) | {"op": rows[0].op if rows else None, **kernel}

    def kernel_of(self, image: str) -> str:
        """Tell which kernel VMs of an image get that ask for none: one named for it, else the configured."""
        return supply.named_kernel(self.log, image).get("vm_kernel", self.config.kernel)

    def show(self, kind: str, name: str) -> dict[str, Any]:
        """Show an image or kernel that is there or can be made. Raises NotFound."""
        known = queries.artifact(self.log, kind, name)
        recipe = _recipes(kind).get(name)
        if known is None and recipe is None:
            raise NotFound(f"There is no {kind} named {name!r}.", hint=f"`banger {kind} list` shows them.")
        present = known is not None and store.find(self.dirs.cache, kind, known.digest) is not None
        source = "local recipe" if recipe is not None else _source(known)
        return views.artifact(name, known, present=present, recipe=source)

    def _make(self, what: str, name: str, request: p.ImageBuild | p.KernelPull) -> dict[str, Any]:
        if name not in _recipes(what):
            raise NotFound(f"There is no recipe for {name!r}.", hint=f"`banger {what} list` shows them.")
        kind, lane = request.method, f"{what}:{name}"
        joined = asking.under_way(self.log, kind, lane)
        if joined is not None:
            return asking.reply(self.log, joined)
        asked = self._pipelines[kind].request(lane=lane, args={"name": name}, name=name)
        return {"op": self.log.request(asking.stamped(asked, request)), "name": name}

    def _pull(self, request: p.ImagePull) -> dict[str, Any]:
        wanted = references.parse(request.reference, self.config.registry)
        name = check_artifact_name(request.name or wanted.default_name, "image")
        if name in debian.RECIPES:
            raise AlreadyExists(
                f"{name} is the name of a recipe.", hint="Give the image another one with --name."
            )
        args = {"reference": str(wanted), "name": name, **_vm_kernel(request)}
        kind, lane = request.method, f"image:{name}"
        joined = asking.under_way(self.log, kind, lane)
        if joined is not None and queries.whole_op(self.log, joined).args == args:
            return asking.reply(self.log, joined)
        asked = self._pipelines[kind].request(lane=lane, args=args, name=name)
        return {"op": self.log.request(asking.stamped(asked, request)), "name": name}

    def _from_files(
        self, request: p.ImageRegister | p.ImagePromote | p.ImageInstall | p.KernelInstall | p.KernelImport
    ) -> dict[str, Any]:
        """Ask for an image or kernel that is made from files, under a name that no recipe has."""
        kind = request.method.partition(".")[0]
        name = check_artifact_name(request.name, kind)
        if name in _recipes(kind):
            raise AlreadyExists(f"{name} is the name of a recipe.", hint="Give it another name.")
        given = msgspec.to_builtins(request)
        args = {key: value for key, value in given.items() if key not in ("key", "vm_kernel")}
        promotes = isinstance(request, p.ImagePromote)
        args |= supply.named_kernel(self.log, name) if promotes else _vm_kernel(request)
        lane = f"{kind}:{name}"
        asked = self._pipelines[request.method].request(lane=lane, args=args, name=name)
        return {"op": self.log.request(asking.stamped(asked, request)), "name": name}

    def _prune(self, request: p.CachePrune) -> dict[str, Any]:
        asked = self._pipelines[request.method].request(lane="cache", args={"dry_run": request.dry_run})
        return {"op": self.log.request(asked)}

    def _delete(self, kind: str, name: str) -> dict[str, Any]:
        artifacts.deletable(self.log, kind, name)
        pipeline: Pipeline = self._pipelines[f"{kind}.delete"]
        asked = pipeline.request(lane=f"{kind}:{name}", args={"kind": kind, "name": name}, name=name)
        return {"op": self.log.request(asked)}


def _vm_kernel(request: p.Request) -> dict[str, str]:
    """Give the kernel that was named for an image's VMs, if one was. Raises InvalidRequest."""
    named = getattr(request, "vm_kernel", None)
    return {} if named is None else {"vm_kernel": check_artifact_name(named, "kernel")}


def _source(known: queries.ArtifactSummary | None) -> str | None:
    """Say where an artifact came from that no recipe makes."""
    details = known.details if known else {}
    return next((str(details[key]) for key in ("reference", "bundle", "file") if key in details), None)


def _recipes(kind: str) -> dict[str, Any]:
    return dict(debian.RECIPES if kind == "image" else kernels.RECIPES)
