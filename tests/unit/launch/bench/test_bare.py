"""The bare client against an engine in a few lines: what it asks for, what it measures, what it refuses."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import httpx
import pytest
from tests.unit.wire.fake_engine import FakeEngine, error

from palestra.core.errors import InfrastructureError
from palestra.launch.bench import bare
from palestra.launch.bench.bare import Ask, BareClient

URL = "http://engine:8000"
_TURNS = 50  # of the event loop, in which all that are asked at once have come


class CountingEngine(FakeEngine):
    """Its metrics count what it sampled; `most_at_once` is how many asks it ever had together. Each reply takes
    `reply_s` of a clock of its own, those together the same."""

    def __init__(self):
        super().__init__()
        self.sampled = self.now = self.most_at_once = 0
        self.clock_s, self.reply_s = 0.0, 0.01
        self.length: Callable[[int], int] = lambda asked: asked

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            return httpx.Response(200, text=f'vllm:generation_tokens_total{{engine="0"}} {self.sampled}.0\n')
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        ends_s = self.clock_s + self.reply_s
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        self.clock_s = max(self.clock_s, ends_s)
        answer = await super().handle_async_request(request)
        self.now -= 1
        return answer

    def _generate(self, body):
        return super()._generate(body | {"request_id": "nobody's"})

    def _choice(self, index, sampling):
        num = self.length(sampling["max_tokens"])
        self.sampled += num
        return super()._choice(index, sampling | {"max_tokens": num})


def asks(*lengths: int) -> list[Ask]:
    return [Ask(token_ids=[1, 2], num_tokens=length, seed=seed, temperature=0.7) for seed, length in enumerate(lengths)]


@pytest.fixture
async def engine():
    return CountingEngine()


@pytest.fixture
async def client(engine: CountingEngine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bare, "time", SimpleNamespace(monotonic=lambda: engine.clock_s))
    client = BareClient([URL], call_s=20, transport=engine)
    yield client
    await client.close()


async def test_it_asks_for_what_the_loop_would(engine: CountingEngine, client: BareClient):
    await client.measure(asks(5), in_flight=1)
    [(path, body, _)] = engine.calls
    assert path == "/inference/v1/generate"
    assert body["token_ids"] == [1, 2]
    wanted = {"max_tokens": 5, "ignore_eos": True, "seed": 0, "temperature": 0.7, "logprobs": 0, "n": 1}
    assert body["sampling_params"] == wanted | {"detokenize": False}


async def test_what_it_measures(engine: CountingEngine, client: BareClient):
    engine.reply_s = 0.05
    alone = await client.measure(asks(20, 20, 20, 20, 4), in_flight=2)
    assert (alone.num_replies, alone.sampled_tokens, alone.in_flight) == (5, 84, 2)
    assert engine.most_at_once == 2
    assert alone.wall_s == pytest.approx(0.15)  # three rounds
    assert alone.decode_step_s == pytest.approx(0.05 / 20)  # the reply of 4 tokens does not count


async def test_saturated_is_before_the_tail(engine: CountingEngine, client: BareClient):
    """Two at once: when the first slot stays empty, 80 tokens are there after two rounds; a last one takes long."""
    engine.reply_s = 0.05
    alone = await client.measure(asks(*[20] * 4), in_flight=2)
    assert alone.saturated_tokens_per_s == pytest.approx(80 / 0.1)


async def test_a_reply_of_another_length_is_refused(engine: CountingEngine, client: BareClient):
    engine.length = lambda asked: asked - 1
    with pytest.raises(ExceptionGroup) as raised:
        await client.measure(asks(5), in_flight=1)
    assert isinstance(raised.value.exceptions[0], InfrastructureError)
    assert "gave 4 tokens where 5 were asked for" in str(raised.value.exceptions[0])


async def test_a_connection_that_was_hung_up_on_is_tried_again(engine: CountingEngine, client: BareClient):
    engine.faults["/inference/v1/generate"] = [httpx.ReadError("reset"), httpx.ReadError("reset")]
    assert (await client.measure(asks(5), in_flight=1)).sampled_tokens == 5
    engine.faults["/inference/v1/generate"] = [error(500, "no")]
    with pytest.raises(ExceptionGroup):
        await client.measure(asks(5), in_flight=1)
