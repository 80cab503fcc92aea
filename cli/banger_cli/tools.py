"""The tools that a repository names for mise, installed in the guest before anything runs there."""

from __future__ import annotations

from typing import Any

from banger.errors import OperationFailed
from banger_cli import session, wire
from banger_cli.output import Out

Json = dict[str, Any]
NO_SUCH_PROGRAM = 127
STEPS = (("mise", "trust"), ("mise", "install"))


def bootstrap(out: Out, vm: str, *, nat: bool) -> None:
    """Have mise install what the workspace names; its words are told on standard error.

    Where there is no mise, or no way out to the network, that is said and nothing done. Raises
    OperationFailed when mise cannot.
    """
    if not nat:
        out.note("tools: the repository has a mise file; installing what it names needs --nat, so nothing is")
        return
    for words in STEPS:
        code = _run(vm, words)
        if code == NO_SUCH_PROGRAM:
            out.note("tools: the repository has a mise file, but the image has no mise")
            return
        if code != 0:
            raise OperationFailed(
                f"`{' '.join(words)}` failed in {vm} with {code}.",
                hint="--no-bootstrap goes on without it.",
            )


def _run(vm: str, words: tuple[str, ...]) -> int:
    with wire.connect() as daemon:
        daemon.request("vm.exec", vm=vm, argv=list(words), tty=False)
        said = session.write_to(2)
        return session.Session(daemon, stdin=None, stdout=said, stderr=said).run()
