"""`palestra bench env`: what a rollout costs beside the model, with an engine that answers at once.

Costs are differences between a longer and a shorter evaluation, so that what happens once is in none of them.

rollouts: single-turn, 1,000 in flight; then the same requests by the bare client   -> cpu_ms_per_rollout, ratio
burn:     a reward that burns 50 ms of CPU in a process aside                       -> p99 of workers' event-loop lag
crowd:    10,000 rollouts in flight at once in one worker, which wait and then speak -> p99 of the same lag
few:      32 single-turn rollouts, from the first one's start to the last one's end -> wall_s_32_single_turn
"""

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from palestra.config import RunConfig, load
from palestra.core.errors import UserError
from palestra.env import Agent, Environment, Rollout, Task, aside, reward
from palestra.env.chat import Conversation, load_tokenizer
from palestra.launch import run as running
from palestra.launch.bench.bare import Ask, BareClient
from palestra.launch.bench.loop import outputs_directory, state_of_machine
from palestra.launch.bench.parts import clear
from palestra.launch.bench.report import say, tell_numbers
from palestra.launch.machine import this_machine
from palestra.launch.plan import make_plan
from palestra.launch.ports import free_ports
from palestra.launch.start import Origin
from palestra.model.files import tokenizer_directory
from palestra.wire.policy import EngineClient
from palestra.wire.results import read_results
from palestra.wire.rundir import RunDir
from palestra.wire.runlog import read_summary

RECIPE = Path(__file__).with_name("env.toml")
IN_FLIGHT = 1000
FEWER, MORE = 1000, 5000  # rollouts of the two evaluations
BURNING, BURN_S = 200, 0.05
CROWD, CROWD_S = 10_000, 30.0  # rollouts, and how long each waits
_START_S = 60.0


class Single(Environment):
    """A letter after the other is asked for; one turn."""

    max_turns = 1

    def tasks(self) -> Iterator[Task]:
        for number in itertools.count():
            letters = Random(f"{self.split} {self.seed} {number}").choices("abcdefghij", k=8)
            yield Task(prompt="".join(letters), key=str(number))

    @reward
    def any(self, task: Task, rollout: Rollout) -> float:
        return float(bool(rollout.reply))


class Burning(Single):
    """Its reward takes CPU, as verifiers do."""

    @reward
    async def any(self, task: Task, rollout: Rollout) -> float:
        return await aside(burn, BURN_S)


def burn(seconds: float) -> float:
    """So much CPU time of its own process."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return 1.0


class Waiting(Single):
    """Each rollout waits for something else than the model, as for a sandbox, before its turn."""

    wait_s: float = CROWD_S

    async def run(self, task: Task, agent: Agent) -> None:
        await asyncio.sleep(self.wait_s)
        await agent(task.prompt)


@dataclass(frozen=True)
class Evaluated:
    """One evaluation that is done. CPU seconds are of the orchestrator and the workers, since they were ready."""

    run: RunDir
    cpu_s: float

    @property
    def wall_s(self) -> float:
        """From the first rollout's start to the last one's end."""
        return max(ended for _, ended in self._spans()) - min(began for began, _ in self._spans())

    @property
    def peak(self) -> int:
        """The most rollouts that were in flight at once."""
        changes = sorted([(at, change) for span in self._spans() for at, change in zip(span, (1, -1), strict=True)])
        return max(itertools.accumulate(change for _, change in changes))

    def _spans(self) -> list[tuple[float, float]]:
        records = [record for of_set in read_results(self.run).values() for record in of_set.values()]
        return [(record.ended_at - record.wall_s, record.ended_at) for record in records]

    @property
    def lag_p99_ms(self) -> float:
        """The worst of all workers and intervals."""
        return max(1000 * span["p99_s"] for span in _loops(self.run) if "p99_s" in span)


def show(overrides: Sequence[str], *, outputs: Path | None, as_json: bool) -> None:
    """Errors: UserError; whatever ends an evaluation."""
    base = load(RECIPE, list(overrides)).config
    if base.engine.replicas != 1:
        raise UserError(f"engine.replicas={base.engine.replicas}; one engine that answers at once is enough here")
    with outputs_directory(outputs) as directory:
        tell_numbers(_measure(base, directory), as_json=as_json)


def _measure(base: RunConfig, outputs: Path) -> dict[str, Any]:
    machine = state_of_machine()
    fewer = _evaluate(base, outputs, "fewer", Single, num_tasks=FEWER, max_in_flight=IN_FLIGHT)
    more = _evaluate(base, outputs, "more", Single, num_tasks=MORE, max_in_flight=IN_FLIGHT)
    burning = _evaluate(base, outputs, "burn", Burning, num_tasks=BURNING, max_in_flight=IN_FLIGHT)
    crowd = _evaluate(base, outputs, "crowd", Waiting, num_tasks=CROWD, max_in_flight=CROWD, args={"wait_s": CROWD_S})
    few = _evaluate(base, outputs, "few", Single, num_tasks=32, max_in_flight=IN_FLIGHT)
    say("palestra bench: the same requests by the bare client")
    bare_s = asyncio.run(_bare(more.run, base))
    ours_s = (more.cpu_s - fewer.cpu_s) / (MORE - FEWER)
    return {
        "cpu_ms_per_rollout": 1000 * ours_s,
        "bare_cpu_ms_per_request": 1000 * bare_s,
        "ratio_to_bare_client": ours_s / bare_s,
        "rollouts_per_s": MORE / more.wall_s,
        "p99_loop_lag_ms": burning.lag_p99_ms,
        "crowd_in_flight": crowd.peak,
        "crowd_p99_loop_lag_ms": crowd.lag_p99_ms,
        "wall_s_32_single_turn": few.wall_s,
        "machine": machine,
    }


def _evaluate(
    base: RunConfig,
    outputs: Path,
    name: str,
    environment: type[Environment],
    *,
    num_tasks: int,
    max_in_flight: int,
    args: dict[str, Any] | None = None,
) -> Evaluated:
    say(f"palestra bench: {name}, {num_tasks} rollouts")
    tree = base.model_dump(mode="json")
    tree["log"] |= {"name": name, "outputs": str(outputs)}
    tree["engine"]["max_in_flight"] = max_in_flight
    id = f"{__name__}:{environment.__name__}"
    one = {"id": id, "name": "measured", "num_tasks": num_tasks, "temperature": 1.0, "args": args or {}}
    config = RunConfig.model_validate(tree | {"eval": {"sets": [one]}})
    run = RunDir(config.run_dir)
    clear(run)
    plan = make_plan(config, this_machine())
    ports = free_ports(config.launch.host, len(plan.engines))
    config = config.model_copy(update={"launch": config.launch.model_copy(update={"engine_port": ports[0]})})
    engine = replace(plan.engines[0], argv=_instant(ports[0]))
    programs = tuple(engine if program.engine is not None else program for program in plan.programs)
    running.carry_out(config, replace(plan, programs=programs), Origin(1, None))
    workers = {span["process"]: span["cpu_s"] for span in _loops(run)}  # the last word of each
    return Evaluated(run, (read_summary(run) or {})["cpu_s"] + sum(workers.values()))


def _instant(port: int) -> tuple[str, ...]:
    return (sys.executable, "-m", "palestra.launch.bench.instant", str(port), *map(str, (5, 6, 7, 8, 5, 6, 7, 2)))


async def _bare(run: RunDir, config: RunConfig) -> float:
    """CPU seconds of a request for what the rollouts of `run` asked for, as few as there can be."""
    tokenizer = load_tokenizer(tokenizer_directory(str(run.model)))
    asks = []
    for record in read_results(run)["measured"].values():
        conversation = Conversation(tokenizer)
        conversation.start([{"role": "user", "content": record.task.prompt}])
        asks.append(Ask(token_ids=conversation.prompt_ids, num_tokens=8, seed=record.rollout_id, temperature=1.0))
    (port,) = free_ports(config.launch.host, 1)
    engine = subprocess.Popen(_instant(port))
    url = f"http://127.0.0.1:{port}"
    bare = BareClient([url], call_s=config.engine.call_s)
    try:
        async with EngineClient(url) as client:
            await client.wait_healthy(_START_S)
        await bare.measure(asks[:FEWER], in_flight=IN_FLIGHT)
        began = time.process_time()
        await bare.measure(asks, in_flight=IN_FLIGHT)
        return (time.process_time() - began) / len(asks)
    finally:
        await bare.close()
        engine.kill()
        engine.wait(_START_S)


def _loops(run: RunDir) -> list[dict[str, Any]]:
    """What the workers say of their event loops, in the order of time."""
    lines = [line for path in sorted(run.path.glob("spans/env-*.jsonl")) for line in path.read_text().splitlines()]
    return [span for span in map(json.loads, lines) if span["name"] == "loop"]
