"""Evaluations beside training: when they run, and what they withhold.

Consumes: published versions. Produces: results in the journal and the log. Ends when: the final evaluation is done.
"""

import asyncio
import time

from palestra.config.schema import EvalSet
from palestra.core.metrics import Last, merge
from palestra.core.records import ChatReply, Reply, RolloutRecord, Sampling, Task
from palestra.orchestrate.desk import Desk
from palestra.orchestrate.evaluate import Means, evaluate
from palestra.orchestrate.report import of_seats
from palestra.orchestrate.state import EvalEnded
from palestra.orchestrate.workers import PlayOrder
from palestra.wire.messages import Call

_OF_A_DEADLINE = 0.1  # so often a trainer hears of an evaluation


class Evaluations:
    """`is_pinned` while an evaluation withholds publishes: the first always, later ones by `eval.pinned`."""

    def __init__(self, desk: Desk):
        self._desk = desk
        self.is_pinned = False
        self._told_trainer_at = time.monotonic()
        self._running: asyncio.Task[None] | None = None
        self._last = max((ended.version for ended in desk.state.evals), default=0)

    @property
    def is_running(self) -> bool:
        return self._running is not None

    @property
    def due_at_start(self) -> list[EvalSet]:
        """Sets that want a measurement before training and have none yet."""
        measured = {ended.name for ended in self._desk.state.evals if ended.when == "start"}
        return [entry for entry in self._desk.config.eval.sets if entry.start and entry.label not in measured]

    @property
    def awaits_start(self) -> bool:
        """The first version that is published will be measured."""
        return not self.is_pinned and bool(self.due_at_start)

    def published(self, version: int) -> None:
        """Start what is due at this version, unless an evaluation is still running."""
        evals = self._desk.config.eval
        if version >= self._desk.config.train.steps or self._running is not None:
            return
        if due := self.due_at_start:
            self._start("start", due, pinned=True)
        elif evals.every and evals.sets and version // evals.every > self._last // evals.every:
            self._start("during", list(evals.sets), pinned=evals.pinned)

    def _start(self, when: str, sets: list[EvalSet], *, pinned: bool) -> None:
        self.is_pinned = pinned
        self._running = self._desk.tasks.create_task(self._run(when, sets))

    async def run_last(self) -> None:
        """The final measurement, after one that may still be running."""
        if self._running is not None:
            await self._running
        await self._run("end", [entry for entry in self._desk.config.eval.sets if entry.end])

    async def _run(self, when: str, sets: list[EvalSet]) -> None:
        for entry in sets:
            await self._measure(entry, when)
        self._last, self._running = self._desk.trainer.loaded, None
        self.is_pinned = False
        self._desk.changed.tell()

    async def _measure(self, entry: EvalSet, when: str) -> None:
        desk, version = self._desk, self._desk.trainer.loaded
        if when != "during":
            await desk.progress(f"evaluating {entry.label}")
        with desk.teller.spans.span("evaluate", set=entry.label, version=version):
            means = Means(
                list_tasks=desk.pool.list_tasks,
                play=self._play,
                score_group=desk.pool.score_group,
                max_in_flight=max(desk.capacity if when == "end" else desk.capacity // 2, 1),  # training goes on
                retries=desk.config.env.retries,
            )
            result = await evaluate(entry, means, default=desk.sampling_of(entry.label), seed=desk.config.train.seed)
        await asyncio.to_thread(desk.teller.write_rollouts, f"eval-{entry.label}-v{version:06d}", result.records)
        ended = EvalEnded(
            name=entry.label,
            version=version,
            versions=sorted(result.versions),
            reward=result.reward,
            num_rollouts=len(result.valid),
            when=when,
        )
        desk.journal.record(ended)
        name = f"eval/{entry.label}/reward"
        rewards = merge(of_seats(name, record) for record in result.valid) | {name: Last(result.reward)}
        desk.teller.log.metrics(version, rewards, phase=f"eval-{when}")

    async def _play(self, source: str, task: Task, sampling: Sampling, seed: int) -> RolloutRecord:
        session = -1 - seed  # no rollout's

        async def answer(call: Call) -> Reply | ChatReply:
            if call.seat:
                return await self._desk.seats.ask(source, call, seed=seed + call.call)
            return await self._desk.gateway.call(session, call.token_ids, call.sampling, seed=seed + call.call)

        while self._desk.fleet.holds:
            await self._desk.changed.wait("the publish before which no rollout starts (sync.wait)")
        order = PlayOrder(rollout_id=0, source=source, task=task, sampling=sampling, seed=seed, answer=answer)
        try:
            record = await self._desk.pool.play(order)
        finally:
            self._desk.fleet.release(session)
        self._desk.teller.totals.note_tokens(record.num_sampled_tokens)
        await self._tell_trainer()
        return record

    async def _tell_trainer(self) -> None:
        """It waits for weights to be loaded, or for its end, and must know that an evaluation makes progress."""
        if time.monotonic() - self._told_trainer_at >= self._desk.config.train.batch_deadline_s * _OF_A_DEADLINE:
            self._told_trainer_at = time.monotonic()
            await self._desk.trainer.still_evaluating()
