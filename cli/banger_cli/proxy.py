"""What ssh runs for `NAME.vm`: find the VM's SSH port or host key. It starts nothing.

`python -P -m banger_cli.proxy SOCKET connect|host-key NAME.vm`. It runs at each `ssh`, so it imports
little. `connect` hands ssh a socket that is connected already and ends (ssh_config(5), ProxyUseFdpass;
the descriptor comes with one byte, unix(7), SCM_RIGHTS): nothing stands between the two from then on.
"""

from __future__ import annotations

import json
import socket
import sys
from typing import Any

CONNECT_S = 10.0
SUFFIX = ".vm"


def main() -> int:
    """Answer ssh; what is wrong is said on standard error."""
    try:
        place, what, host = sys.argv[1:]
        found = _ask(place, host.removesuffix(SUFFIX))
        if what == "connect":
            _hand_over(found["host"], found["port"])
        else:
            print(f"{host} {found['host_key']}")
    except (OSError, ValueError, LookupError) as error:
        print(f"banger: {error}", file=sys.stderr)
        return 1
    return 0


def _ask(place: str, vm: str) -> dict[str, Any]:
    """Ask the daemon where a VM's SSH server is. Raises OSError, or LookupError with the daemon's words."""
    request = json.dumps({"method": "vm.ssh", "params": {"vm": vm}}).encode() + b"\n"
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.settimeout(CONNECT_S)
        try:
            daemon.connect(place)
        except (FileNotFoundError, ConnectionRefusedError):
            raise OSError("no daemon is running (`banger daemon start`)") from None
        daemon.sendall(request)
        with daemon.makefile("rb") as answers:
            answer = json.loads(answers.readline() or b'{"error": {"message": "the daemon went away"}}')
    if "error" in answer:
        raise LookupError(" ".join(filter(None, (answer["error"]["message"], answer["error"].get("hint")))))
    result: dict[str, Any] = answer["result"]
    return result


def _hand_over(host: str, port: int) -> None:
    """Connect, and give the connection to ssh, which is at the other end of standard output."""
    with socket.create_connection((host, port), CONNECT_S) as guest, socket.socket(fileno=1) as ssh:
        guest.setblocking(True)
        guest.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        socket.send_fds(ssh, [b"\0"], [guest.fileno()])


if __name__ == "__main__":
    sys.exit(main())
