"""Ports for servers that tests start a while after they have chosen one."""

import itertools
import os
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_EACH = 1000  # of every process of a session
_numbers = itertools.count(os.getpid())  # two sessions at once begin apart


def free_port() -> int:
    """Nobody listens on it, and nobody comes by it meanwhile: it is below those that the kernel gives to whoever asks
    for any, apart from those of pytest's other processes, and never the one before."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    end = int(_RANGE.read_text().split()[0]) - worker * _EACH
    return next(port for port in (end - 1 - number % _EACH for number in _numbers) if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
