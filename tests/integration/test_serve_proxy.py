"""`palestra serve proxy`, a process of its own before an engine: what programs ask is recorded as it was sampled."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest

from palestra.core.deadline import within
from palestra.core.records import Reply, RolloutRecord, Span
from palestra.env.chat import ChatTokenizer, load_tokenizer
from palestra.wire.policy import EngineClient
from palestra.wire.runlog import read_rows
from tests.fault import replaying_engine
from tests.fault.replaying_engine import serve, server_of
from tests.fault.table import Table
from tests.integration.engines import free_port, python_module
from tests.templates.families import FAMILIES, build_family
from tests.unit.env.programs import Engine, require_exact, require_exact_and_no_other
from tests.unit.env.test_proxy import CLIENTS, SAID, SYSTEM

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

WAIT_S = 60.0
SETTINGS = ("sampling.max_tokens=500", "engine.max_model_len=4000")


class Line(Table):
    """The next token is that of a given text. Of all lines no two tokens have one log-probability."""

    def __init__(self, token_ids: Iterable[int], first: int):
        super().__init__({})
        self._said = iter([(token, -float(first + place)) for place, token in enumerate(token_ids)])

    def sample(self, before: int, temperature: float, chance: float) -> tuple[int, float]:
        return next(self._said)


class ScriptedEngine(replaying_engine.Engine):
    """vLLM's protocol, with a version of its own for every reply of `calls`: prompts, and what was said to them."""

    def __init__(self, tokenizer: ChatTokenizer, texts: Iterable[str]):
        super().__init__(Line((), 0), max_model_len=4000)
        self._tokenizer, self._texts, self._first = tokenizer, iter(texts), 1
        self.calls: list[tuple[list[int], replaying_engine.Choice]] = []
        self.is_asked = asyncio.Event()

    def begin(self, body):
        token_ids = [*self._tokenizer.encode(next(self._texts)), self._tokenizer.eos_id]
        self.table, self.label = Line(token_ids, self._first), str(len(self.calls))
        self._first += len(token_ids)
        choices = super().begin(body)
        self.calls.append((body["token_ids"], choices[0]))
        self.is_asked.set()
        return choices

    def heard(self) -> Engine:
        """What it was asked and what it said since the last time."""
        calls, self.calls = self.calls, []
        known = Engine(self._tokenizer, ())
        for prompt, choice in calls:
            spans = tuple(Span(int(span["version"]), span["start"], span["end"]) for span in choice.spans)
            reason = choice.finish_reason or "abort"
            known.asked.append(prompt)
            known.replies.append(
                Reply(token_ids=choice.token_ids, logprobs=choice.logprobs, spans=spans, finish_reason=reason)
            )
        return known


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Tokenizer and template; nobody reads the weights."""
    directory = build_family(tmp_path_factory.mktemp("qwen3"), FAMILIES["qwen3"])
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").touch()
    return directory


@asynccontextmanager
async def serving(engine: ScriptedEngine) -> AsyncIterator[str]:
    """Its address."""
    port = free_port()
    server = server_of(engine, "127.0.0.1", port)
    running = asyncio.create_task(serve(engine, server))
    try:
        async with EngineClient(f"http://127.0.0.1:{port}") as client:
            await client.wait_healthy(WAIT_S)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await within(WAIT_S, running, waiting_for="the engine to end")


@asynccontextmanager
async def proxy(model: Path, engine_url: str, to: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The process and its address."""
    words = ["serve", "proxy", str(model), *SETTINGS, "--engine", engine_url, "--port", "0", "--to", str(to)]
    process = await asyncio.create_subprocess_exec(
        *python_module("palestra.launch.cli", *words), stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        line = (await within(WAIT_S, process.stderr.readline(), waiting_for="the proxy to answer")).decode()
        assert line.endswith(f" answers; sessions go to {to}\n"), line + (await process.stderr.read()).decode()
        yield process, line.split()[0]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def ended(process: asyncio.subprocess.Process) -> int:
    process.send_signal(signal.SIGTERM)
    return await within(WAIT_S, process.wait(), waiting_for="the proxy to end")


async def test_every_key_is_a_session_and_what_it_asked_is_recorded_as_it_was_sampled(model, tmp_path):
    engine = ScriptedEngine(load_tokenizer(model), list(SAID) * 6)
    known: list[Engine] = []
    async with (
        serving(engine) as engine_url,
        proxy(model, engine_url, tmp_path / "new" / "out.jsonl") as (process, url),
    ):
        for number, (name, stream) in enumerate(product(CLIENTS, (False, True))):
            program = SimpleNamespace(url=url, key=f"key-{number}")
            assert await CLIENTS[name](program, stream=stream) == "It is 20."
            known.append(engine.heard())
        assert await ended(process) == 0
    records = read_rows(tmp_path / "new" / "out.jsonl", RolloutRecord)
    assert [record.rollout_id for record in records] == list(range(6))
    for record, said in zip(records, known, strict=True):
        assert (len(said.replies), record.num_turns, len(record.seats[0].samples)) == (3, 3, 1)
        assert SYSTEM in said.prompts[0]
        require_exact_and_no_other(record, said)
    assert "key-" not in (tmp_path / "new" / "out.jsonl").read_text()


async def test_what_was_said_before_it_is_told_to_end_is_recorded_and_what_is_on_its_way_is_not(model, tmp_path):
    engine = ScriptedEngine(load_tokenizer(model), ["one", "two"])
    (to := tmp_path / "out.jsonl").write_text('{"half of a')
    async with serving(engine) as engine_url, proxy(model, engine_url, to) as (process, url):
        async with openai.AsyncOpenAI(base_url=url, api_key="k") as client:
            messages = [{"role": "user", "content": "a"}]
            first = await client.chat.completions.create(model="m", messages=messages)
            messages += [{"role": "assistant", "content": first.choices[0].message.content}]
            messages += [{"role": "user", "content": "b"}]
            engine.pause(True)
            engine.is_asked.clear()
            second = asyncio.ensure_future(client.chat.completions.create(model="m", messages=messages))
            await within(WAIT_S, engine.is_asked.wait(), waiting_for="the second call")
            assert await ended(process) == 0
            with pytest.raises(openai.AuthenticationError, match="says nothing more"):
                await within(WAIT_S, second, waiting_for="the second call to be given up")
    [record] = read_rows(to, RolloutRecord)
    said = engine.heard()
    del said.asked[1:], said.replies[1:]
    require_exact(record, said)
