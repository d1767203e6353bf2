"""`palestra serve proxy`: a policy behind the APIs that agent programs speak, with everything recorded that is asked.

Consumes: requests; every key is a session of its own. Produces: a JSON line per session, a rollout's record with the
exact tokens of all it asked. Waits for: the engine, `engine.call_s` for the next token. Ends when: it is told to; a
session is written when it asked nothing for `idle_s`, or at the end.
"""

import asyncio
import itertools
import secrets
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from palestra.config import RunConfig
from palestra.core.errors import InfrastructureError, UserError
from palestra.core.files import AppendFile
from palestra.core.records import Ending, Reply, RolloutRecord, Sampling, Seat, Task
from palestra.env.agent import Agent, Limits, Table
from palestra.env.chat import ChatTokenizer, Conversation, load_tokenizer
from palestra.env.proxy import Proxy, Session
from palestra.env.voice import PolicyVoice
from palestra.model.files import tokenizer_directory
from palestra.orchestrate.sources import seed_for
from palestra.wire.draft import Draft
from palestra.wire.policy import EngineClient
from palestra.wire.runlog import cut_torn_line


@dataclass
class Visit:
    """One session of a program."""

    number: int
    agent: Agent
    session: Session
    began_at: float
    asked_at: float = field(default_factory=time.monotonic)


class Recorder:
    """Sessions by the keys that programs present, whatever these are."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: ChatTokenizer,
        config: RunConfig,
        to: AppendFile,
        forget: Callable[[str], None] = lambda key: None,
    ):
        """`forget` hears of keys whose sessions ended."""
        self._client, self._tokenizer, self._config, self._to = client, tokenizer, config, to
        self.forget = forget
        self._visits: dict[int, Visit] = {}
        self._number, self._seed = 0, secrets.randbits(30)

    def meet(self, key: str, url: str) -> Session:
        """The session of a key that was not seen before, or not for long."""
        number, self._number = self._number, self._number + 1
        engine, sampling = self._config.engine, self._config.sampling
        asked = Sampling(
            temperature=sampling.temperature, max_tokens=sampling.max_tokens, stop_token_ids=self._tokenizer.stop_ids
        )
        calls = itertools.count()

        async def call(token_ids: list[int], sampling: Sampling) -> Reply:
            seed, draft = seed_for(self._seed, number, next(calls)), Draft(lambda: self._client.serving)
            try:
                return await self._client.stream(token_ids, sampling, seed=seed, silence_s=engine.call_s, draft=draft)
            finally:
                visit.asked_at = time.monotonic()

        voice = PolicyVoice(Conversation(self._tokenizer), call, asked, max_model_len=engine.max_model_len)
        agent = Agent("agent", voice, Table(Limits(), seed=number, is_rollout=False))
        visit = Visit(number, agent, Session(agent, url, key=key, left=self.forget), time.time())
        self._visits[number] = visit
        return visit.session

    async def write_idle(self, idle_s: float) -> None:
        """Write and forget the sessions that asked nothing for so long."""
        now = time.monotonic()
        for visit in list(self._visits.values()):
            if not visit.session.is_asked and now - visit.asked_at >= idle_s:
                try:
                    await self._write(visit)
                except InfrastructureError as error:
                    print(f"session {visit.number} is tried again later: {error}", file=sys.stderr, flush=True)

    async def write_all(self) -> None:
        """Errors: InfrastructureError, if some cannot be written; all others are."""
        failures: list[InfrastructureError] = []
        for visit in list(self._visits.values()):
            try:
                await self._write(visit)
            except InfrastructureError as error:
                failures.append(error)
        if failures:
            raise InfrastructureError(f"{len(failures)} sessions are lost: {failures[0]}") from failures[0]

    async def _write(self, visit: Visit) -> None:
        """It ends; until it is written it is kept. Errors: InfrastructureError."""
        await visit.session.close()
        record = _record(visit)
        if record.seats[0].samples:
            self._to.append(msgspec.json.encode(record) + b"\n")
        del self._visits[visit.number]


def _record(visit: Visit) -> RolloutRecord:
    shown = visit.agent.shown
    return RolloutRecord(
        rollout_id=visit.number,
        environment="proxy",
        task=Task(key=f"session-{visit.number}"),
        ending=Ending.OK,
        seats=(Seat(samples=visit.agent.samples),),
        messages=shown.messages,
        tools=shown.schemas,
        num_turns=shown.num_turns,
        num_tokens=visit.agent.num_said,
        wall_s=time.time() - visit.began_at,
        ended_at=time.time(),
    )


def serve(engine_url: str, config: RunConfig, *, port: int, to: Path, idle_s: float) -> None:
    """Until it is told to end. Errors: UserError, if no engine answers."""
    asyncio.run(_serve(engine_url, config, port=port, to=to, idle_s=idle_s))


async def _serve(engine_url: str, config: RunConfig, *, port: int, to: Path, idle_s: float) -> None:
    told_to_end, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told_to_end.set)
    with closing(_opened(to)) as file:
        async with EngineClient(engine_url, call_s=config.engine.call_s) as client:
            await _require_engine(client)
            recorder = Recorder(client, load_tokenizer(tokenizer_directory(config.model_dir)), config, file)
            proxy = Proxy(config.launch.host, port=port, meet=recorder.meet)
            recorder.forget = proxy.forget
            print(f"{proxy.open()} answers; sessions go to {to}", file=sys.stderr, flush=True)
            try:
                while not told_to_end.is_set():
                    try:
                        await asyncio.wait_for(told_to_end.wait(), timeout=min(idle_s, 60.0))
                    except TimeoutError:
                        await recorder.write_idle(idle_s)
            finally:
                await proxy.close()
                await recorder.write_all()


async def _require_engine(client: EngineClient) -> None:
    """It answers, and its tokens have a version. Errors: UserError."""
    if not await client.is_healthy():
        raise UserError(f"no engine answers at {client.url}; start one by `palestra serve engine MODEL`")
    if await client.version() is None:  # an engine that nobody publishes to
        await client.label(0)
    client.serving = await client.version()


def _opened(to: Path) -> AppendFile:
    """Errors: UserError."""
    try:
        cut_torn_line(to)
        return AppendFile(to)
    except OSError as error:
        raise UserError(f"--to={to} cannot be written: {error.strerror}; name another file") from error
