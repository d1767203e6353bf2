"""The gateway: the only caller of the engines.

Consumes: engine calls of rollouts. Produces: replies, and pieces of long ones on their way.
Waits for: engines; never longer than `engine.call_s` for the next token. Woken by: callers. Ends when: closed.

A rollout stays on the engine that holds its prefix. A reply that breaks off because its engine dies, hangs, is taken
out or put to sleep is gone on with, from its tokens, on the next one that serves. Equal prompts of one group that
arrive together are joined into one request of n replies, which is not streamed: it is short, and asked again as a
whole. Engines seed reply i of a joined request with seed + i, so joining changes no sampled token.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Self

import msgspec

from palestra.config.schema import Engine
from palestra.core.errors import DeadlineError, InfrastructureError
from palestra.core.records import Reply, Sampling
from palestra.orchestrate.fleet import EngineLink, EngineState, Fleet
from palestra.orchestrate.sources import seed_for
from palestra.wire.draft import NOTHING, Draft
from palestra.wire.policy import EngineClient, EngineError, UnpublishedError, UnreachableError

_JOIN_S = 0.003
_PIECE_TOKENS = 256  # a reply on its way is told in pieces of at least so many tokens
_BREAKS = 8  # of one reply, after which the reply itself is suspected

Note = Callable[[Reply], None]
"""Hears the next piece of a reply on its way."""


@dataclass(frozen=True)
class _Joinable:
    """What calls must share to be one request."""

    engine: str
    token_ids: tuple[int, ...]
    sampling: Sampling
    salt: str


@dataclass
class _Joined:
    """Calls that wait to be sent together: seed and where the reply goes."""

    client: EngineClient
    calls: list[tuple[int, asyncio.Future[Reply]]] = field(default_factory=list)


class Gateway:
    """Sends calls to engines, joins equal prompts, goes on with replies that broke off."""

    def __init__(self, fleet: Fleet, *, join_max_tokens: int, call_s: float, stream_tokens: int):
        self.fleet = fleet
        self._join_max_tokens, self._call_s, self._stream_tokens = join_max_tokens, call_s, stream_tokens
        self._joined: dict[_Joinable, _Joined] = {}
        self._requests: set[asyncio.Task[None]] = set()

    @classmethod
    def by(cls, engine: Engine, fleet: Fleet) -> Self:
        """As a recipe says."""
        return cls(
            fleet,
            join_max_tokens=engine.join_max_tokens,
            call_s=engine.call_s,
            stream_tokens=engine.stream_tokens,
        )

    async def call(
        self,
        session: int,
        token_ids: list[int],
        sampling: Sampling,
        *,
        seed: int,
        begun: Reply = NOTHING,
        note: Note = lambda piece: None,
        beat: Callable[[], None] = lambda: None,
        at_work: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Reply:
        """One reply. Calls of one session (a rollout) go to the same engine.

        `begun` is what is known of the reply from before; `note` hears what follows it, in pieces, while it is on its
        way, and all of it when an engine breaks off; `beat` is called whenever tokens arrive, and `at_work` is around
        waits for an engine.
        Errors: InfrastructureError, if no engine could answer in time.
        """
        reply, breaks = as_ended(begun, sampling), 0
        while not is_whole(reply):
            if breaks == _BREAKS:
                raise InfrastructureError(f"a reply broke off {breaks} times, after {len(reply.token_ids)} tokens")
            with at_work():
                link = await self.fleet.engine_for(session)
            with link.busy():
                pieces = _Pieces(link, note, beat)
                rest = await self._go_on(pieces, token_ids, reply, sampling, seed=seed)
            breaks += link.state is not EngineState.ASLEEP
            reply = as_ended(reply.then(rest), sampling)
        return reply

    async def _go_on(
        self, pieces: "_Pieces", token_ids: list[int], begun: Reply, sampling: Sampling, *, seed: int
    ) -> Reply:
        """The rest of a reply, or as much of it as came before the engine broke off."""
        link = pieces.link
        prompt, left = [*token_ids, *begun.token_ids], sampling.max_tokens - len(begun.token_ids)
        rest = msgspec.structs.replace(sampling, max_tokens=left)
        if sampling.routes_from is not None:
            rest = msgspec.structs.replace(rest, routes_from=sampling.routes_from + begun.routes.num_tokens)
        seed = seed_for(seed, len(begun.token_ids)) if begun.token_ids else seed
        salt = link.client.cache_salt  # prefixes computed under another version are never shared
        if left <= self._join_max_tokens and not begun.token_ids:
            asking = self._join(_Joinable(link.name, tuple(prompt), rest, salt), link.client, seed)
        else:
            asking = link.client.stream(
                prompt,
                rest,
                seed=seed,
                silence_s=self._call_s,
                draft=pieces.draft,
                cache_salt=salt,
                stream_tokens=self._stream_tokens,
            )
        began = time.monotonic()
        try:
            reply = await _until_gone(asking, link)
        except asyncio.CancelledError:
            pieces.tell_all()  # whoever asks again goes on from there
            raise
        except (UnreachableError, DeadlineError, EngineError) as failure:
            is_of_request = isinstance(failure, EngineError) and not isinstance(failure, UnpublishedError)
            if is_of_request and await link.client.is_healthy():
                raise  # it made the engine fail, and would again
            self.fleet.take_out(link, str(failure))
            if isinstance(failure, UnpublishedError):
                return NOTHING  # no token of the policy
            reply = None
        if reply is None:
            pieces.tell_all()
            return pieces.draft.partial
        link.progressed()
        link.note_speed(len(reply.token_ids), time.monotonic() - began)
        return reply

    async def _join(self, key: _Joinable, client: EngineClient, seed: int) -> Reply:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Reply] = loop.create_future()
        if key not in self._joined:
            self._joined[key] = _Joined(client)
            loop.call_later(_JOIN_S, self._send, key)
        self._joined[key].calls.append((seed, future))
        return await future

    def _send(self, key: _Joinable) -> None:
        """One request for each run of consecutive seeds."""
        joined = self._joined.pop(key)
        calls = sorted(joined.calls, key=lambda call: call[0])
        start = 0
        for end in range(1, len(calls) + 1):
            if end == len(calls) or calls[end][0] != calls[end - 1][0] + 1:
                request = asyncio.create_task(self._request(key, joined.client, calls[start:end]))
                self._requests.add(request)
                request.add_done_callback(self._requests.discard)
                start = end

    async def _request(
        self, key: _Joinable, client: EngineClient, calls: list[tuple[int, asyncio.Future[Reply]]]
    ) -> None:
        try:
            replies = await client.generate(
                list(key.token_ids),
                key.sampling,
                seed=calls[0][0],
                num_replies=len(calls),
                cache_salt=key.salt,
                deadline_s=self._call_s,
            )
        except Exception as error:  # every caller of the joined request must hear of it
            for _, future in calls:
                if not future.done():
                    future.set_exception(_as_heard(error, key.engine))
            return
        for (_, future), reply in zip(calls, replies, strict=True):
            if not future.done():
                future.set_result(reply)

    async def close(self) -> None:
        for request in list(self._requests):
            request.cancel()
        await asyncio.gather(*self._requests, return_exceptions=True)
        for link in self.fleet.links:
            await link.client.close()


class _Pieces:
    """The draft of one reply, told in pieces."""

    def __init__(self, link: EngineLink, note: Note, beat: Callable[[], None]):
        self.draft = Draft(lambda: link.client.serving, self._arrived)
        self.link, self._note, self._beat, self._told = link, note, beat, 0

    def _arrived(self) -> None:
        self.link.progressed()
        self._beat()
        if len(self.draft.token_ids) - self._told >= _PIECE_TOKENS:
            self.tell_all()

    def tell_all(self) -> None:
        partial = self.draft.partial
        if len(partial.token_ids) > self._told:
            self._note(partial.after(self._told))
            self._told = len(partial.token_ids)


async def _until_gone(asking, link: EngineLink) -> Reply | None:
    """None, if the engine was taken out, or put to sleep, before it answered."""
    answer, gone = asyncio.ensure_future(asking), asyncio.ensure_future(link.gone.wait())
    try:
        await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        answer.cancel()
        gone.cancel()


def is_whole(reply: Reply) -> bool:
    return reply.finish_reason in ("stop", "length")


def as_ended(reply: Reply, sampling: Sampling) -> Reply:
    """A reply that broke off after its last token is whole."""
    if is_whole(reply):
        return reply
    if reply.token_ids and reply.token_ids[-1] in sampling.stop_token_ids:
        return msgspec.structs.replace(reply, finish_reason="stop")
    if len(reply.token_ids) >= sampling.max_tokens:
        return msgspec.structs.replace(reply, finish_reason="length")
    return reply


def _as_heard(error: Exception, engine: str) -> Exception:
    """What says something of the engine stays what it is; the rest is an engine that could not answer."""
    if isinstance(error, UnreachableError | DeadlineError | EngineError):
        return error
    return InfrastructureError(f"{engine} could not answer: {error}")
