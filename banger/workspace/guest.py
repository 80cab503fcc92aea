"""Inside the guest: a workspace arrives beside the one that is there, and takes its place when it is whole.

What banger keeps of a workspace NAME is in /root/.banger/NAME: `new`, what is arriving; `before`, what was
there before, until the next one arrives; `index`, git's, of the state it came in; and `ready`, the id of the
operation that brought it, written last. A workspace without `ready` is not one.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from banger import proc
from banger.errors import BangerError, GuestUnreachable, OperationFailed, ProgramFailed, WrongState
from banger.guest import ssh
from banger.model import Value
from banger.workspace.parcel import LAST

HOME = "/root"
LOOK_S = 30.0
SEND_S = 1800.0
CUT = 255
"""What the ssh program exits with when the connection fails (ssh(1))."""

DIED = 128
"""Above it, the ssh program died of a signal."""

IN_THE_WAY = 71
NOT_WHOLE = 72
GONE = 73

_STATE = "tree=$1 state=$2 op=$3; new=$state/new before=$state/before\n"

# A guest that was switched off between two renames has its old workspace back first.
_MEND = """\
if ! [ -e "$state/ready" ] && [ -e "$before/ready" ]; then
    rm -rf "$tree"; [ -e "$before/tree" ] && mv "$before/tree" "$tree"
    [ -e "$before/index" ] && mv "$before/index" "$state/index"
    mv "$before/ready" "$state/ready"
fi
"""
_LOOK = """\
if [ -e "$tree" ] && ! [ -e "$state" ]; then exit 71; fi
if git --version > /dev/null 2>&1; then echo git; else echo plain; fi
df -Pk /root | { read -r head; read -r disk size used free rest; echo "$free"; }
"""
_SEND = """\
cd /
umask 022
if [ -e "$state/ready" ] && [ "$(cat "$state/ready")" = "$op" ]; then cat > /dev/null; exit 0; fi
mkdir -p "$state"
rm -rf "$new" "$before"
mkdir "$new" "$before"
trap 'status=$?; [ $status = 0 ] || rm -rf "$new"; exit $status' EXIT
trap 'exit 72' HUP TERM INT PIPE
tar -x -C "$new" || { cat > /dev/null; exit 72; }
[ -e "$new/whole" ] || exit 72
if [ -e "$new/git" ]; then
    mkdir "$new/tree"
    mv "$new/git" "$new/tree/.git"
    cd "$new/tree"
    unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE
    git read-tree refs/banger/prepared && git checkout-index --all --force --index || exit 72
    cp .git/index "$new/index"
    rm .git/info/attributes
    if [ "$(git rev-parse --quiet --verify HEAD)" = "$(git rev-parse refs/banger/prepared)" ]; then
        : # nothing differs from the commit: the index is as it is to be
    elif git rev-parse --quiet --verify HEAD > /dev/null; then
        git reset --quiet || exit 72
    else
        rm .git/index
    fi
    cd /
fi
sync
trap '' HUP TERM INT PIPE
[ -e "$state/ready" ] && mv "$state/ready" "$before/ready"
[ -e "$state/index" ] && mv "$state/index" "$before/index"
[ -e "$tree" ] && mv "$tree" "$before/tree"
mv "$new/tree" "$tree" && echo "$op" > "$new/ready" || exit 72
[ -e "$new/index" ] && mv "$new/index" "$state/index"
mv "$new/ready" "$state/ready"
rm -rf "$new"
sync
"""
# What was half sent goes; what has taken its place gives it back.
_WITHDRAW = """\
rm -rf "$new"
if [ -e "$state/ready" ] && [ "$(cat "$state/ready")" = "$op" ]; then
    rm -rf "$state/ready" "$state/index" "$tree"
    [ -e "$before/ready" ] || rm -rf "$state"
fi
"""
_CHANGES = """\
[ -e "$state/ready" ] && [ "$(cat "$state/ready")" = "$op" ] && [ -d "$tree" ] || exit 73
cd "$tree" || exit 73
if [ -e "$state/index" ] && git rev-parse --git-dir > /dev/null 2>&1; then
    own=$(mktemp -d "$state/export.XXXXXX") || exit 1
    trap 'rm -rf "$own"' EXIT
    trap 'exit 1' HUP TERM INT PIPE
    mkdir -p "$own/objects/info" "$own/refs" "$own/info"
    objects=$(cd "$(git rev-parse --git-path objects)" && pwd) || exit 1
    echo "$objects" > "$own/objects/info/alternates"
    echo "ref: refs/heads/none" > "$own/HEAD"
    cp .git/config "$own/config" 2> /dev/null
    [ -e .git/info/exclude ] && cp .git/info/exclude "$own/info/exclude"
    echo "$attributes" > "$own/info/attributes"
    commit=$(git rev-parse --verify "$commit^{commit}") || exit 1
    cp "$state/index" "$own/index" || exit 1
    export GIT_DIR="$own" GIT_WORK_TREE="$tree" GIT_INDEX_FILE="$own/index"
    echo git
    git -c core.autocrlf=false -c core.fileMode=true -c advice.addEmbeddedRepo=false add --all . || exit 1
    git -c core.quotePath=true diff --cached --binary --full-index --no-renames --no-ext-diff --no-textconv \\
        --no-color --ignore-submodules=all --src-prefix=a/ --dst-prefix=b/ "$commit"
    exit
fi
echo tar
# The guest's git is gone, and what it knew may be there still.
set --
for name in .[!.]* ..?* *; do
    [ "$name" != .git ] && { [ -e "$name" ] || [ -L "$name" ]; } && set -- "$@" "./$name"
done
[ $# = 0 ] || tar -c "$@"
"""


class Place(Value):
    """Where a workspace is in the guest, and which operation brings it or has brought it."""

    path: str
    op: str

    @property
    def state(self) -> str:
        """What banger keeps of it, beside."""
        return f"{HOME}/.banger/{Path(self.path).name}"


class Seen(Value):
    """What a guest has: git, and so many KiB of room at /root."""

    git: bool
    free_kib: int


def place_of(name: str, op: str) -> Place:
    """Say where a workspace of this name goes."""
    return Place(path=f"{HOME}/{name}", op=op)


def look(target: ssh.Target, place: Place) -> Seen:
    """Look what the guest has. Raises WrongState when another directory is in the way, GuestUnreachable."""
    try:
        said = proc.run([*ssh.argv(target), _command(_MEND + _LOOK, place)], timeout_s=LOOK_S)
    except ProgramFailed as error:
        if error.status == IN_THE_WAY:
            raise WrongState(
                f"{place.path} is in the guest already, and is not a workspace of banger's.",
                hint="Rename it in the guest, or prepare from a directory with another name.",
            ) from None
        raise _explained(error) from None
    kind, free = said.split()
    return Seen(git=kind == "git", free_kib=int(free))


def send(target: ssh.Target, place: Place, parcel: Path, cancelled: Callable[[], bool]) -> None:
    """Make it so that what is in a parcel is the workspace, whole; else the old one stays.

    Raises GuestUnreachable when the connection is cut, OperationFailed when the guest's disk is full.
    """
    remote = shlex.join([*ssh.argv(target), _command(_MEND + _SEND, place)])
    # The mark that all has come is packed last; without it the guest takes nothing.
    content = next(name for name in ("git", "tree") if (parcel / name).exists())
    packed = shlex.join([
        "tar", "-c", "--format=gnu", "--owner=0", "--group=0", "--numeric-owner",
        "-C", str(parcel), content, LAST,
    ])  # fmt: skip
    try:
        proc.run(["sh", "-c", f"{packed} | {remote}"], timeout_s=SEND_S, cancelled=cancelled)
    except ProgramFailed as error:
        raise _explained(error) from None


def withdraw(target: ssh.Target, place: Place) -> None:
    """Make it so that the guest has what it had before; nothing when it is so. Raises as `send`."""
    try:
        proc.run([*ssh.argv(target), _command(_WITHDRAW + _MEND, place)], timeout_s=LOOK_S)
    except ProgramFailed as error:
        raise _explained(error) from None


def fetch(
    target_argv: list[str], place: Place, commit: str, attributes: str, into: Path, limit_mib: int
) -> None:
    """Write what the guest has changed to a file: a line `git` and a patch, or `tar` and an archive.

    Raises WrongState when the guest does not have this workspace any more, GuestUnreachable.
    """
    words = f"commit={shlex.quote(commit)} attributes={shlex.quote(attributes.strip())}\n"
    remote = shlex.join([*target_argv, _command(words + _CHANGES, place)])
    blocks = limit_mib * 2048  # of 512 bytes: the guest is not trusted to come to an end
    try:
        proc.run(["sh", "-c", f"ulimit -f {blocks}; {remote} > {shlex.quote(str(into))}"], timeout_s=SEND_S)
    except ProgramFailed as error:
        raise _explained(error) from None


def _command(script: str, place: Place) -> str:
    """Give the remote command: the SSH server has root's shell split it, so it is quoted."""
    words = [
        "/run/banger/bin/busybox",
        "sh",
        "-c",
        _STATE + script,
        "banger",
        place.path,
        place.state,
        place.op,
    ]
    return shlex.join(words)


def _explained(error: ProgramFailed) -> BangerError:
    tail = error.message.partition(": ")[2]
    if "No space left on device" in tail or "Disk quota exceeded" in tail:
        return OperationFailed(
            "The guest's disk is full; what was there before is there still.",
            hint="Remove something at /root in the guest, or make a VM with a larger --disk-size.",
        )
    if error.status == CUT or (error.status or 0) > DIED:
        return GuestUnreachable(
            f"The connection to the guest failed; what was there before is there still. {tail}".rstrip(),
            hint="`banger vm show` tells whether it runs. Try again.",
        )
    if error.status == GONE:
        return WrongState(
            "The guest does not have the workspace that was prepared.",
            hint="`banger vm workspace prepare` brings it again.",
        )
    if error.status == NOT_WHOLE:
        return OperationFailed(f"The workspace did not come whole; the old one stays. {tail}".rstrip())
    return error
