"""`python -m palestra.launch.bench.lead CONFIG_JSON [IN_FLIGHT:FIRST:END:CORES ...] [only]`: the bare client first.

Consumes: the run's own tasks, lengths and seeds. Produces: alone.json in the run directory, an `Alone` per measurement.
Waits for: healthy engines, and their replies. Ends when: all is measured; it then becomes the orchestrator, so that the
loop is measured on the very engines that the bare client was. With `only` nothing follows.
"""

import asyncio
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

import msgspec

from palestra.config import RunConfig, read_resolved
from palestra.core.files import write_atomically
from palestra.core.process import die_with_parent, life
from palestra.env.agent import Agent, Limits, Table
from palestra.env.chat import ChatTokenizer, Conversation, load_tokenizer
from palestra.env.voice import ScriptVoice
from palestra.env.worker import Stage, set_stages
from palestra.launch.bench.bare import Alone, Ask, BareClient
from palestra.launch.bench.environment import ForcedLengths
from palestra.launch.bench.neutral import neutral_load
from palestra.orchestrate.sources import TaskSources, seed_for
from palestra.wire.channel import BlockingCaller
from palestra.wire.messages import Done, Tasks, ToOrchestrator, ToSupervisor
from palestra.wire.policy import EngineClient
from palestra.wire.rundir import RunDir

ALONE = "alone.json"
ONLY, NAME = "only", "orchestrator"
_AFTER_START_S = 3.0  # the run's other processes have done their imports by then, on few cores


@dataclass(frozen=True)
class Pass:
    """One measurement of the engines alone: the run's groups [first, end), `in_flight` replies at once, beside a
    neutral load on `cores`."""

    in_flight: int
    first: int
    end: int
    cores: int = 0

    @property
    def word(self) -> str:
        return f"{self.in_flight}:{self.first}:{self.end}:{self.cores}"


async def asks_of(config: RunConfig, tokenizer: ChatTokenizer, num_groups: int) -> list[Ask]:
    """What the run's first groups will ask the engines for."""
    stages, seed, asks = set_stages(config), config.train.seed, []

    async def list_tasks(label: str, epoch: int, offset: int, count: int) -> Tasks:
        tasks, exhausted = stages[label].tasks.take(epoch, offset, count)
        return Tasks(request_id=0, tasks=tasks, exhausted=exhausted, has_group_rewards=False)

    sources = TaskSources(config.env.mix, list_tasks, seed=seed, chunk_tasks=config.env.chunk_tasks)
    for group in range(num_groups):
        label, task, _ = await sources.next(group)
        conversation = Conversation(tokenizer)
        conversation.start([{"role": "user", "content": task.prompt}])
        for member in range(config.algo.group_size):
            chance = _chance(seed_for(seed, "play", group * config.algo.group_size + member))
            ask = Ask(
                token_ids=conversation.prompt_ids,
                num_tokens=_law(stages[label]).draw(chance),
                seed=seed_for(seed, group, 0) + member,
                temperature=config.sampling.temperature,
            )
            asks.append(ask)
    return asks


def _chance(seed: int) -> Random:
    """The rollout's own."""
    return Agent("agent", ScriptVoice([]), Table(Limits(), seed=seed)).random


def _law(stage: Stage):
    assert isinstance(stage.environment, ForcedLengths)
    return stage.environment.law


def read_alone(run: RunDir) -> list[Alone]:
    return msgspec.json.decode((run.path / ALONE).read_bytes(), type=list[Alone])


async def _measure(config: RunConfig, run: RunDir, wanted: list[Pass]) -> list[Alone]:
    urls = run.read_attempt().engines
    for url in urls:
        async with EngineClient(url) as client:
            await client.wait_healthy(config.engine.healthy_s)
    await asyncio.sleep(_AFTER_START_S)
    asks = await asks_of(config, load_tokenizer(config.model_dir), max(part.end for part in wanted))
    bare = BareClient(urls, call_s=config.engine.call_s)
    try:
        await bare.measure(asks[:8], in_flight=8)  # what a first request sets up
        return [await _pass(bare, asks, part, group_size=config.algo.group_size) for part in wanted]
    finally:
        await bare.close()


async def _pass(bare: BareClient, asks: list[Ask], part: Pass, *, group_size: int) -> Alone:
    with neutral_load(part.cores):
        return await bare.measure(asks[part.first * group_size : part.end * group_size], in_flight=part.in_flight)


def _say_done(run: RunDir) -> None:
    attempt = run.read_attempt()
    supervisor: BlockingCaller[ToOrchestrator, ToSupervisor] = BlockingCaller(
        attempt.supervisor, name=NAME, attempt=attempt.number, receives=ToOrchestrator, life=life()
    )
    supervisor.send(Done(process=NAME))
    supervisor.close()


def main(words: list[str]) -> None:
    die_with_parent(os.getppid())
    config_path, is_all = Path(words[0]), words[-1] == ONLY
    wanted = [Pass(*map(int, word.split(":"))) for word in words[1:] if word != ONLY]
    config, run = read_resolved(config_path), RunDir(config_path.parent)
    if wanted and (is_all or life() == 0):  # an orchestrator that is started again goes on with the run
        alone = asyncio.run(_measure(config, run, wanted))
        write_atomically(run.path / ALONE, msgspec.json.encode(alone))
    if is_all:
        _say_done(run)
        return
    os.execv(sys.executable, [sys.executable, "-m", "palestra.orchestrate", str(config_path)])


if __name__ == "__main__":
    main(sys.argv[1:])
