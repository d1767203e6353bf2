"""Sandboxes of rollouts and rewards, as a recipe asks for them: those of one worker.

`async with Sandboxes(config.env.sandbox, config.sandbox):` decides where programs run of whatever is played and scored
in it. Hosts are opened when first needed, one for each image, and end with the block.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from typing import Any, Self

from msgspec import structs

from palestra.config.schema import SandboxConfig
from palestra.core.errors import UserError
from palestra.core.records import Task
from palestra.sandbox.backends.choose import BACKENDS
from palestra.sandbox.box import Sandbox
from palestra.sandbox.host import Options, close_hosts, host_of
from palestra.sandbox.records import MOST_OUTPUT, Isolation, Limits, Result

_DEFAULT = SandboxConfig()
_here: ContextVar["Sandboxes | None"] = ContextVar("sandboxes", default=None)


class Sandboxes:
    """`backend`: a name, the address of a service, or None for the best that works here."""

    def __init__(self, backend: str | None = None, wish: SandboxConfig = _DEFAULT):
        """Errors: UserError, for a name that there is not."""
        require_backend(backend)
        least = None if wish.min_isolation is None else Isolation[wish.min_isolation.upper()]
        self._options = Options(backend=backend, min_isolation=least, image=wish.image, packages=wish.packages)
        self._limits = Limits(memory_mb=wish.memory_mb, disk_mb=wish.disk_mb, processes=wish.processes, cpus=wish.cpus)
        self._timeout_s, self._most = wish.timeout_s, wish.most
        self._free, self._turn = asyncio.Semaphore(wish.most), asyncio.Lock()

    async def open(self) -> None:
        """Before anything needs one: what cannot work here is told at once. Errors: as of `opened`."""
        await self._host(None)

    @asynccontextmanager
    async def opened(self, task: Task, *, count: int = 1, egress: Sequence[str] = ()) -> AsyncIterator[list[Sandbox]]:
        """So many for one rollout, which end with it. While there are `sandbox.most`, it waits for others to end.

        `egress`: hosts that their programs may reach. Errors: SandboxError; UserError, for an image or a backend that
        does not work here, or too little isolation.
        """
        if count > self._most:
            raise UserError(f"a rollout that needs {count} sandboxes never gets them with sandbox.most={self._most}")
        async with AsyncExitStack() as closing:
            async with self._turn:  # of two that need two each, none holds one while it waits for the other's
                for _ in range(count):
                    await closing.enter_async_context(self._free)
            host, boxes = await self._host(task.image), []
            for _ in range(count):
                box = await host.create(limits=self._limits, timeout_s=self._timeout_s, egress=tuple(egress))
                boxes.append(await closing.enter_async_context(box))
            yield boxes

    async def run_code(self, code: str, *, image: str | None = None, **options: Any) -> Result:
        """See `run_code`."""
        return await (await self._host(image)).run_code(code, limits=self._limits, **options)

    async def _host(self, image: str | None) -> Any:
        """Errors: as of `opened`."""
        options = self._options if image is None else structs.replace(self._options, image=image)
        return await host_of(options)

    async def __aenter__(self) -> Self:
        self._before = _here.get(None)
        _here.set(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        _here.set(self._before)
        await close_hosts()


_SERVICE = ("http://", "https://")


def require_backend(name: str | None) -> None:
    """Errors: UserError, if there is none of this name."""
    if name is not None and name not in BACKENDS and not name.startswith(_SERVICE):
        raise UserError(f"there is no sandbox {name!r}; there are {', '.join(BACKENDS)}, and http://... of a service")


def sandboxes_here() -> Sandboxes:
    """Those of the block around; outside of any, the best that works here."""
    return _here.get(None) or Sandboxes()


async def run_code(
    code: str,
    *,
    stdin: str | bytes = "",
    files: Mapping[str, str | bytes] | None = None,
    timeout_s: float = 10.0,
    max_output: int = MOST_OUTPUT,
    image: str | None = None,
) -> Result:
    """A Python program to its end, in a fresh sandbox of its own: for rewards. Where, and within which limits, says the
    recipe (`env.sandbox`, `sandbox`).

    `files` lie in the directory that it starts in. `max_output`: bytes kept of each stream. `image`: such as the
    task's. A program that fails, takes longer than `timeout_s` or more memory than it may is a result.
    Errors: SandboxError, for a sandbox that fails: no reward is made of it, the rollout is played again.
    """
    return await sandboxes_here().run_code(
        code, image=image, stdin=stdin, files=files, timeout_s=timeout_s, max_output=max_output
    )
