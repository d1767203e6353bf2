"""What is given back elsewhere while nobody waits for it: pods, sandboxes of providers."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError

_END_S, _CLOSE_S = 60.0, 90.0
_log = logging.getLogger(__name__)


class Endings:
    """One that fails is a warning: what was to end has a lifetime of its own there."""

    def __init__(self):
        self._tasks = set[asyncio.Task[None]]()

    def begin(self, ending: Coroutine[Any, Any, Any], what: str) -> None:
        task = asyncio.ensure_future(self._ended(ending, what))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ended(self, ending: Coroutine[Any, Any, Any], what: str) -> None:
        try:
            await within(_END_S, ending, waiting_for=f"{what} to end")
        except Exception as error:  # of a library that we do not know
            _log.warning(
                "%s was not ended, and lives until its time is over: %s: %s", what, type(error).__name__, error
            )

    async def close(self) -> None:
        """When all that were begun have ended, or their time is over."""
        await asyncio.sleep(0)  # what was closed just now begins its ending in the next turn of the loop
        try:
            await within(_CLOSE_S, asyncio.gather(*self._tasks), waiting_for="what was begun to end")
        except DeadlineError as error:
            _log.warning("%s", error)
