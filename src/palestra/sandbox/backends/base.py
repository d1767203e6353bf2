"""What a backend is: it starts an agent somewhere, and gives the socket on which that answers."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from palestra.sandbox.backends.interpreter import Interpreter
from palestra.sandbox.cgroups import Cgroup
from palestra.sandbox.link import Link
from palestra.sandbox.records import Isolation, Limits


class Started:
    """A sandbox's agent. `kill` ends it with all that runs in it, at once and however it resists.

    `has_killed` tells whether something in it was killed for its memory since it was last asked; after its end, whether
    that was why. `is_killed` of `set_ended`: the same, of its last moments. `home` is where its programs start; empty,
    where that is the same for all of its backend. `cpu_s`: of all that ran in it and was not killed with it, known
    when it has ended; None where nobody tells. `group`: what counts it, where that is ours.
    """

    def __init__(
        self,
        link: Link,
        *,
        kill: Callable[[], None],
        has_killed: Callable[[], bool] = lambda: False,
        home: str = "",
        group: Cgroup | None = None,
    ):
        self.link, self.kill, self._has_killed, self.home = link, kill, has_killed, home
        self.group, self._is_killed = group, False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.cpu_s: float | None = None

    def has_killed(self) -> bool:
        """Of its end, every program that it took with it is told, not only the one that asks first."""
        if not self.link.closed.done():
            return self._has_killed()
        if not self.ended.done():
            self._is_killed |= self._has_killed()
        return self._is_killed

    def set_ended(self, reason: str, *, is_killed: bool = False) -> None:
        self._is_killed |= is_killed
        if not self.ended.done():
            self.ended.set_result(None)
        self.link.close(reason)


class Backend(Protocol):
    """`layers` names the walls that stand, such as `seccomp`. `home` is where programs start.

    `ends_by_programs`: a program can end its sandbox, by killing the agent for one; then that was its own failure.
    `grace_s`: beyond a program's time, until an agent that says nothing is taken for starved by its programs.
    """

    name: str
    isolation: Isolation
    layers: tuple[str, ...]
    home: str
    ends_by_programs: bool
    grace_s: float

    async def start(self, limits: Limits) -> Started:
        """Before its agent is ready. Errors: SandboxStartError."""
        ...

    async def interpreter(self, limits: Limits) -> Interpreter | None:
        """A Python that waits for its program; None where agents start programs. Errors: SandboxStartError."""
        ...

    async def close(self) -> None: ...
