"""The bare client: the least that can ask an engine for the same replies. What the loop is measured against.

Consumes: asks, all known beforehand. Produces: an `Alone`. Waits for: the engine, each reply with a deadline.
Woken by: replies. Ends when: all have come.
One request per reply, whole, over plain HTTP; nothing is recorded, scored, journalled, streamed or gone on with.
"""

import asyncio
import statistics
import time
from collections.abc import Sequence

import httpx
import msgspec
from msgspec import Struct

from palestra.core.deadline import within
from palestra.core.errors import InfrastructureError
from palestra.wire.connections import Connections
from palestra.wire.policy import EngineLoad, parse_metrics

_RETRIES = 3
_KEEPALIVE_S = 3.0
_STEADY_TOKENS = 16  # shorter replies say little of a decode step


class Ask(Struct, frozen=True, kw_only=True):
    """One reply of exactly `num_tokens`, as the loop would ask for it."""

    token_ids: list[int]
    num_tokens: int
    seed: int
    temperature: float


class Alone(Struct, frozen=True, kw_only=True):
    """What engines do for the bare client with `in_flight` asks at once.

    `wall_s` is from the first ask to the last reply, with the tail in which ever fewer run. `saturated_tokens_per_s`
    is before it: while every slot was refilled at once. `decode_step_s`: seconds per token, the median over replies.
    """

    in_flight: int
    num_replies: int
    sampled_tokens: int
    wall_s: float
    saturated_tokens_per_s: float
    decode_step_s: float
    preemptions: int = 0

    def with_another(self, other: "Alone") -> "Alone":
        """The mean of two measurements of the same work."""
        return msgspec.structs.replace(
            self,
            wall_s=(self.wall_s + other.wall_s) / 2,
            saturated_tokens_per_s=(self.saturated_tokens_per_s + other.saturated_tokens_per_s) / 2,
            decode_step_s=(self.decode_step_s + other.decode_step_s) / 2,
            preemptions=self.preemptions + other.preemptions,
        )


class BareClient:
    """Deals asks to engines in turn, `in_flight` at once."""

    def __init__(self, urls: Sequence[str], *, call_s: float, transport: httpx.AsyncBaseTransport | None = None):
        self._urls, self._call_s = list(urls), call_s
        self._http = httpx.AsyncClient(
            timeout=None, transport=transport or Connections(keepalive_s=_KEEPALIVE_S), trust_env=False
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def measure(self, asks: Sequence[Ask], *, in_flight: int) -> Alone:
        """Errors: DeadlineError; InfrastructureError, for a reply that is not as long as asked."""
        todo, decode_steps_s = list(enumerate(asks))[::-1], []
        before, began = await self._loads(), time.monotonic()

        async def work() -> None:
            while todo:
                number, ask = todo.pop()
                wall_s = await self._reply(self._urls[number % len(self._urls)], ask)
                if ask.num_tokens >= _STEADY_TOKENS:
                    decode_steps_s.append(wall_s / ask.num_tokens)

        async with asyncio.TaskGroup() as workers:
            tasks = [workers.create_task(work()) for _ in range(min(in_flight, len(asks)))]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            full, full_s = await self._loads(), time.monotonic() - began
        wall_s, after = time.monotonic() - began, await self._loads()
        return Alone(
            in_flight=in_flight,
            num_replies=len(asks),
            sampled_tokens=sum(ask.num_tokens for ask in asks),
            wall_s=wall_s,
            saturated_tokens_per_s=_gained(before, full, "sampled_tokens") / full_s,
            decode_step_s=statistics.median(decode_steps_s) if decode_steps_s else 0.0,
            preemptions=_gained(before, after, "preemptions"),
        )

    async def _reply(self, url: str, ask: Ask) -> float:
        """Seconds it took."""
        began = time.monotonic()
        sampling = {
            "n": 1,
            "temperature": ask.temperature,
            "max_tokens": ask.num_tokens,
            "ignore_eos": True,
            "seed": ask.seed,
            "logprobs": 0,
            "detokenize": False,
        }
        content = msgspec.json.encode({"token_ids": ask.token_ids, "sampling_params": sampling})
        headers = {"content-type": "application/json"}
        posting = self._post(f"{url}/inference/v1/generate", content, headers)
        response = await within(self._call_s, posting, waiting_for=f"a reply of {ask.num_tokens} tokens from {url}")
        answer = _decode(response.raise_for_status().content)
        if (got := len(answer.choices[0].token_ids)) != ask.num_tokens:
            raise InfrastructureError(f"engine {url} gave {got} tokens where {ask.num_tokens} were asked for")
        return time.monotonic() - began

    async def _post(self, url: str, content: bytes, headers: dict[str, str]) -> httpx.Response:
        """Once more where the server hung up on a connection that was idle; a seeded reply is the same."""
        for _ in range(_RETRIES):
            try:
                return await self._http.post(url, content=content, headers=headers)
            except httpx.TransportError:
                continue
        return await self._http.post(url, content=content, headers=headers)

    async def _loads(self) -> list[EngineLoad]:
        gets = [self._http.get(f"{url}/metrics") for url in self._urls]
        answers = [await within(self._call_s, get, waiting_for="the metrics of an engine") for get in gets]
        return [parse_metrics(answer.text) for answer in answers]


def _gained(before: Sequence[EngineLoad], after: Sequence[EngineLoad], field: str) -> int:
    """By all engines, of what they count since their start."""
    return sum(getattr(late, field) - getattr(early, field) for early, late in zip(before, after, strict=True))


class _Choice(Struct, frozen=True):
    token_ids: list[int]


class _Answer(Struct, frozen=True):
    choices: list[_Choice]


_decode = msgspec.json.Decoder(_Answer).decode
