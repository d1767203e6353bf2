"""An engine in a few lines that speaks vLLM's protocol, as recorded from 0.32, behind an httpx transport."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import pairwise
from typing import Any

import httpx


class FakeEngine(httpx.AsyncBaseTransport):
    """Samples token `seed + position` with log-probability -(weights + temperature); a load sets `weights`.

    `faults` are answers given instead, one per call of a path; an exception is raised as a broken connection would.
    """

    def __init__(self, weights: float = 0.0, label: str = "default"):
        self.weights, self.label = weights, label
        self.staged: dict[str, float] = {}  # directory -> weights
        self.faults: dict[str, list[httpx.Response | Exception]] = {}
        self.calls: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.paused = False
        self.raw_logprobs = False
        self.healthy = True
        self.breaks_after: int | None = None  # chunks of a stream
        self.between_chunks: Callable[[int], None] = lambda number: None
        self.delay_s = 0.0

    def paths(self) -> list[str]:
        return [path for path, _, _ in self.calls]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        body = json.loads(request.content) if request.content else {}
        self.calls.append((path, body, dict(request.url.params)))
        await asyncio.sleep(self.delay_s)
        if self.faults.get(path):
            fault = self.faults[path].pop(0)
            if isinstance(fault, Exception):
                raise fault
            return fault
        return self._answer(path, body)

    def _answer(self, path: str, body: dict[str, Any]) -> httpx.Response:
        match path:
            case "/inference/v1/generate" if body.get("stream"):
                return httpx.Response(200, stream=_Stream(self._chunks(body)))
            case "/inference/v1/generate":
                return httpx.Response(200, json=self._generate(body))
            case "/health":
                return httpx.Response(200 if self.healthy else 503)
            case "/pause" | "/resume":
                self.paused = path == "/pause"
                return httpx.Response(200, json={"status": "paused" if self.paused else "resumed"})
            case "/update_weights":
                self.weights = self.staged[body["update_info"]["directory"]]
            case "/finish_weight_update":
                self.label = body["weight_version"]
            case "/update_weight_version":
                self.label = body["new_version"]
            case "/weight_info":
                return httpx.Response(200, json={"weight_version": self.label})
            case "/metrics":
                return httpx.Response(200, text=METRICS)
        return httpx.Response(200, json={"message": "ok"})

    def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        sampling = body["sampling_params"]
        choices = [self._choice(index, sampling) for index in range(sampling.get("n", 1))]
        answer: dict[str, Any] = {"request_id": body["request_id"], "choices": choices[::-1], "prompt_logprobs": None}
        if "prompt_logprobs" in sampling:
            scored = [{str(token): {"logprob": -(self.weights + 1.0), "rank": 1}} for token in body["token_ids"][1:]]
            answer["prompt_logprobs"] = [None, *scored]
        return answer

    def _chunks(self, body: dict[str, Any]) -> Iterator[bytes]:
        """The first token alone, then `stream_interval` at a time; the versions with the last."""
        sampling = body["sampling_params"]
        whole = self._choice(0, sampling)
        size, step = len(whole["token_ids"]), sampling["stream_interval"]
        cuts = [0, 1, *range(1 + step, size, step), size]
        for number, (start, end) in enumerate(pairwise(cuts)):
            if number == self.breaks_after:
                raise httpx.ReadError("connection reset")
            self.between_chunks(number)
            is_last = end == size
            choice = {
                "index": 0,
                "token_ids": whole["token_ids"][start:end],
                "logprobs": {"content": whole["logprobs"]["content"][start:end]},
                "finish_reason": "length" if is_last else None,
                "stop_reason": None,
                "weight_versions": whole["weight_versions"] if is_last else None,
            }
            yield b"data: " + json.dumps({"request_id": body["request_id"], "choices": [choice]}).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    def _choice(self, index: int, sampling: dict[str, Any]) -> dict[str, Any]:
        num = sampling["max_tokens"]
        seed = (sampling.get("seed") or 0) + index
        temperature = 1.0 if self.raw_logprobs else sampling["temperature"]
        logprob = -(self.weights + temperature)
        token_ids = [seed + position for position in range(num)]
        return {
            "index": index,
            "token_ids": token_ids,
            "logprobs": {"content": [{"token_id": token, "logprob": logprob, "rank": 1} for token in token_ids]},
            "finish_reason": "length",
            "stop_reason": None,
            "weight_versions": [{"version": self.label, "start": 0, "end": num}],
        }


class _Stream(httpx.AsyncByteStream):
    """Server-sent events, cut where the network happens to cut them."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            yield chunk[:7]
            yield chunk[7:]


def error(status: int, message: str) -> httpx.Response:
    """As vLLM wraps its errors."""
    return httpx.Response(status, json={"error": {"message": message, "type": "InternalServerError", "code": status}})


METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 5.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 7.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:cache_config_info{block_size="16",engine="0",kv_cache_max_concurrency="12.5",num_gpu_blocks="800"} 1.0
vllm:num_preemptions_total{engine="0",model_name="m"} 3.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 676.0
vllm:generation_tokens_total{engine="0",model_name="m"} 2143.0
process_resident_memory_bytes 6.2e+08
"""
