"""`python -m palestra.launch.bench.instant PORT TOKEN_ID...`: an engine that has every reply at once: these tokens.

It knows as much of the engine's protocol as an evaluation asks for, and ends when its parent does.
"""

import asyncio
import os
import sys
from typing import Any

import msgspec
from aiohttp import web

from palestra.core.process import die_with_parent

_METRICS = """vllm:num_requests_running{engine="0"} 0.0
vllm:num_requests_waiting{engine="0"} 0.0
vllm:kv_cache_usage_perc{engine="0"} 0.0
"""


class Instant:
    """All its replies are the same."""

    def __init__(self, token_ids: list[int]):
        size = len(token_ids)
        self._choice = {
            "token_ids": token_ids,
            "logprobs": {"content": [{"logprob": -0.5}] * size},
            "finish_reason": "stop",
            "weight_versions": [{"version": "0", "start": 0, "end": size}],
        }

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_get("/metrics", _metrics)
        app.router.add_get("/health", _nothing)
        app.router.add_post("/update_weight_version", _nothing)
        return app

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read())
        choices = [{"index": index, **self._choice} for index in range(body["sampling_params"].get("n", 1))]
        answer = msgspec.json.encode({"choices": choices})
        if not body.get("stream"):
            return web.Response(body=answer, content_type="application/json")
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: " + answer + b"\n\ndata: [DONE]\n\n")
        await response.write_eof()
        return response


async def _metrics(request: web.Request) -> web.Response:
    return web.Response(text=_METRICS)


async def _nothing(request: web.Request) -> web.Response:
    return web.json_response({})


async def _serve(port: int, token_ids: list[int]) -> Any:
    runner = web.AppRunner(Instant(token_ids).app(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=4096).start()
    await asyncio.Event().wait()  # until its parent ends it


def main() -> None:
    die_with_parent(os.getppid())
    port, *token_ids = map(int, sys.argv[1:])
    asyncio.run(_serve(port, token_ids))


if __name__ == "__main__":
    main()
