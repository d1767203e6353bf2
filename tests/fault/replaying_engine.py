"""An engine process that replays vLLM's protocol, as recorded from 0.32, over HTTP: `main` serves one engine of a run.

Its policy is a table that it really loads, hashes and samples from, all running requests one token at a time; a pause
freezes them where they are. tests/integration/test_replaying_engine.py holds it to the real engine.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from palestra.config import read_resolved
from palestra.core.errors import InfrastructureError
from palestra.core.process import die_with_parent
from palestra.infer.turn import wait_for_turn
from palestra.wire.rundir import RunDir
from palestra.wire.weights.manifest import read_manifest
from tests.fault.device import Device
from tests.fault.table import FILE, Table, read
from tests.fault.witness import Witness, faults_directory

STEP_S = 0.002  # one token of every running request
SLEEP_TAGS = {"weights", "kv_cache"}


@dataclass
class Choice:
    """One reply on its way."""

    index: int
    before: int
    sampling: dict[str, Any]
    chance: np.random.Generator
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    advanced: asyncio.Event = field(default_factory=asyncio.Event)

    def advance(self, table: Table, label: str) -> None:
        token, logprob = table.sample(self.before, self.sampling["temperature"], self.chance.random())
        self.before = token
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        end = len(self.token_ids)
        if self.spans and self.spans[-1]["version"] == label:
            self.spans[-1]["end"] = end
        else:
            self.spans.append({"version": label, "start": end - 1, "end": end})
        if token in self.sampling.get("stop_token_ids", ()):
            self.finish_reason = "stop"
        elif end >= self.sampling["max_tokens"]:
            self.finish_reason = "length"
        self.advanced.set()

    def answer(self, start: int, *, streamed: bool) -> dict[str, Any]:
        """Tokens from `start` on; a stream names reason and versions with its last tokens only."""
        is_last = self.finish_reason is not None
        content = [
            {"token_id": token, "logprob": logprob, "rank": 1}
            for token, logprob in zip(self.token_ids[start:], self.logprobs[start:], strict=True)
        ]
        return {
            "index": self.index,
            "logprobs": {"content": content},
            "finish_reason": self.finish_reason,
            "stop_reason": self.token_ids[-1] if self.finish_reason == "stop" else None,
            "token_ids": self.token_ids[start:],
            "weight_versions": self.spans if is_last or not streamed else None,
        }


class RefusedRequest(Exception):
    """The client's mistake: 400."""


class Engine:
    """The server's state. `served` hears every change of the version that sampled a token. `device` is what a server
    that sleeps has left."""

    def __init__(self, table: Table, *, max_model_len: int, served=lambda version: None, device: Device | None = None):
        self.table, self._max_model_len, self._served = table, max_model_len, served
        self._device, self._asleep = device, set()  # of vLLM's tags, what is not on the device
        self.label, self._last_served = "default", "default"
        self._received: Table | None = None
        self._holds = self._mark = ""  # which weights exactly, and which are on their way
        self._is_updating = self.is_paused = False
        self.running: list[Choice] = []
        self._may_run = asyncio.Event()
        self.sampled_tokens = self.prompt_tokens = 0
        self.met: list[dict[str, Any]] = []  # whoever sends

    async def run(self) -> None:
        """Continuous batching: one token of every running request per step."""
        while True:
            await self._may_run.wait()
            self.step()
            self._look()
            await asyncio.sleep(STEP_S)

    def step(self) -> None:
        if self.running and self.label != self._last_served:
            self._last_served = self.label
            self._served(self.label)
        for choice in self.running:
            choice.advance(self.table, self.label)
        self.sampled_tokens += len(self.running)
        self.running = [choice for choice in self.running if choice.finish_reason is None]

    def _look(self) -> None:
        may_run = self.running and not self.is_paused and not self._asleep
        (self._may_run.set if may_run else self._may_run.clear)()

    # --- requests

    def begin(self, body: dict[str, Any]) -> list[Choice]:
        sampling, token_ids = body["sampling_params"], body["token_ids"]
        if len(token_ids) + 1 > self._max_model_len:
            raise RefusedRequest(
                f"The decoder prompt (length {len(token_ids)}) is longer than the maximum model length of "
                f"{self._max_model_len}. Make sure that `max_model_len` is no smaller than the number of text tokens."
            )
        room = self._max_model_len - len(token_ids)
        sampling = {**sampling, "max_tokens": min(sampling["max_tokens"], room)}
        seed = sampling.get("seed")
        choices = [
            Choice(i, token_ids[-1], sampling, np.random.default_rng(None if seed is None else seed + i))
            for i in range(sampling.get("n", 1))
        ]
        self.prompt_tokens += len(token_ids)
        self.running += choices
        self._look()
        return choices

    def drop(self, choices: list[Choice]) -> None:
        """Whoever asked is gone."""
        self.running = [running for running in self.running if all(running is not choice for choice in choices)]
        self._look()

    async def whole(self, body: dict[str, Any], request: Request) -> dict[str, Any]:
        choices = self.begin(body)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            while any(choice.finish_reason is None for choice in choices) and not gone.done():
                waiting = next(choice for choice in choices if choice.finish_reason is None)
                waiting.advanced.clear()
                advanced = asyncio.ensure_future(waiting.advanced.wait())
                await asyncio.wait([advanced, gone], return_when=asyncio.FIRST_COMPLETED)
                advanced.cancel()
        finally:
            gone.cancel()
            self.drop(choices)
        return {
            "request_id": body.get("request_id"),
            "choices": [choice.answer(0, streamed=False) for choice in choices],
            "prompt_logprobs": self.scored(body),
            "kv_transfer_params": None,
        }

    def scored(self, body: dict[str, Any]) -> list[dict[str, Any] | None] | None:
        if "prompt_logprobs" not in body["sampling_params"]:
            return None
        ids = body["token_ids"]
        entries = zip(ids[1:], self.table.score(ids), strict=True)
        return [None, *({str(t): {"logprob": p, "rank": 1, "decoded_token": None}} for t, p in entries)]

    async def chunks(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """The first token alone, then `stream_interval` at a time."""
        [choice], sent, reason, interval = self.begin(body), 0, None, body["sampling_params"]["stream_interval"]
        try:
            while reason is None:
                fresh = len(choice.token_ids) - sent
                if choice.finish_reason is None and fresh < (interval if sent else 1):
                    choice.advanced.clear()
                    await choice.advanced.wait()
                    continue
                answer = choice.answer(sent, streamed=True)
                sent, reason = len(choice.token_ids), choice.finish_reason  # of now: both go on while this is sent
                yield self.event({"request_id": body.get("request_id"), "choices": [answer]})
            yield b"data: [DONE]\n\n"
        finally:
            self.drop([choice])

    def event(self, content: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(content).encode() + b"\n\n"

    # --- weights

    def pause(self, is_paused: bool) -> None:
        self.is_paused = is_paused
        self._look()

    def sleep(self, level: int) -> None:
        """Running requests are aborted. Of level 2 the weights come back as whatever was in that memory."""
        for choice in self.running:
            choice.finish_reason = "abort"
            choice.advanced.set()
        self.running, self.is_paused = [], True
        if level and "weights" not in self._asleep:
            self._asleep |= SLEEP_TAGS
            self.table = Table.random(len(self.table.tensors["bias"]), seed=99) if level == 2 else self.table
            if self._device is not None:
                self._device.leave()
        self._look()

    def wake_up(self, tags: list[str]) -> bool:
        """Whether all is awake; then it goes on by itself."""
        if self._device is not None and "weights" in self._asleep and (not tags or "weights" in tags):
            self._device.enter()
        self._asleep -= set(tags) or SLEEP_TAGS
        self.is_paused = self.is_paused and bool(self._asleep)
        self._look()
        return not self._asleep

    @property
    def is_sleeping(self) -> bool:
        return self.is_paused or bool(self._asleep)

    def start_update(self) -> None:
        if self._is_updating:
            raise InfrastructureError("start_weight_update called while a weight update is already active")
        self._is_updating, self._received = True, None

    def update(self, directory: str, version: int, base: str = "") -> None:
        """One that fails ends the update. `base`: what it must hold, where only changes are sent."""
        if not self._is_updating:
            raise InfrastructureError("start_weight_update must be called before update_weights")
        try:
            if self._received is not None:
                raise InfrastructureError("an update is one start, one whole version, one finish; start a new update")
            if base and base != self._holds:
                raise InfrastructureError(
                    f"changes from {base} were sent, but the engine holds {self._holds or 'none'}"
                )
            self._received = read(Path(directory), version)
            self._mark = read_manifest(Path(directory)).mark
        except InfrastructureError:
            self._is_updating = False
            raise

    def finish(self, label: str | None) -> None:
        if self._received is None:
            raise InfrastructureError("the update was finished before a version had been loaded")
        self.take(self._received)
        self._holds = self._mark
        self._is_updating, self._received = False, None
        self.label = label or self.label

    def take(self, table: Table) -> None:
        """From here on it samples from these weights."""
        self.table = table

    def metrics(self) -> str:
        values = {
            "num_requests_running": len(self.running),
            "num_requests_waiting": 0,
            "kv_cache_usage_perc": min(len(self.running) / 256, 1.0),
            "num_preemptions_total": 0,
            "prompt_tokens_total": self.prompt_tokens,
            "generation_tokens_total": self.sampled_tokens,
        }
        return "".join(f'vllm:{name}{{engine="0",model_name="table"}} {float(v)}\n' for name, v in values.items())


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def application(engine: Engine) -> Starlette:
    """vLLM's routes."""

    async def generate(request: Request) -> Response:
        body = await request.json()
        if body.get("stream"):
            return StreamingResponse(engine.chunks(body), media_type="text/event-stream")
        return JSONResponse(await engine.whole(body, request))

    async def health(_: Request) -> Response:
        return Response()

    async def pause(_: Request) -> Response:
        engine.pause(True)
        return JSONResponse({"status": "paused"})

    async def resume(_: Request) -> Response:
        engine.pause(False)
        return JSONResponse({"status": "resumed"})

    async def start(_: Request) -> Response:
        engine.start_update()
        return JSONResponse({"message": "Weight update started"})

    async def update(request: Request) -> Response:
        info = (await request.json())["update_info"]
        engine.update(info["directory"], info["version"], info.get("base", ""))
        return JSONResponse({"message": "Weights updated"})

    async def finish(request: Request) -> Response:
        engine.finish((await request.json())["weight_version"])
        return JSONResponse({"message": "Weight update finished"})

    async def relabel(request: Request) -> Response:
        engine.label = (await request.json())["new_version"]
        return JSONResponse({"success": True, "new_version": engine.label})

    async def info(_: Request) -> Response:
        return JSONResponse({"weight_version": engine.label})

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(engine.metrics())

    posts = {
        "/inference/v1/generate": generate,
        "/pause": pause,
        "/resume": resume,
        "/start_weight_update": start,
        "/update_weights": update,
        "/finish_weight_update": finish,
        "/update_weight_version": relabel,
    }
    gets = {"/health": health, "/weight_info": info, "/metrics": metrics}
    routes = [Route(path, answer, methods=["POST"]) for path, answer in posts.items()]
    routes += [Route(path, answer, methods=["GET"]) for path, answer in gets.items()]
    routes += _seldom_asked(engine)
    return Starlette(routes=routes, exception_handlers={RefusedRequest: _refused, InfrastructureError: _failed})


def _seldom_asked(engine: Engine) -> list[Route]:
    """For turns, and for versions that are sent."""

    async def meet(request: Request) -> Response:
        engine.met.append((await request.json())["init_info"])
        return JSONResponse({"message": "Weight transfer initialized"})

    async def sleep(request: Request) -> Response:
        level = int(request.query_params.get("level", "1"))
        engine.sleep(level)
        return JSONResponse({"status": "sleeping", "level": level})

    async def wake_up(request: Request) -> Response:
        tags = request.query_params.getlist("tags")
        status = "awake" if engine.wake_up(tags) else "sleeping"
        return JSONResponse({"status": status, "tags": tags or None})

    async def is_sleeping(_: Request) -> Response:
        return JSONResponse({"is_sleeping": engine.is_sleeping})

    return [
        Route("/init_weight_transfer_engine", meet, methods=["POST"]),
        Route("/sleep", sleep, methods=["POST"]),
        Route("/wake_up", wake_up, methods=["POST"]),
        Route("/is_sleeping", is_sleeping, methods=["GET"]),
    ]


async def _refused(_: Request, error: Exception) -> Response:
    return _error(400, "BadRequestError", str(error))


async def _failed(_: Request, error: Exception) -> Response:
    return _error(500, "InternalServerError", str(error))


def _error(status: int, kind: str, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def server_of(engine: Engine, host: str, port: int) -> uvicorn.Server:
    """To be served; `should_exit` ends it."""
    settings = uvicorn.Config(application(engine), host=host, port=port, log_level="warning", timeout_keep_alive=5)
    settings.timeout_graceful_shutdown = 1
    return uvicorn.Server(settings)


async def serve(engine: Engine, server: uvicorn.Server) -> None:
    stepping = asyncio.create_task(engine.run())
    try:
        await server.serve()
    finally:
        stepping.cancel()


def main() -> int:
    die_with_parent(os.getppid())
    config = read_resolved(sys.argv[1])
    name = f"engine-{os.environ['PALESTRA_INDEX']}"
    url = urlsplit(RunDir(config.run_dir).read_attempt().engines[int(os.environ["PALESTRA_INDEX"])])
    wait_for_turn(sys.argv[1])
    witness, device = Witness(faults_directory()), None
    if config.takes_turns:
        device = Device(witness, name)
        device.enter()
    engine = Engine(
        Table.load(Path(config.model_dir) / FILE),
        max_model_len=config.engine.max_model_len,
        served=lambda version: witness.served(name, version),
        device=device,
    )
    host, port = url.hostname or "", url.port or 0
    witness.listening(host, port)
    asyncio.run(serve(engine, server_of(engine, host, port)))
    return 0
