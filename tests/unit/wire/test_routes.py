"""Routed experts, from vLLM's own classes to ours: its scheduler says of which tokens, its server writes the answer.

An engine that returns them needs a GPU, and has not been seen here. What is tested is the contract.
"""

import warnings
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from palestra.core.records import NO_ROUTES, Sampling
from palestra.env.chat.draft import Draft as ChatDraft
from palestra.wire.draft import Draft
from palestra.wire.policy import EngineClient, EngineError
from palestra.wire.routes import as_array

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch, as vLLM's layers are imported
    from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector, AuxRequestOutput
    from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, RequestOutput, WeightVersionSpan

LAYERS, CHOSEN = 3, 2


def experts_at(positions: range) -> np.ndarray:
    """What this engine chooses: a function of the position, the layer and the place."""
    place = np.arange(LAYERS * CHOSEN).reshape(1, LAYERS, CHOSEN)
    return ((np.array(positions, np.int64)[:, None, None] * 17 + place) % 250).astype(np.uint8)


class Server(httpx.AsyncBaseTransport):
    """vLLM's token route without an engine: token `position` at each, one a step."""

    def __init__(self):
        self.returns, self.starts = True, []
        self._serving: Any = object.__new__(ServingTokens)
        self._serving.enable_prompt_tokens_details = self._serving.enable_log_outputs = False
        self._serving.request_logger, self._serving.return_tokens_as_token_ids = None, False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        asked = GenerateRequest.model_validate_json(request.content)
        self.starts.append(asked.sampling_params.routed_experts_prompt_start)
        arguments = asked, self._steps(asked), "id", "model", RequestResponseMetadata(request_id="id")
        if asked.stream:
            events = [event async for event in self._serving.serve_tokens_stream_generator(*arguments)]
            return httpx.Response(200, content="".join(events))
        answer = await self._serving.serve_tokens_full_generator(*arguments)
        return httpx.Response(200, content=answer.model_dump_json())

    async def _steps(self, asked: GenerateRequest) -> AsyncIterator[RequestOutput]:
        prompt, params, chunks = len(asked.token_ids), asked.sampling_params, []
        assert params.max_tokens is not None
        for num in range(1, params.max_tokens + 1):
            chunks.append(self._taken(prompt, num, params.routed_experts_prompt_start))
            is_last = num == params.max_tokens
            if asked.stream or is_last:
                said = [prompt + num - 1] if asked.stream else list(range(prompt, prompt + num))
                yield self._output(asked, said, np.concatenate(chunks) if is_last and self.returns else None, num)

    def _taken(self, prompt: int, num: int, start: int) -> np.ndarray:
        """Of the step that sampled token `num` of the reply: what vLLM's scheduler takes of what was computed."""
        begin = start if num == 1 else prompt + num - 2
        computed = AuxRequestOutput(begin, experts_at(range(begin, prompt + num + 5)))  # speculation computes more
        request = SimpleNamespace(request_id="id", num_tokens=prompt + num, is_finished=lambda: False)
        rows = AuxOutputSchedulerConnector().take_output(request, {"id": computed})  # type: ignore[arg-type]
        assert rows is not None
        return rows

    def _output(self, asked: GenerateRequest, said: list[int], routed: np.ndarray | None, num: int) -> RequestOutput:
        is_last = num == asked.sampling_params.max_tokens
        output = CompletionOutput(
            index=0,
            text="",
            token_ids=said,
            cumulative_logprob=None,
            logprobs=[{token: Logprob(-1.0, rank=1)} for token in said],
            routed_experts=routed,
            finish_reason="length" if is_last else None,
            weight_versions=[WeightVersionSpan("0", 0, num)] if is_last else None,
        )
        return RequestOutput("id", None, asked.token_ids, None, [output], finished=is_last)


@pytest.fixture
def server() -> Server:
    return Server()


async def ask(server: Server, prompt: list[int], routes_from: int | None, *, streams: bool, num: int = 4) -> Any:
    client = EngineClient("http://engine:8000/", transport=server)
    sampling = Sampling(max_tokens=num, routes_from=routes_from)
    if not streams:
        return (await client.generate(prompt, sampling, seed=1, deadline_s=20))[0]
    return await client.stream(prompt, sampling, seed=1, silence_s=5, draft=Draft(lambda: 0))


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("start", [0, 3, 5])
async def test_a_reply_has_the_experts_of_all_tokens_but_the_last(server: Server, start: int, streams: bool):
    reply = await ask(server, list(range(5)), start, streams=streams)
    assert reply.token_ids == [5, 6, 7, 8]
    assert server.starts == [start]
    assert np.array_equal(as_array(reply.routes), experts_at(range(start, 8)))
    assert not np.array_equal(as_array(reply.routes), experts_at(range(start + 1, 9)))


async def test_turns_ask_for_what_is_not_known_and_the_first_record_stays(server: Server):
    """The last token of a reply comes with the next turn, whose prompt is otherwise not sent again."""
    draft = ChatDraft(range(5))
    for turn, more in enumerate(([9, 10], [15, 16], [])):
        reply = await ask(server, draft.token_ids, draft.num_routed, streams=True)
        draft.add_reply(reply, turn)
        draft.continue_with(more)
    (sample,) = draft.samples()
    assert server.starts == [0, 8, 14]
    assert len(sample.token_ids) == 5 + 4 + 2 + 4 + 2 + 4
    assert np.array_equal(as_array(sample.routes), experts_at(range(20)))
    assert sample.routes.token_bytes == LAYERS * CHOSEN


@pytest.mark.parametrize("streams", [False, True])
async def test_who_does_not_ask_has_none(server: Server, streams: bool):
    assert (await ask(server, [0, 1], None, streams=streams)).routes == NO_ROUTES
    server.returns = False
    assert (await ask(server, [0, 1], None, streams=streams)).routes == NO_ROUTES
    with pytest.raises(EngineError, match="returned no routed experts; start it with --enable-return-routed-experts"):
        await ask(server, [0, 1], 0, streams=streams)


@pytest.mark.parametrize(
    ("spoilt", "why"),
    [
        (lambda rows: rows[1:], r"uint8 \[2, 3, 2\] is no array of 3 tokens"),
        (lambda rows: rows.astype(np.float32), r"float32 \[3, 3, 2\] is no array"),
        (lambda rows: rows[0], r"uint8 \[3, 2\] is no array"),
    ],
)
async def test_routes_that_do_not_fit_are_refused(server: Server, monkeypatch, spoilt: Any, why: str):
    output = server._output
    monkeypatch.setattr(server, "_output", lambda asked, said, routed, num: output(asked, said, spoilt(routed), num))
    with pytest.raises(EngineError, match=why):
        await ask(server, [0, 1], 0, streams=False, num=2)


def test_vllm_knows_the_flags_and_refuses_what_it_cannot_return():
    """Not without its second model runner, which needs Triton; not of a dense model; not without prefix caching."""
    from vllm.config import VllmConfig
    from vllm.config.aux_output import AuxOutputConfig
    from vllm.engine.arg_utils import EngineArgs

    assert {"enable_return_routed_experts", "enable_prefix_caching"} <= EngineArgs.__dataclass_fields__.keys()

    def refused(**differs: Any) -> str:
        fields = {"runner_type": "generate", "is_moe": True, **differs}
        config = SimpleNamespace(
            aux_output_config=AuxOutputConfig(enable_return_routed_experts=True),
            use_v2_model_runner=fields.pop("is_second", True),
            cache_config=SimpleNamespace(enable_prefix_caching=fields.pop("caches", True)),
            model_config=SimpleNamespace(**fields),
            speculative_config=None,
            parallel_config=SimpleNamespace(
                pipeline_parallel_size=1, decode_context_parallel_size=1, prefill_context_parallel_size=1
            ),
            kv_transfer_config=None,
        )
        try:
            VllmConfig._verify_aux_output_compatibility(config)  # type: ignore[arg-type]
        except ValueError as error:
            return str(error)
        return ""

    assert refused() == ""
    assert "requires Model Runner V2" in refused(is_second=False)
    assert "only supports MoE models" in refused(is_moe=False)
    assert "requires prefix caching" in refused(caches=False)
