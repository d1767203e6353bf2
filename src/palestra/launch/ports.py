"""TCP ports on this machine: free ones, and who holds one that is not free."""

import socket
from contextlib import ExitStack
from pathlib import Path

from palestra.core.errors import UserError

_LISTEN = "0A"


def free_ports(host: str, count: int) -> list[int]:
    """Distinct ports that were free a moment ago."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((host, 0))
        return [one.getsockname()[1] for one in sockets]


def require_free(host: str, port: int, *, field: str) -> None:
    """Errors: UserError naming `field` and, where the system tells, the process that listens on `port`."""
    if holder := holder_of(host, port):
        raise UserError(
            f"port {port} of {field} on {host} is in use by {holder}; end it, give another {field}, "
            f"or leave {field} out to use free ports"
        )


def holder_of(host: str, port: int) -> str:
    """Who keeps a server from listening there, in words as far as the system tells; "" if nobody does."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return listener_of(port) or error.strerror or str(error)
    return ""


def listener_of(port: int) -> str:
    """`process 4711 (python -m http.server)`, or "" where it is not to be seen."""
    wanted = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    if not wanted:
        return ""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(link.readlink()) in wanted for link in (directory / "fd").iterdir()):
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f"process {directory.name} ({command[:100]})"
        except OSError:
            continue  # ended meanwhile, or another user's
    return "a process of another user"


def _listening_inodes(port: int) -> list[str]:
    inodes = []
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        rows = [line.split() for line in table.read_text().splitlines()[1:]] if table.exists() else []
        inodes += [row[9] for row in rows if row[3] == _LISTEN and int(row[1].rsplit(":", 1)[1], 16) == port]
    return inodes
