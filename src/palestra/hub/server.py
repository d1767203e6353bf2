"""Serve the pages until it is told to end.

Consumes: requests; the interrupt. Produces: pages. Waits for: the server, which ends when it is told to.
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from palestra.core.errors import UserError
from palestra.hub.site import Site
from palestra.hub.web import application

_GRACE_S = 3


def serve(outputs: Path, *, host: str, port: int, names: Sequence[str], say: Callable[[str], None]) -> None:
    """`say` hears the address, once it answers. Errors: UserError for a directory or an address that cannot be."""
    if not outputs.is_dir():
        raise UserError(f"{outputs} is not a directory; runs write to log.outputs, by default outputs/")
    with listening(host, port) as listener:
        asyncio.run(_serve(outputs, listener, host, names, say))


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(place[:2], family=family, backlog=128)
    except OSError as error:
        raise UserError(f"--host {host} --port {port} cannot be listened at: {error}; name another") from None
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted connections have it too
    with listener:
        yield listener


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """They are heard below, so that the command ends as one that was asked to."""
        yield


async def _serve(
    outputs: Path, listener: socket.socket, host: str, names: Sequence[str], say: Callable[[str], None]
) -> None:
    site = Site(outputs)
    app = application(site, own_names(host, names))
    await until_told(app, listener, say, ending=site.watch.close)  # streams of events end with it


def own_names(host: str, names: Sequence[str]) -> frozenset[str]:
    return frozenset({"localhost", host.lower(), socket.gethostname().lower(), socket.getfqdn().lower(), *names})


async def until_told(
    app: ASGIApp,
    listener: socket.socket,
    say: Callable[[str], None],
    *,
    ending: Callable[[], None] = lambda: None,
    grace_s: int = _GRACE_S,
    drain_s: float = 0.0,
    **settings: Any,
) -> None:
    """Serve until SIGINT or SIGTERM: `ending` is called, `drain_s` later it listens no more, and requests that are
    under way then have `grace_s`. A second signal waits for nothing. `settings` are uvicorn's."""
    quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
    kept: dict[str, Any] = {"lifespan": "on", "timeout_graceful_shutdown": grace_s, "proxy_headers": False}
    server, loop = _Server(uvicorn.Config(app, **(quiet | kept | settings))), asyncio.get_running_loop()
    num_told = 0

    def end() -> None:
        server.should_exit = True

    def told_to_end() -> None:
        nonlocal num_told
        num_told += 1
        if num_told > 1:
            server.should_exit = server.force_exit = True
            return
        ending()
        loop.call_later(drain_s, end)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told_to_end)
    shown, port = listener.getsockname()[:2]
    say(f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/")
    await server.serve(sockets=[listener])
