"""The client of an engine: what it asks, how it reads the answers, and which failures it tells apart."""

import httpx
import pytest

from palestra.core.errors import DeadlineError
from palestra.core.records import Reply, Sampling, Span
from palestra.wire.draft import Draft
from palestra.wire.policy import EngineClient, EngineError, EngineLoad, RefusedError, UnreachableError, parse_metrics
from tests.unit.wire.fake_engine import METRICS, FakeEngine, error

GENERATE = "/inference/v1/generate"
SAMPLING = Sampling(temperature=0.7, max_tokens=4, stop_token_ids=(9,))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(label="7")


@pytest.fixture
def client(engine: FakeEngine) -> EngineClient:
    return EngineClient("http://engine:8000/", transport=engine)


async def test_a_reply_has_tokens_logprobs_and_versions(engine: FakeEngine, client: EngineClient) -> None:
    [reply] = await client.generate([1, 2], SAMPLING, seed=100, deadline_s=20, cache_salt="v7")
    assert reply.token_ids == [100, 101, 102, 103]
    assert reply.logprobs == [-0.7] * 4
    assert reply.spans == (Span(7, 0, 4),)
    assert reply.finish_reason == "length"


async def test_what_the_engine_is_asked(engine: FakeEngine, client: EngineClient) -> None:
    await client.generate([1, 2], SAMPLING, seed=100, deadline_s=20, cache_salt="v7", num_replies=2)
    [(_, body, _)] = engine.calls
    assert body.pop("request_id")
    assert body == {
        "token_ids": [1, 2],
        "cache_salt": "v7",
        "sampling_params": {
            "n": 2,
            "temperature": 0.7,
            "top_p": 1.0,
            "top_k": 0,
            "max_tokens": 4,
            "logprobs": 0,
            "detokenize": False,
            "stop_token_ids": [9],
            "seed": 100,
        },
    }


async def test_a_reply_of_an_exact_length_is_asked_for_without_stops(engine: FakeEngine, client: EngineClient) -> None:
    sampling = Sampling(max_tokens=4, stop_token_ids=(9,), ignores_stop=True)
    await client.generate([1, 2], sampling, seed=100, deadline_s=20)
    params = engine.calls[0][1]["sampling_params"]
    assert params["ignore_eos"] is True
    assert "stop_token_ids" not in params
    await client.generate([1, 2], SAMPLING, seed=100, deadline_s=20)
    assert "ignore_eos" not in engine.calls[1][1]["sampling_params"]


async def test_replies_of_a_joined_request_come_in_the_order_of_their_seeds(client: EngineClient) -> None:
    joined = await client.generate([1], SAMPLING, seed=100, deadline_s=20, num_replies=3)
    alone = [(await client.generate([1], SAMPLING, seed=100 + index, deadline_s=20))[0] for index in range(3)]
    assert joined == alone


async def test_tokens_without_a_version_are_not_accepted(engine: FakeEngine, client: EngineClient) -> None:
    engine.label = "default"
    with pytest.raises(EngineError, match="nothing was published to it yet"):
        await client.generate([1], SAMPLING, seed=0, deadline_s=20)
    assert await client.version() is None


async def test_tokens_that_no_span_covers_are_not_accepted(engine: FakeEngine, client: EngineClient) -> None:
    choice = {"index": 0, "token_ids": [1, 2], "logprobs": {"content": [{"logprob": -1.0}] * 2}}
    spans = [{"version": "7", "start": 0, "end": 1}]
    engine.faults[GENERATE] = [httpx.Response(200, json={"choices": [{**choice, "weight_versions": spans}]})]
    with pytest.raises(EngineError, match="2 tokens with 2 log-probabilities, 1 of them with a version"):
        await client.generate([1], SAMPLING, seed=0, deadline_s=20)


async def test_an_answer_that_is_not_one(engine: FakeEngine, client: EngineClient) -> None:
    engine.faults[GENERATE] = [httpx.Response(200, text="<html>proxy</html>")]
    with pytest.raises(EngineError, match="not a reply"):
        await client.generate([1], SAMPLING, seed=0, deadline_s=20)


async def test_score_returns_a_logprob_for_every_token_but_the_first(engine: FakeEngine, client: EngineClient) -> None:
    engine.weights = 0.5
    assert await client.score([3, 4, 5]) == [-1.5, -1.5]


async def test_scores_never_share_a_cache(engine: FakeEngine, client: EngineClient) -> None:
    await client.score([3, 4, 5])
    await client.score([3, 4, 5])
    first, second = (body["cache_salt"] for _, body, _ in engine.calls)
    assert first != second


async def test_raw_logprobs_are_found_out(engine: FakeEngine, client: EngineClient) -> None:
    await client.require_processed_logprobs([1, 2, 3])
    engine.raw_logprobs = True
    with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
        await client.require_processed_logprobs([1, 2, 3])


async def test_a_refused_request_is_our_mistake_and_not_tried_again(engine: FakeEngine, client: EngineClient) -> None:
    engine.faults[GENERATE] = [error(400, "The decoder prompt is longer than the maximum model length of 256.")]
    with pytest.raises(RefusedError, match=r"refused .*\(400\): The decoder prompt is longer"):
        await client.generate([1], SAMPLING, seed=0, deadline_s=20)
    assert len(engine.calls) == 1


async def test_a_failing_engine_is_quoted(engine: FakeEngine, client: EngineClient) -> None:
    engine.faults["/update_weights"] = [error(500, "module model.norm got 3 of 4 elements")]
    with pytest.raises(EngineError, match=r"module model\.norm got 3 of 4 elements"):
        await client.update("/dev/shm/v1", 1)


@pytest.mark.parametrize("broken", [httpx.ReadError("reset"), httpx.ConnectError("refused"), error(503, "busy")])
async def test_a_seeded_request_is_tried_again(engine: FakeEngine, client: EngineClient, broken: object) -> None:
    engine.faults[GENERATE] = [broken, broken]  # type: ignore[list-item]
    [reply] = await client.generate([1], SAMPLING, seed=5, deadline_s=20)
    assert reply.token_ids[0] == 5
    assert engine.paths() == [GENERATE] * 3


async def test_an_unseeded_request_that_may_have_arrived_is_not(engine: FakeEngine, client: EngineClient) -> None:
    engine.faults[GENERATE] = [httpx.ReadError("reset")]
    with pytest.raises(UnreachableError, match="after 1 tries: ReadError"):
        await client.generate([1], SAMPLING, seed=None, deadline_s=20)


async def test_an_unseeded_request_that_cannot_have_arrived_is(engine: FakeEngine, client: EngineClient) -> None:
    engine.faults[GENERATE] = [httpx.ConnectError("refused")]
    assert await client.generate([1], SAMPLING, seed=None, deadline_s=20)


async def test_a_load_is_never_sent_twice(engine: FakeEngine, client: EngineClient) -> None:
    engine.faults["/start_weight_update"] = [httpx.ReadError("reset")]
    with pytest.raises(UnreachableError):
        await client.start_update()
    assert len(engine.calls) == 1


async def test_tries_are_bounded(engine: FakeEngine, client: EngineClient) -> None:
    engine.faults[GENERATE] = [httpx.ReadError("reset")] * 10
    with pytest.raises(UnreachableError, match="after 5 tries"):
        await client.generate([1], SAMPLING, seed=5, deadline_s=30)


async def test_a_deadline_says_what_was_waited_for(engine: FakeEngine, client: EngineClient) -> None:
    engine.delay_s = 10
    with pytest.raises(DeadlineError, match="/inference/v1/generate of engine http://engine:8000"):
        await client.generate([1], SAMPLING, seed=5, deadline_s=0.05)
    with pytest.raises(DeadlineError, match="to become healthy; look into the engine's log"):
        await client.wait_healthy(0.05)


async def test_healthy_is_awaited_through_refused_connections(engine: FakeEngine, client: EngineClient) -> None:
    engine.faults["/health"] = [httpx.ConnectError("refused"), httpx.Response(503)]
    await client.wait_healthy(5)
    assert engine.paths() == ["/health"] * 3


async def test_pause_says_what_becomes_of_the_cache(engine: FakeEngine, client: EngineClient) -> None:
    await client.pause(clear_cache=False)
    await client.pause(clear_cache=True)
    assert [params for _, _, params in engine.calls] == [
        {"mode": "keep", "clear_cache": "false"},
        {"mode": "keep", "clear_cache": "true"},
    ]


async def test_load_of_an_engine(client: EngineClient) -> None:
    expected = EngineLoad(
        running=5,
        waiting=2,
        kv_use=0.25,
        preemptions=3,
        prompt_tokens=676,
        sampled_tokens=2143,
        safe_requests=12.5,
    )
    assert parse_metrics(METRICS) == expected
    assert await client.load() == expected


def test_an_engine_that_does_not_say_what_has_room_in_its_cache() -> None:
    assert parse_metrics(METRICS.replace('"12.5"', '"None"')).safe_requests is None


# --- streamed replies


def _stream(client: EngineClient, draft: Draft, **more):
    sampling = Sampling(temperature=0.7, max_tokens=10)
    return client.stream([1, 2], sampling, seed=100, silence_s=5, draft=draft, stream_tokens=4, **more)


async def test_a_streamed_reply_is_the_reply(engine: FakeEngine, client: EngineClient) -> None:
    draft = Draft(lambda: 7)
    streamed = await _stream(client, draft, cache_salt="v7")
    [whole] = await client.generate([1, 2], Sampling(temperature=0.7, max_tokens=10), seed=100, deadline_s=20)
    assert streamed == whole
    assert draft.token_ids == whole.token_ids
    body = engine.calls[0][1]
    assert body["stream"] is True
    assert body["sampling_params"]["stream_interval"] == 4
    assert body["cache_salt"] == "v7"


async def test_what_had_come_when_a_stream_broke_off(engine: FakeEngine, client: EngineClient) -> None:
    """Not asked again by the client: its owner goes on from there."""
    engine.breaks_after = 2
    draft = Draft(lambda: 7)
    with pytest.raises(UnreachableError, match="ReadError"):
        await _stream(client, draft)
    assert len(engine.calls) == 1
    assert draft.partial == Reply(
        token_ids=[100, 101, 102, 103, 104], logprobs=[-0.7] * 5, spans=(Span(7, 0, 5),), finish_reason="abort"
    )


async def test_a_stream_that_breaks_before_its_first_token_is_asked_again(engine: FakeEngine, client: EngineClient):
    engine.faults[GENERATE] = [httpx.ReadError("connection reset")]
    reply = await _stream(client, Draft(lambda: 7))
    assert len(reply.token_ids) == 10
    assert len(engine.calls) == 2


async def test_a_failure_within_a_stream_is_the_engines(engine: FakeEngine, client: EngineClient) -> None:
    said = b'data: {"error": {"message": "out of memory", "code": 500}}\n\ndata: [DONE]\n\n'
    engine.faults[GENERATE] = [httpx.Response(200, content=said)]
    with pytest.raises(EngineError, match="out of memory"):
        await _stream(client, Draft(lambda: 7))


async def test_a_stream_that_ends_without_a_reason_is_no_reply(engine: FakeEngine, client: EngineClient) -> None:
    engine.faults[GENERATE] = [httpx.Response(200, content=b"data: [DONE]\n\n")]
    with pytest.raises(EngineError, match="ended a stream of 0 tokens without a reason"):
        await _stream(client, Draft(lambda: 7))


async def test_a_silent_engine_is_named(engine: FakeEngine, client: EngineClient) -> None:
    engine.delay_s = 30
    with pytest.raises(DeadlineError, match="the next token of a reply from engine http://engine:8000"):
        await client.stream([1], SAMPLING, seed=0, silence_s=0.05, draft=Draft(lambda: 7))


async def test_health_is_what_the_engine_says_now(engine: FakeEngine, client: EngineClient) -> None:
    assert await client.is_healthy()
    engine.healthy = False
    assert not await client.is_healthy()
    engine.faults["/health"] = [httpx.ConnectError("refused")]
    assert not await client.is_healthy()
