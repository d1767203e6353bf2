"""Serve an application until it is told to end, and then end in order.

Consumes: requests; SIGTERM and SIGINT. Produces: answers. Waits for: the server. Ends when: it was told to, what was
being answered is answered or `grace_s` is over, and idle connections are closed. A second signal does not wait.
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from palestra.core.errors import UserError
from palestra.hub.operation.connections import watched
from palestra.hub.operation.logs import configuration, log


@dataclass(frozen=True)
class Serving:
    """`drain_s`: how long it goes on taking requests while `/ready` says no already, for balancers to notice."""

    host: str = "127.0.0.1"
    port: int = 8004
    drain_s: float = 0.0
    grace_s: float = 30.0
    head_s: float = 15.0
    stalled_s: float = 60.0
    connections: int = 1000
    proxies: tuple[str, ...] = ()  # whose word for the address of a client is taken


def serve(app: ASGIApp, serving: Serving, *, on_drain: Callable[[], None], say: Callable[[str], None]) -> None:
    """`say` hears the address, once it answers. Errors: UserError, for an address that cannot be listened at."""
    with listening(serving.host, serving.port) as listener:
        asyncio.run(_serve(app, serving, listener, on_drain, say))


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(place[:2], family=family, backlog=256)
    except OSError as error:
        raise UserError(f"--host {host} --port {port} cannot be listened at: {error}; name another") from None
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted connections have it too
    with listener:
        yield listener


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """They are heard below."""
        yield


def config(app: ASGIApp, serving: Serving) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=watched(head_s=serving.head_s, stalled_s=serving.stalled_s),
        ws="none",
        log_config=configuration(),
        access_log=False,
        server_header=False,
        lifespan="on",
        limit_concurrency=serving.connections,
        timeout_graceful_shutdown=int(serving.grace_s),
        proxy_headers=bool(serving.proxies),
        forwarded_allow_ips=list(serving.proxies),
    )


async def _serve(
    app: ASGIApp, serving: Serving, listener: socket.socket, on_drain: Callable[[], None], say: Callable[[str], None]
) -> None:
    server, loop = _Server(config(app, serving)), asyncio.get_running_loop()
    signals: list[int] = []

    def end() -> None:
        server.should_exit = True

    def told_to_end(number: int) -> None:
        signals.append(number)
        if len(signals) > 1:
            server.should_exit = server.force_exit = True
            return
        log("told to end", signal=signal.Signals(number).name, drain_s=serving.drain_s, grace_s=serving.grace_s)
        on_drain()
        loop.call_later(serving.drain_s, end)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told_to_end, number)
    shown, port = listener.getsockname()[:2]
    say(f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/")
    await server.serve(sockets=[listener])
