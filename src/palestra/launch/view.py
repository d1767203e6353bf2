"""`palestra view`: the runs of a directory in a browser."""

import ipaddress
import sys
from collections.abc import Sequence
from pathlib import Path

from palestra.hub.server import serve


def view(outputs: Path, *, host: str, port: int, names: Sequence[str]) -> None:
    """Until it is told to end. Errors: UserError."""
    if not _is_loopback(host):
        print(f"whoever reaches {host}:{port} can read every rollout: there are no passwords", file=sys.stderr)
    serve(outputs, host=host, port=port, names=names, say=lambda url: print(f"viewer: {url}", flush=True))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
