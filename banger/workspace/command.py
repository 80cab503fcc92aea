"""Where and how a command starts in a guest that has a workspace."""

from __future__ import annotations

from collections.abc import Sequence

from banger.model import Workspace

# It is looked for where its installer puts it, too: sessions have no profile. It is not wrapped in itself.
_START = """\
cd "$0" 2> /dev/null || {
    echo "banger: the workspace $0 is gone; starting in $PWD" >&2
    exec "$@"
}
mise=$(command -v mise) || mise=$HOME/.local/bin/mise
if [ "$1" = mise ] && [ -x "$mise" ]; then
    shift
    exec "$mise" "$@"
fi
for file in mise.toml .mise.toml .tool-versions mise/config.toml .mise/config.toml .config/mise.toml \\
    .config/mise/config.toml; do
    [ -e "$file" ] || continue
    [ -x "$mise" ] && exec "$mise" exec -- "$@"
    break
done
exec "$@"
"""


def command_in(workspace: Workspace | None, argv: Sequence[str]) -> list[str]:
    """Give the words that start a command in its workspace, with the tools that mise has for it.

    Without a workspace they are the command's own. Its words are carried as they are.
    """
    if workspace is None:
        return list(argv)
    return ["/run/banger/bin/busybox", "sh", "-c", _START, workspace.path, *argv]
