"""A version on its way from the trainer's memory into several engines at once.

    engines stop, one by one -> all that are left are there -> the trainer begins -> they meet, if they are new to each
    other -> engines receive while the trainer sends -> both say that they are done

What vLLM's trainer side would say to engines by itself, the trainer says to the orchestrator, and that is what this
passes on: engines have one caller. One that fails before the trainer begins is left out; afterwards nobody can be.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

from palestra.core.errors import PublishError
from palestra.wire.policy import EngineClient

Begin = Callable[[Sequence[EngineClient]], Awaitable[bool]]
"""Tells the trainer to send to these engines; whether they must meet first."""


class NotSentError(PublishError):
    """The trainer could not send: this says nothing of the engines."""


class Sending:
    """`width`: workers of an engine."""

    def __init__(self, engines: Sequence[EngineClient], begin: Begin, *, width: int):
        self._engines, self._begin, self._width = list(engines), begin, width
        self._here: list[EngineClient] = []
        self._is_new_group = False
        self._said: dict[str, dict[str, Any]] = {}
        self._events = {name: asyncio.Event() for name in ("begun", "init", "update", "sent")}
        self._error = ""

    async def into(self, engine: EngineClient, *, deadline_s: float) -> None:
        """Everything between the start of its update and the end. Whoever calls has a deadline for all of it.

        Errors: NotSentError, if the trainer could not send; what the engine answers.
        """
        self._here.append(engine)
        await self._begin_if_all_are_here()
        await self._heard("begun")
        if self._is_new_group:
            info = await self._heard("init")
            offset = info["rank_offset"] + self._engines.index(engine) * self._width
            await engine.init_transfer({**info, "rank_offset": offset}, deadline_s=deadline_s)
        await engine.update_by_transfer(await self._heard("update"), deadline_s=deadline_s)
        await self._heard("sent")

    async def leave(self, engine: EngineClient) -> None:
        """It failed. The others do not wait for it, unless the trainer has begun."""
        if not self._events["begun"].is_set():
            self._engines = [other for other in self._engines if other is not engine]
            self._here = [other for other in self._here if other is not engine]
            await self._begin_if_all_are_here()

    def asked(self, what: Literal["init", "update"], info: dict[str, Any]) -> None:
        """By the trainer."""
        self._said[what] = info
        self._events[what].set()

    def sent(self, error: str = "") -> None:
        """The trainer is done; with an `error`, nobody waits any more."""
        self._error = error
        for event in self._events.values() if error else [self._events["sent"]]:
            event.set()

    async def _begin_if_all_are_here(self) -> None:
        if self._engines and len(self._here) == len(self._engines) and not self._events["begun"].is_set():
            self._events["begun"].set()
            self._is_new_group = await self._begin(self._engines)

    async def _heard(self, what: str) -> dict[str, Any]:
        await self._events[what].wait()
        if self._error:
            raise NotSentError(f"the trainer could not send the version: {self._error}")
        return self._said.get(what, {})
