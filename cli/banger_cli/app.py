"""The tree of commands, and the one place that turns an error into words and an exit code."""

from __future__ import annotations

import click

from banger.errors import BangerError, InvalidRequest
from banger_cli import output, page
from banger_cli.commands import Branch

INTERRUPTED = 130


class Root(Branch):
    """The top of the tree; its help is the page that the fast path prints."""

    def get_help(self, ctx: click.Context) -> str:  # noqa: ARG002 (click's signature)
        """Give the static page."""
        return page.TOP.rstrip()


root = Root(
    "banger",
    {
        "vm": "vm:branch",
        "ops": "ops:branch",
        "events": "events:branch",
        "state": "events:state",
        "image": "artifacts:images",
        "kernel": "artifacts:kernels",
        "daemon": "daemon:branch",
        "ssh-config": "ssh_config:branch",
        "doctor": "doctor:doctor",
        "help": "topics:topic",
        "ps": "vm:list_",
    },
    help="Disposable virtual machines whose every step is on record.",
)


def run(words: list[str]) -> int:
    """Run one command and give its exit code; every error ends here."""
    output.prepare()
    out = output.Out(as_json=output.wants_json(words))
    try:
        # Not root.main(): that one makes its own ends of Ctrl-C and of a closed pipe.
        with root.make_context("banger", list(words), obj=out) as ctx:
            return root.invoke(ctx) or 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except BangerError as error:
        out.error(error)
        return error.exit_code
    except click.ClickException as error:
        out.error(_usage(error))
        return InvalidRequest.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        return output.hang_up()


def ended_by(error: BaseException) -> int:
    """Tell of the error that ended a command of the fast path, and give its exit code."""
    output.prepare()
    match error:
        case BangerError():
            output.Out(as_json=False).error(error)
            return error.exit_code
        case KeyboardInterrupt():
            return INTERRUPTED
        case BrokenPipeError():
            return output.hang_up()
    raise error


def _usage(error: click.ClickException) -> InvalidRequest:
    ctx = getattr(error, "ctx", None)
    path = ctx.command_path if ctx is not None else "banger"
    return InvalidRequest(error.format_message(), hint=f"`{path} --help` shows how.")
