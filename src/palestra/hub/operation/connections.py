"""Connections that nobody uses are ended: one that sends no request, and one whose answer is not read.

uvicorn bounds the time between two requests; this bounds that of a request's head, and of an answer that stands still.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol


class Watched(AutoHTTPProtocol):
    """uvicorn's protocol, with `head_s` for a head and `stalled_s` for what waits to be read."""

    head_s = 15.0
    stalled_s = 60.0
    cycle: Any  # uvicorn's: the request that is being answered, or was the last
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _head: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget_head()
        elif self._head is None:
            self._wait_for_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self._stalled or self.loop.call_later(self.stalled_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_stalled()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        self._forget_stalled()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        self._head = self.loop.call_later(self.head_s, self.transport.abort)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _forget_stalled(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def watched(*, head_s: float, stalled_s: float) -> type[asyncio.Protocol]:
    return type("Watched", (Watched,), {"head_s": head_s, "stalled_s": stalled_s})
