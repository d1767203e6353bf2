"""Endpoints that speak for seats of environments in place of the policy, or that are measured themselves."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import msgspec

from palestra.config.schema import Endpoint, RunConfig
from palestra.core.deadline import within
from palestra.core.errors import InfrastructureError, UserError
from palestra.core.records import ChatReply
from palestra.orchestrate.sources import seed_for
from palestra.wire.chat import ChatClient, TooLongError
from palestra.wire.messages import Call

AtWork = Callable[[], AbstractContextManager[None]]
_TURNS = 100  # calls that may be answered before one's own, in seconds of a call


class ChatEndpoint:
    """One model at an OpenAI-compatible API, asked `max_in_flight` at once; calls over that wait for others to end."""

    def __init__(self, endpoint: Endpoint, model: str):
        """Errors: UserError, if its key is not there."""
        self._client = ChatClient(endpoint.url, model, key_env=endpoint.key_env, call_s=endpoint.call_s)
        self._slots, self._turn_s = asyncio.Semaphore(endpoint.max_in_flight), _TURNS * endpoint.call_s

    async def ask(self, call: Call, *, seed: int, at_work: AtWork = nullcontext) -> ChatReply:
        """`at_work` lasts while it is asked, behind the wait for a turn.

        Errors: UserError, if every call would be refused; InfrastructureError.
        """
        await within(self._turn_s, self._slots.acquire(), waiting_for=f"a turn at {self._client.url}")
        try:
            with at_work():
                return await self._client.ask(call.messages, call.tools, call.sampling, seed=seed)
        finally:
            self._slots.release()

    async def close(self) -> None:
        await self._client.close()


def hash_of_chat(seat: str, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> int:
    """What a call of a seat is found again by."""
    return seed_for(msgspec.json.encode([seat, messages, tools], order="deterministic").decode())


class SeatEndpoints:
    """Those of `seats` in all entries of env.mix and eval.sets; entries that name the same one share it."""

    def __init__(self, config: RunConfig):
        """Errors: UserError, if a key is not there."""
        self._endpoints: dict[str, ChatEndpoint] = {}
        self._of_seat: dict[tuple[str, str], ChatEndpoint] = {}
        for source in (*config.env.mix, *config.eval.sets):
            for seat, model in source.seats.items():
                place = f"{model.url} {model.model} {model.key_env} {model.call_s} {model.max_in_flight}"
                if place not in self._endpoints:
                    self._endpoints[place] = ChatEndpoint(model, model.model)
                self._of_seat[source.label, seat] = self._endpoints[place]

    async def ask(self, source: str, call: Call, *, seed: int, at_work: AtWork = nullcontext) -> ChatReply:
        """The next words of `call.seat`. Errors: as of `ChatEndpoint`. What is too long for it is not the policy's
        fault."""
        if (endpoint := self._of_seat.get((source, call.seat))) is None:
            raise UserError(f"{source} has no model for the seat {call.seat}; give one in its `seats`")
        try:
            return await endpoint.ask(call, seed=seed, at_work=at_work)
        except TooLongError as error:
            raise InfrastructureError(f"the seat {call.seat} of {source}: {error}") from error

    async def close(self) -> None:
        for endpoint in self._endpoints.values():
            await endpoint.close()
