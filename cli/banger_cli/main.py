"""The entry point: the answers that need no library first, then everything else."""

from __future__ import annotations

import sys

from banger_cli import fast


def main() -> None:
    """Run the command line in `sys.argv` and exit with its code."""
    code = fast.execute(sys.argv[1:])
    if code is not None:
        sys.exit(code)
    answer = fast.answer(sys.argv[1:])
    if answer is None:
        from banger_cli import app

        sys.exit(app.run(sys.argv[1:]))
    try:
        sys.stdout.write(answer)
        sys.stdout.flush()
    except BrokenPipeError:
        from banger_cli.output import hang_up

        sys.exit(hang_up())


if __name__ == "__main__":
    main()
