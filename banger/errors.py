"""Everything that can go wrong, in one leaf file.

A class's docstring is its default message. Each carries a stable `code` (for programs), an
`exit_code` (for scripts), a `hint` (what to do next) and says whether a failed step that raised
it is worth another try. Only the command line prints and exits.
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar


class BangerError(Exception):
    """Something inside banger went wrong."""

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1
    retry: ClassVar[bool] = False
    default_hint: ClassVar[str | None] = None

    def __init__(self, message: str | None = None, *, hint: str | None = None, op: str | None = None):
        self.message = message or (type(self).__doc__ or "").split("\n")[0]
        self.hint = hint or self.default_hint
        self.op = op
        super().__init__(self.message)

    def to_dict(self) -> dict[str, Any]:
        """Give the wire form: `{code, message, hint, op}`."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "op": self.op}


class InvalidRequest(BangerError):
    """The request is not valid."""

    code = "invalid"
    exit_code = 2


class NotFound(BangerError):
    """There is no such thing."""

    code = "not-found"
    exit_code = 3


class Busy(BangerError):
    """It is in use by another operation."""

    code = "busy"
    exit_code = 4


class AlreadyExists(Busy):
    """It exists already."""

    code = "exists"


class WrongState(Busy):
    """The VM is not in a state that allows this."""

    code = "state"


class DaemonDown(BangerError):
    """The daemon does not answer."""

    code = "daemon-down"
    exit_code = 5
    default_hint = "`banger daemon status` tells more; `banger daemon stop` ends a hung one."


class OperationFailed(BangerError):
    """The operation failed and was undone."""

    code = "failed"
    exit_code = 6


class Cancelled(OperationFailed):
    """The operation was cancelled."""

    code = "cancelled"


class Stuck(BangerError):
    """The operation could be neither finished nor undone."""

    code = "stuck"
    exit_code = 7


class InvalidImage(OperationFailed):
    """The image or kernel is not what it should be."""

    code = "image-invalid"


class HostLacks(OperationFailed):
    """This host lacks something that is needed."""

    code = "host"
    exit_code = 8
    default_hint = "`banger doctor` lists what is missing and how to get it."


class DiskFull(HostLacks):
    """There is no space left on the disk."""

    code = "disk-full"
    default_hint = "Free some space, or move XDG_STATE_HOME or XDG_CACHE_HOME to a larger disk."


class ProgramFailed(OperationFailed):
    """A program that banger ran failed."""

    code = "program"

    def __init__(
        self,
        message: str | None = None,
        *,
        hint: str | None = None,
        op: str | None = None,
        status: int | None = None,
    ):
        super().__init__(message, hint=hint, op=op)
        self.status = status


class DownloadFailed(OperationFailed):
    """The file could not be downloaded."""

    code = "download"
    default_hint = "Run it again: it goes on where it was."


class RegistryError(OperationFailed):
    """The registry did not give the image."""

    code = "registry"
    default_hint = "Run it again: what came whole so far is kept."


class RegistryUnreachable(RegistryError):
    """The registry cannot be reached."""

    code = "registry-unreachable"
    default_hint = "Check the registry's name and your network, and run it again: what came so far is kept."


class RegistrySlow(RegistryError):
    """The registry is too slow."""

    code = "registry-slow"
    default_hint = "Run it again: it goes on where it was."


class RegistryDenied(RegistryError):
    """The registry does not let you have this image."""

    code = "registry-denied"
    default_hint = "Check the image's name, and log in with `docker login`, `podman login` or `skopeo login`."


class ImageUnknown(RegistryError):
    """The registry has no such image."""

    code = "registry-unknown"
    default_hint = "Check its name and tag."


class RegistryUntrusted(RegistryError):
    """The registry sent something else than it promised, or pointed to where it must not."""

    code = "registry-untrusted"
    default_hint = "Nothing of it was kept. If you trust the registry, tell whoever runs it."


class TimedOut(OperationFailed):
    """It took too long."""

    code = "timeout"


class GuestSilent(TimedOut):
    """The guest did not say that it is ready in time."""

    code = "guest-silent"
    retry = True  # a boot that hangs under emulation is worth exactly one more try


class PortTaken(OperationFailed):
    """Another program took the port before the VM could."""

    code = "port-taken"
    default_hint = "Run it again: another port will be chosen."


class HelperDown(OperationFailed):
    """The root helper does not answer."""

    code = "helper-down"
    retry = True
    default_hint = '`banger doctor` tells whether it runs; without it, `network = "user"` needs no root.'


class Refused(OperationFailed):
    """The root helper refused the request."""

    code = "refused"


class GuestUnreachable(BangerError):
    """The guest does not answer over SSH."""

    code = "guest-unreachable"
    exit_code = 9


class LogDamaged(BangerError):
    """The event log is not what was written."""

    code = "log-damaged"
    default_hint = (
        "Nothing is written to it any more. `banger events verify` names the first bad row, and"
        " `banger daemon start --read-only` shows what there is."
    )


class LogTooNew(BangerError):
    """The event log was written by a newer version of banger."""

    code = "log-too-new"
    default_hint = "Use that version again: an older one would misread what it wrote."


class ReadOnly(BangerError):
    """The daemon only reads: it was started with --read-only."""

    code = "read-only"
    exit_code = 4
    default_hint = "`banger daemon stop` ends it; the next command starts one that writes."


class Fenced(BangerError):
    """Another worker has taken this operation over; nothing more may be recorded here."""

    code = "fenced"


def all_codes() -> dict[str, type[BangerError]]:
    """Map each stable code to its class, for clients that read errors from the wire."""
    found: dict[str, type[BangerError]] = {}
    queue: list[type[BangerError]] = [BangerError]
    while queue:
        cls = queue.pop()
        found[cls.code] = cls
        queue.extend(cls.__subclasses__())
    return found


def from_dict(data: dict[str, Any]) -> BangerError:
    """Rebuild an error from its wire form; an unknown code becomes a plain BangerError."""
    cls = all_codes().get(data.get("code", ""), BangerError)
    return cls(data.get("message"), hint=data.get("hint"), op=data.get("op"))


def from_os_error(error: OSError) -> BangerError:
    """Put an operating-system error into a sentence; a full disk or quota has its own class."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" at {error.filename}" if error.filename else ""
        return DiskFull(f"There is no space left on the disk{where}.")
    return BangerError(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
