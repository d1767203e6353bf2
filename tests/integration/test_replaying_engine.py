"""The replaying engine of the fault suite, held to the real one: the same exchange, the same shapes of answers."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from palestra.wire.policy import parse_metrics, read_events
from tests.fault import table
from tests.fault.replaying_engine import Engine, serve, server_of
from tests.fault.table import Table
from tests.integration.engines import HEALTHY_S, TinyTrainer, free_port
from tests.integration.engines import Engine as Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = [3 + (5 * position) % 27 for position in range(12)]
GENERATE = "/inference/v1/generate"
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "logprobs": 0, "detokenize": False, "seed": 5}
TRIES = 5
LONG = 480  # tokens of a reply that is still on its way when the engine is paused


@dataclass
class Talk:
    """One exchange with one server, and what was answered. `stage` lays a version ready: its directory and number."""

    http: httpx.AsyncClient
    stage: Callable[[], tuple[str, int]]
    shapes: dict[str, Any] = field(default_factory=dict)

    async def ask(self, name: str, path: str, body: Any = None, *, method: str = "POST", **more: Any) -> httpx.Response:
        response = await self.http.request(method, path, json=body, **more)
        is_json = response.headers.get("content-type", "").startswith("application/json")
        self.shapes[name] = (response.status_code, shape(response.json()) if is_json else "no JSON")
        return response

    async def publish(self, name: str) -> str:
        """Between pause and resume; the label from then on."""
        directory, version = self.stage()
        await self.ask(f"{name}: start", "/start_weight_update")
        info = {"update_info": {"directory": directory, "version": version}}
        await self.ask(f"{name}: update", "/update_weights", info)
        await self.ask(f"{name}: finish", "/finish_weight_update", {"weight_version": str(version)})
        return str(version)

    async def pause(self, clear_cache: str = "false") -> None:
        await self.ask("pause", "/pause", params={"mode": "keep", "clear_cache": clear_cache})


def shape(value: Any) -> Any:
    """Types in the place of values; a list is what its items have in common."""
    match value:
        case dict():
            return {key: shape(item) for key, item in sorted(value.items())}
        case list():
            kinds = {json.dumps(shape(item)): shape(item) for item in value}
            return [kinds[key] for key in sorted(kinds)]
        case _:
            return type(value).__name__


def known(answer: Any, expected: Any) -> Any:
    """Of the real engine's answer what the replaying one has, too: it may leave out what nobody reads."""
    if isinstance(answer, dict) and isinstance(expected, dict):
        return {key: known(answer[key], value) if key in answer else "missing" for key, value in expected.items()}
    if isinstance(answer, list | tuple) and isinstance(expected, list | tuple) and len(answer) == len(expected):
        return type(answer)(known(one, other) for one, other in zip(answer, expected, strict=True))
    return answer


def body(max_tokens: int, *, stream: bool = False, prompt: list[int] = PROMPT, **sampling: Any) -> dict[str, Any]:
    parameters = {**SAMPLING, "max_tokens": max_tokens, **({"stream_interval": 16} if stream else {"n": 1}), **sampling}
    return {"request_id": "r", "token_ids": prompt, "sampling_params": parameters, "stream": stream}


async def exchange(talk: Talk) -> dict[str, Any]:
    """Everything that a run asks of an engine; facts that both engines must share are among the shapes."""
    before = parse_metrics((await talk.ask("metrics", "/metrics", method="GET")).text)
    await talk.pause()
    version = await talk.publish("publish")
    await talk.ask("resume", "/resume")
    await talk.ask("health", "/health", method="GET")
    await talk.ask("info", "/weight_info", method="GET")
    await talk.ask("relabel", "/update_weight_version", {"new_version": version})
    await replies(talk, version)
    await streams(talk, version)
    await over_a_pause(talk, version)
    await asleep(talk)
    await errors(talk)
    load = parse_metrics((await talk.ask("metrics", "/metrics", method="GET")).text)
    preemptions, sampled = load.preemptions - before.preemptions, load.sampled_tokens - before.sampled_tokens
    talk.shapes["load"] = (load.running, load.waiting, preemptions, sampled > LONG)
    return talk.shapes


async def replies(talk: Talk, version: str) -> None:
    joined = (await talk.ask("joined", GENERATE, body(8, n=3))).json()["choices"]
    alone = (await talk.ask("alone", GENERATE, body(8, seed=SAMPLING["seed"] + 1))).json()["choices"]
    by_index = {choice["index"]: choice for choice in joined}
    talk.shapes["seeds"] = (sorted(by_index), by_index[1]["token_ids"] == alone[0]["token_ids"])
    talk.shapes["spans"] = joined[0]["weight_versions"] == [{"version": version, "start": 0, "end": 8}]
    stops = list(range(3, 20))
    [stopped] = (await talk.ask("stopped", GENERATE, body(200, stop_token_ids=stops))).json()["choices"]
    talk.shapes["stop"] = (stopped["finish_reason"], stopped["token_ids"][-1] in stops)
    scored = await talk.ask("scored", GENERATE, body(1, prompt_logprobs=0))
    entries = scored.json()["prompt_logprobs"]
    with_ids = all(str(token) in entry for token, entry in zip(PROMPT[1:], entries[1:], strict=True))
    talk.shapes["scored"] = (scored.status_code, entries[0], with_ids, sorted(next(iter(entries[1].values()))))


async def streams(talk: Talk, version: str) -> None:
    """Tokens per chunk; reason and versions with the last one only."""
    choices = await unmerged(talk)
    talk.shapes["first chunk"], talk.shapes["last chunk"] = shape(choices[0]), shape(choices[-1])
    talk.shapes["chunks"] = (
        len(choices[0]["token_ids"]),
        sum(len(choice["token_ids"]) for choice in choices),
        max(len(choice["token_ids"]) for choice in choices) <= 16,
        [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
        [choice["weight_versions"] for choice in choices[:-1] if choice["weight_versions"]],
        choices[-1]["weight_versions"] == [{"version": version, "start": 0, "end": 40}],
    )


async def unmerged(talk: Talk) -> list[dict[str, Any]]:
    """The chunks of one reply. A server that falls behind sends some as one; then another reply is asked for."""
    for _ in range(TRIES):
        chunks = [event async for event in streamed(talk, body(40, stream=True))]
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        if list(accumulate(len(choice["token_ids"]) for choice in choices)) == [1, 17, 33, 40]:
            break
    return choices


async def streamed(talk: Talk, asked: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with talk.http.stream("POST", GENERATE, json=asked) as response:
        assert response.status_code == 200
        async for event in read_events(response.aiter_bytes()):
            yield json.loads(event)


async def begun(talk: Talk) -> tuple[list[dict[str, Any]], asyncio.Task[None]]:
    """What has come and comes of a long reply, and who reads it."""
    choices, arrived = [], asyncio.Event()

    async def read() -> None:
        async for chunk in streamed(talk, body(LONG, stream=True)):
            choices.extend(chunk["choices"])
            arrived.set()

    reading = asyncio.create_task(read())
    await arrived.wait()
    return choices, reading


async def paused_on_the_way(talk: Talk) -> tuple[list[dict[str, Any]], asyncio.Task[None]]:
    """Where it was through before the engine was paused, another one."""
    for _ in range(TRIES):
        choices, reading = await begun(talk)
        await talk.pause()
        known = 0
        while known < len(choices):  # what was on its way when it paused arrives
            known = len(choices)
            await asyncio.sleep(0.3)
        if not reading.done():
            break
        await talk.ask("resume", "/resume")
    return choices, reading


async def over_a_pause(talk: Talk, version: str) -> None:
    """A request that is on its way freezes, one that comes freezes too; both go on, and name the versions."""
    choices, reading = await paused_on_the_way(talk)
    late = asyncio.create_task(talk.ask("late", GENERATE, body(4)))
    frozen = len(choices)
    newer = await talk.publish("publish in flight")
    await asyncio.sleep(0.3)
    talk.shapes["frozen"] = (len(choices) == frozen, reading.done(), late.done())
    await talk.ask("resume", "/resume")
    await reading
    spans = choices[-1]["weight_versions"]
    named = [span["version"] for span in spans] == [version, newer]
    talk.shapes["over a pause"] = (named, all(a["end"] == b["start"] for a, b in pairwise(spans)), spans[-1]["end"])
    [choice] = (await late).json()["choices"]
    talk.shapes["late spans"] = choice["weight_versions"] == [{"version": newer, "start": 0, "end": 4}]


async def cut_by_sleep(talk: Talk) -> list[dict[str, Any]]:
    """The chunks of a reply that was on its way. Where it was through before, the engine is woken for another one."""
    for _ in range(TRIES):
        cut, reading = await begun(talk)
        await talk.ask("sleep", "/sleep", params={"level": "2", "mode": "abort"})
        await reading
        if cut[-1]["finish_reason"] == "abort":
            break
        await talk.ask("wake weights", "/wake_up", params={"tags": "weights"})
        await talk.publish("publish asleep")
        await talk.ask("wake cache", "/wake_up", params={"tags": "kv_cache"})
        await talk.ask("resume", "/resume")
    return cut


async def asleep(talk: Talk) -> None:
    """What is on its way is aborted; what comes waits until all is awake, and is sampled by what was loaded then."""
    cut = await cut_by_sleep(talk)
    talk.shapes["cut by sleep"] = (cut[-1]["finish_reason"], sum(len(choice["token_ids"]) for choice in cut) < LONG)
    late = asyncio.create_task(talk.ask("asked asleep", GENERATE, body(4)))
    await asyncio.sleep(0.3)
    await talk.ask("is sleeping", "/is_sleeping", method="GET")
    woken = [(await talk.ask("wake weights", "/wake_up", params={"tags": "weights"})).json()]
    newer = await talk.publish("publish asleep")
    talk.shapes["still asleep"] = late.done()
    woken.append((await talk.ask("wake cache", "/wake_up", params={"tags": "kv_cache"})).json())
    [choice] = (await late).json()["choices"]
    talk.shapes["woken"] = woken
    talk.shapes["awake spans"] = choice["weight_versions"] == [{"version": newer, "start": 0, "end": 4}]
    talk.shapes["sleeps no more"] = (await talk.ask("is awake", "/is_sleeping", method="GET")).json()
    await talk.ask("resume", "/resume")


async def errors(talk: Talk) -> None:
    too_long = await talk.ask("too long", GENERATE, body(4, prompt=PROMPT * 100))
    talk.shapes["too long says"] = "longer than the maximum model length" in too_long.json()["error"]["message"]
    await talk.pause()
    await talk.ask("start", "/start_weight_update")
    nowhere = {"update_info": {"directory": "/nowhere", "version": 1}}
    failed = await talk.ask("failed update", "/update_weights", nowhere)
    said = failed.json()["error"]["message"]  # vLLM cuts paths out of it
    talk.shapes["failed update says"] = "cannot be read: No such file or directory; was the version staged?" in said
    await talk.ask("health after an error", "/health", method="GET")
    await talk.publish("publish after an error")
    directory, version = talk.stage()
    whole = {"update_info": {"directory": directory, "version": version}}
    nothing = {"update_info": {"directory": "", "version": -1}}
    await talk.ask("abandoned: none begun", "/update_weights", nothing)
    for begun, infos in {"nothing loaded": [], "all loaded": [whole]}.items():
        await talk.ask(f"abandoned: start, {begun}", "/start_weight_update")
        for info in infos:
            await talk.ask(f"abandoned: {begun}", "/update_weights", info)
        await talk.ask(f"abandoned: start again, {begun}", "/start_weight_update")
        await talk.ask(f"abandoned: end, {begun}", "/update_weights", nothing)
        await talk.publish(f"publish after {begun}")
    await talk.ask("resume", "/resume")
    label = (await talk.ask("info", "/weight_info", method="GET")).json()["weight_version"]
    [choice] = (await talk.ask("alone", GENERATE, body(8))).json()["choices"]
    talk.shapes["after all"] = choice["weight_versions"] == [{"version": label, "start": 0, "end": 8}]


@asynccontextmanager
async def replaying(directory: Path, engine: type[Engine] = Engine) -> AsyncIterator[Talk]:
    served, staged, port = engine(Table.random(30), max_model_len=512), 0, free_port()

    def stage() -> tuple[str, int]:
        nonlocal staged
        staged += 1
        table.stage(Table.random(30, seed=staged), directory / f"v{staged}", staged, 1)
        return str(directory / f"v{staged}"), staged

    server = server_of(served, "127.0.0.1", port)
    serving = asyncio.create_task(serve(served, server))
    try:
        async with caller_of(f"http://127.0.0.1:{port}") as http:
            await healthy(http)
            yield Talk(http, stage)
    finally:
        server.should_exit = True
        await serving


def caller_of(url: str) -> httpx.AsyncClient:
    """A connection for every request: a server hangs up on idle ones when it likes."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, limits=limits)


async def healthy(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(HEALTHY_S):
        while True:
            try:
                if (await http.get("/health")).is_success:
                    return
            except httpx.TransportError:
                await asyncio.sleep(0.1)


async def test_the_replaying_engine_answers_as_the_real_one(
    engine_server: Server, trainer: TinyTrainer, tmp_path: Path
) -> None:
    def stage() -> tuple[str, int]:
        trainer.step()
        staged = trainer.stage()
        return staged.directory, staged.version

    async with replaying(tmp_path) as talk:
        replayed = await exchange(talk)
    async with caller_of(engine_server.url) as http:
        await healthy(http)
        real = await exchange(Talk(http, stage))
    assert real.keys() == replayed.keys()
    answers = {name: known(real[name], expected) for name, expected in replayed.items()}
    assert {name: (answer, replayed[name]) for name, answer in answers.items() if answer != replayed[name]} == {}


class Talkative(Engine):
    """Names its versions in every chunk."""

    def event(self, content: dict[str, Any]) -> bytes:
        for choice in content["choices"]:
            choice["weight_versions"] = [{"version": "1", "start": 0, "end": 1}]
        return super().event(content)


class Restless(Engine):
    """Does not freeze."""

    def pause(self, is_paused: bool) -> None:
        super().pause(False)


@pytest.mark.parametrize(("engine", "seen"), [(Talkative, "chunks"), (Restless, "frozen")])
async def test_an_engine_that_answers_otherwise_is_noticed(tmp_path: Path, engine: type[Engine], seen: str) -> None:
    async with replaying(tmp_path / "true") as talk:
        right = await exchange(talk)
    async with replaying(tmp_path / "false", engine) as talk:
        wrong = await exchange(talk)
    assert known(right[seen], wrong[seen]) != wrong[seen]


async def test_a_stream_tells_what_came_while_a_chunk_was_on_its_way() -> None:
    """Tokens, and the reason of an engine put to sleep: also between a chunk and the next one asked for."""
    engine = Engine(Table.random(30), max_model_len=512)
    stream = engine.chunks(body(LONG, stream=True))
    async with asyncio.timeout(10):
        asking = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        engine.step()
        said = [await asking]
        for _ in range(20):
            engine.step()
        said.append(await anext(stream))
        engine.step()
        engine.sleep(1)
        said += [event async for event in stream]
    *chunks, done = [event.removeprefix(b"data: ") for event in said]
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    told = [(len(choice["token_ids"]), choice["finish_reason"]) for choice in choices]
    assert told == [(1, None), (20, None), (1, "abort")]
    assert choices[-1]["weight_versions"] == [{"version": "default", "start": 0, "end": 22}]
    assert done.strip() == b"[DONE]"


def test_shapes_tell_answers_apart() -> None:
    assert shape({"a": [1, 2], "b": None}) == shape({"b": None, "a": [3]})
    assert shape({"a": [1, "2"]}) != shape({"a": [1]})
    assert known({"a": 1, "more": 2}, {"a": "int"}) == {"a": 1}
    assert known({"more": 2}, {"a": "int"}) == {"a": "missing"}
