"""What Firecracker lets one ask of it, and when: its API description, and its documented states.

The description is Firecracker's own firecracker.yaml (Swagger 2.0), in BANGER_FIRECRACKER_API or beside
this repository. It tells the shape of a request; the states are told by its sentences ("Pre-boot only",
"Post-boot only") and by docs/snapshotting/snapshot-support.md.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jsonschema
import yaml

import banger
from banger.vmm.firecracker_api import State

ENVIRON = "BANGER_FIRECRACKER_API"
BESIDE = Path(banger.__file__).parents[2] / "shared" / "firecracker" / "firecracker.yaml"

Moment = Literal["before", "after", "any"]
Json = dict[str, Any]

NOT_BEFORE = "The requested operation is not supported before starting the microVM."
NOT_AFTER = "The requested operation is not supported after starting the microVM."

MOMENTS: dict[tuple[str, str], Moment] = {
    ("GET", "/"): "any",
    ("GET", "/version"): "any",
    ("GET", "/machine-config"): "any",
    ("GET", "/vm/config"): "any",
    ("PUT", "/actions"): "any",
    ("PUT", "/machine-config"): "before",
    ("PATCH", "/machine-config"): "before",
    ("PUT", "/boot-source"): "before",
    ("PUT", "/drives/{drive_id}"): "before",
    ("PUT", "/network-interfaces/{iface_id}"): "before",
    ("PUT", "/vsock"): "before",
    ("PUT", "/entropy"): "before",
    ("PUT", "/logger"): "before",
    ("PUT", "/metrics"): "before",
    ("PATCH", "/vm"): "after",
    ("PUT", "/snapshot/create"): "after",
    ("PUT", "/snapshot/load"): "before",
}
"""What the stand-in carries out. The rest of the API is judged by its shape, then refused."""

WATCHING = {"/logger", "/metrics"}
LONGEST_TAP = 15
MAC = re.compile(r"(?:[0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}")
IDENTIFIER = re.compile(r"[A-Za-z0-9_]{1,64}")


class Fault(Exception):
    """A request that is refused, with what Firecracker would say."""


def description() -> Path | None:
    """Find Firecracker's API description on this machine."""
    path = Path(os.environ.get(ENVIRON) or BESIDE)
    return path if path.is_file() else None


class Shapes:
    """The requests that the description knows."""

    def __init__(self, path: Path):
        document = yaml.load(path.read_text("utf-8"), Loader=yaml.CSafeLoader)
        self._definitions = {name: _closed(shape) for name, shape in document["definitions"].items()}
        self._operations = [
            (method.upper(), template, re.compile(re.sub(r"\{\w+\}", "([^/]+)", template)), _body(operation))
            for template, operations in document["paths"].items()
            for method, operation in operations.items()
        ]

    def match(self, method: str, path: str, body: bytes) -> tuple[str, str | None, Json]:
        """Give the description's path, the id in the actual one if any, and the body. Raises Fault."""
        for known, template, pattern, parameter in self._operations:
            found = pattern.fullmatch(path)
            if known == method and found:
                return template, found[1] if found.groups() else None, self._decoded(parameter, body)
        raise Fault(f"Invalid request method and/or path: {method} {path}.")

    def _decoded(self, parameter: Json | None, body: bytes) -> Json:
        if parameter is None or not body:
            if bool(body) or (parameter or {}).get("required"):
                raise Fault("The body is unexpected." if body else "The request's body is empty.")
            return {}
        try:
            found = json.loads(body)
            jsonschema.Draft4Validator({**parameter["schema"], "definitions": self._definitions}).validate(
                found
            )
        except ValueError as error:
            raise Fault(f"An error occurred when deserializing the json body of a request: {error}") from None
        except jsonschema.ValidationError as error:
            raise Fault(f"An error occurred when deserializing: {error.message}") from None
        assert isinstance(found, dict)
        return found


def _closed(shape: Json) -> Json:
    """Refuse fields that are not described, as Firecracker does; mend `Off`, which YAML reads as false."""
    if "properties" in shape:
        shape.setdefault("additionalProperties", False)
    for field in shape.get("properties", {}).values():
        if "enum" in field:
            field["enum"] = ["Off" if word is False else word for word in field["enum"]]
    return shape


def _body(operation: Json) -> Json | None:
    return next((one for one in operation.get("parameters", ()) if one["in"] == "body"), None)


class Rules:
    """One machine's way from nothing to its end, as far as requests go."""

    def __init__(self, shapes: Shapes):
        self.state: State = "Not started"
        self.machine: Json = {"vcpu_count": 1, "mem_size_mib": 128}
        self.boot_source: Json | None = None
        self.drives: dict[str, Json] = {}
        self.networks: dict[str, Json] = {}
        self.devices: dict[str, Json] = {}
        self._shapes = shapes
        self._checks: dict[tuple[str, str], Callable[[Json], None]] = {
            ("PUT", "/actions"): self._check_action,
            ("PUT", "/machine-config"): self._check_machine,
            ("PUT", "/boot-source"): self._check_boot_source,
            ("PUT", "/drives/{drive_id}"): self._check_drive,
            ("PUT", "/network-interfaces/{iface_id}"): self._check_network,
            ("PUT", "/vsock"): self._check_vsock,
            ("PUT", "/logger"): self._check_logger,
            ("PUT", "/metrics"): self._check_metrics,
            ("PATCH", "/vm"): self._check_vm,
            ("PUT", "/snapshot/create"): self._check_create,
            ("PUT", "/snapshot/load"): self._check_load,
        }

    def judge(self, method: str, path: str, body: bytes) -> tuple[str, Json]:
        """Give the description's path and the body of a request that may be carried out. Raises Fault."""
        template, named, asked = self._shapes.match(method, path, body)
        moment = MOMENTS.get((method, template))
        if moment is None:
            raise Fault(f"This stand-in has no {method} {template}.")
        if moment != "any" and (moment == "before") != (self.state == "Not started"):
            raise Fault(NOT_AFTER if moment == "before" else NOT_BEFORE)
        if named is not None and named not in (asked.get("drive_id"), asked.get("iface_id")):
            raise Fault(f"The id from the path [{named}] does not match the id from the body!")
        if named is not None and not IDENTIFIER.fullmatch(named):
            raise Fault("API Resource IDs can only contain alphanumeric characters and underscores.")
        if check := self._checks.get((method, template)):
            check(asked)
        return template, asked

    def keep(self, method: str, template: str, asked: Json) -> None:
        """Remember a request that was carried out."""
        match template:
            case "/machine-config" if method != "GET":
                self.machine = {**self.machine, **asked}
                self.devices["machine-config"] = asked
            case "/boot-source":
                self.boot_source = asked
            case "/drives/{drive_id}":
                self.drives[asked["drive_id"]] = asked
            case "/network-interfaces/{iface_id}":
                self.networks[asked["iface_id"]] = asked
            case "/vsock" | "/entropy" | "/logger" | "/metrics":
                self.devices[template[1:]] = asked
            case "/vm":
                self.state = "Paused" if asked["state"] == "Paused" else "Running"
            case "/actions" if asked["action_type"] == "InstanceStart":
                self.state = "Running"
            case "/snapshot/load":
                self.state = "Running" if asked.get("resume_vm") else "Paused"

    def configuration(self) -> Json:
        """Give all that was set, as `GET /vm/config` shows it."""
        return {
            "machine-config": self.machine,
            "boot-source": self.boot_source,
            "drives": list(self.drives.values()),
            "network-interfaces": list(self.networks.values()),
            **{name: asked for name, asked in self.devices.items() if name != "machine-config"},
        }

    def take_over(self, configuration: Json) -> None:
        """Become what a snapshot was taken of."""
        self.machine = configuration["machine-config"]
        self.boot_source = configuration["boot-source"]
        self.drives = {drive["drive_id"]: drive for drive in configuration["drives"]}
        self.networks = {card["iface_id"]: card for card in configuration["network-interfaces"]}
        self.devices |= {name: configuration[name] for name in ("vsock", "entropy") if name in configuration}

    def _check_action(self, asked: Json) -> None:
        if asked["action_type"] != "InstanceStart":
            if self.state == "Not started":
                raise Fault(NOT_BEFORE)
            if self.state == "Paused" and asked["action_type"] == "SendCtrlAltDel":
                raise Fault("The microVM is paused: nobody reads its keyboard.")
            return
        if self.state != "Not started":
            raise Fault(NOT_AFTER)
        if self.boot_source is None:
            raise Fault("Cannot start microvm without kernel configuration.")
        with Path(self.boot_source["kernel_image_path"]).open("rb") as kernel:
            if kernel.read(4) != b"\x7fELF":
                raise Fault("Cannot load kernel: Invalid Elf magic number.")

    def _check_machine(self, asked: Json) -> None:
        if asked["mem_size_mib"] <= 0:
            raise Fault("The memory size (MiB) is invalid.")
        if asked.get("smt") and asked["vcpu_count"] > 1 and asked["vcpu_count"] % 2:
            raise Fault("The vCPU number is invalid! With SMT it is 1 or even.")
        if asked.get("huge_pages") == "2M" and asked["mem_size_mib"] % 2:
            raise Fault("The memory size is not a multiple of the page size.")

    def _check_boot_source(self, asked: Json) -> None:
        _check_file(asked["kernel_image_path"], "kernel", os.R_OK)
        if "initrd_path" in asked:
            _check_file(asked["initrd_path"], "initrd", os.R_OK)
        if len(asked.get("boot_args", "")) >= 2048:
            raise Fault("The kernel command line is invalid: it is too large.")

    def _check_drive(self, asked: Json) -> None:
        if "path_on_host" not in asked or "is_read_only" not in asked or "socket" in asked:
            raise Fault("Unable to patch the block device: path_on_host and is_read_only are needed.")
        writing = 0 if asked["is_read_only"] else os.W_OK
        _check_file(asked["path_on_host"], "block device", os.R_OK | writing)
        others = (drive for name, drive in self.drives.items() if name != asked["drive_id"])
        if asked["is_root_device"] and any(drive["is_root_device"] for drive in others):
            raise Fault("A root block device already exists!")

    def _check_network(self, asked: Json) -> None:
        if not 0 < len(asked["host_dev_name"]) <= LONGEST_TAP:
            raise Fault("Open tap device failed: Invalid interface name.")
        if "guest_mac" in asked and not MAC.fullmatch(asked["guest_mac"]):
            raise Fault(f"invalid MAC address: {asked['guest_mac']}")
        for name, other in self.networks.items():
            if name == asked["iface_id"]:
                continue
            if other["host_dev_name"] == asked["host_dev_name"]:
                raise Fault("Open tap device failed: Resource busy (os error 16).")
            if "guest_mac" in asked and other.get("guest_mac") == asked["guest_mac"]:
                raise Fault(f"The MAC address is already in use: {asked['guest_mac']}")

    def _check_vsock(self, asked: Json) -> None:
        if Path(asked["uds_path"]).exists():
            raise Fault("Cannot create backend for vsock device: Address in use (os error 98).")

    def _check_logger(self, asked: Json) -> None:
        if "log_path" in asked and not Path(asked["log_path"]).exists():
            raise Fault("Failed to open target log file.")

    def _check_metrics(self, asked: Json) -> None:
        if "metrics" in self.devices:
            raise Fault("Reinitialization of metrics not allowed.")
        if not Path(asked["metrics_path"]).exists():
            raise Fault("Failed to open target metrics file.")

    def _check_vm(self, asked: Json) -> None:
        if (asked["state"] == "Paused") == (self.state == "Paused"):
            raise Fault(f"The microVM is {self.state.lower()} already.")

    def _check_create(self, asked: Json) -> None:
        if self.state != "Paused":
            raise Fault("Cannot save a microVM that runs: pause it first.")
        if asked.get("snapshot_type") == "Diff" and not self.machine.get("track_dirty_pages"):
            raise Fault("Diff snapshots are not allowed on uVMs with dirty page tracking disabled.")

    def _check_load(self, asked: Json) -> None:
        configured = self.boot_source or self.drives or self.networks or self.devices.keys() - _WATCHED
        if configured:
            raise Fault("Loading a microVM snapshot not allowed after configuring boot-specific resources.")
        if ("mem_backend" in asked) == ("mem_file_path" in asked):
            raise Fault("Exactly one of the fields mem_backend and mem_file_path is needed.")
        for path in (asked["snapshot_path"], memory_of(asked)):
            _check_file(path, "snapshot", os.R_OK)


_WATCHED = {path[1:] for path in WATCHING}


def memory_of(asked: Json) -> str:
    """Give the path of a snapshot's memory, whichever field has it."""
    path = asked["mem_backend"]["backend_path"] if "mem_backend" in asked else asked["mem_file_path"]
    return str(path)


def _check_file(path: str, what: str, mode: int) -> None:
    if not Path(path).exists():
        raise Fault(f"Cannot open the {what} {path}: No such file or directory (os error 2).")
    if not os.access(path, mode):
        raise Fault(f"Cannot open the {what} {path}: Permission denied (os error 13).")
