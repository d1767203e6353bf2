"""What a backend is: it starts an agent somewhere, and gives the socket on which that answers."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from palestra.sandbox.backends.interpreter import Interpreter
from palestra.sandbox.link import Link
from palestra.sandbox.records import Isolation, Limits


class Started:
    """A sandbox's agent. `kill` ends it with all that runs in it, at once and however it resists.

    `has_killed` tells whether something in it was killed for its memory since it was last asked. `cpu_s`: of all that
    ran in it and was not killed with it, known when it has ended; None where nobody tells.
    """

    def __init__(self, link: Link, *, kill: Callable[[], None], has_killed: Callable[[], bool] = lambda: False):
        self.link, self.kill, self.has_killed = link, kill, has_killed
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.pid: int | None = None
        self.cpu_s: float | None = None

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
