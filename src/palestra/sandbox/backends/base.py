"""What a backend is: it starts an agent somewhere, and gives the socket on which that answers."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from palestra.sandbox.backends.interpreter import Interpreter
from palestra.sandbox.link import Link
from palestra.sandbox.records import Isolation, Limits


class Started:
    """A sandbox's agent. `kill` ends it with all that runs in it, at once and however it resists.

    `has_killed` tells whether something in it was killed for its memory since it was last asked. `home` is where its
    programs start; empty, where that is the same for all of its backend.
    """

    def __init__(
        self, link: Link, *, kill: Callable[[], None], has_killed: Callable[[], bool] = lambda: False, home: str = ""
    ):
        self.link, self.kill, self.has_killed, self.home = link, kill, has_killed, home
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.pid: int | None = None

    def set_ended(self, reason: str) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
        self.link.close(reason)


class Backend(Protocol):
    """`layers` names the walls that stand, such as `seccomp`. `home` is where programs start."""

    name: str
    isolation: Isolation
    layers: tuple[str, ...]
    home: str

    async def start(self, limits: Limits) -> Started:
        """Before its agent is ready. Errors: SandboxStartError."""
        ...

    async def interpreter(self, limits: Limits) -> Interpreter | None:
        """A Python that waits for its program; None where agents start programs. Errors: SandboxStartError."""
        ...

    async def close(self) -> None: ...
