"""`python -m palestra.launch.feed CONFIG_JSON`: the recorded batches of a run, sent to its trainer one after another.

Consumes: batch files, messages of the trainer. Produces: TrainBatch for each recorded step, metrics.jsonl.
Waits for: the trainer, each message with a deadline. Ends when: the trainer has exported after the last batch.
It stands where the orchestrator stands in a run, and calls itself so.
"""

import asyncio
import os
import sys
from pathlib import Path
from typing import TypeVar

from palestra.config import read_resolved
from palestra.core.deadline import within
from palestra.core.ledger import LedgerEntry
from palestra.core.process import die_with_parent
from palestra.wire.channel import Caller, Listener
from palestra.wire.messages import (
    Done,
    Exported,
    Finish,
    FromTrainer,
    LedgerClosed,
    Progress,
    StepTrained,
    ToSupervisor,
    ToTrainer,
    TrainBatch,
    TrainerReady,
    WarmedUp,
)
from palestra.wire.rundir import RunDir
from palestra.wire.runlog import RunLog

NAME, TRAINER = "orchestrator", "trainer"

M = TypeVar("M", bound=FromTrainer)


class Feed:
    """One trainer, its batches, and what it answers."""

    def __init__(self, run: RunDir, *, warmup_steps: int, deadline_s: float):
        attempt = run.read_attempt()
        self._run, self._warmup_steps, self._deadline_s = run, warmup_steps, deadline_s
        self._log = RunLog(run)
        self._trainer: Listener[FromTrainer, ToTrainer] = Listener(
            attempt.orchestrator, attempt=attempt.number, receives=FromTrainer
        )
        self._supervisor: Caller[None, ToSupervisor] = Caller(
            attempt.supervisor, name=NAME, attempt=attempt.number, receives=None
        )

    async def play(self) -> None:
        """Errors: DeadlineError naming what the trainer did not say."""
        steps = self._run.batches.steps()
        await self._say("replay: starting the trainer", 0, len(steps))
        first = (await self._hear(TrainerReady, waiting_for="the trainer")).version
        for step in (step for step in steps if step >= first):
            await self._trainer.send(TRAINER, TrainBatch(step=step, publish=False, save=False))
            trained = await self._hear(StepTrained, waiting_for=f"step {step} of the trainer")
            self._log.metrics(step, trained.metrics)
            self._book(trained.ledgers)
            await self._say("replay", step + 1, steps[-1] + 1)
        await self._trainer.send(TRAINER, Finish())
        exported = await self._hear(Exported, waiting_for="the trainer to export")
        self._book(exported.ledgers)
        await self._supervisor.send(Done(process=NAME))

    async def _hear(self, kind: type[M], *, waiting_for: str) -> M:
        """The next message of `kind`; each message before it starts the deadline anew."""
        while True:
            _, message = await within(self._deadline_s, self._trainer.receive(), waiting_for=waiting_for)
            if isinstance(message, kind):
                return message
            if isinstance(message, LedgerClosed):
                self._log.ledger(message.entry)
            if isinstance(message, WarmedUp):
                await self._say("replay: warm-up", message.step + 1, self._warmup_steps)

    def _book(self, entries: list[LedgerEntry]) -> None:
        for entry in entries:
            self._log.ledger(entry)

    async def _say(self, stage: str, step: int, steps: int) -> None:
        await self._supervisor.send(Progress(process=NAME, stage=stage, step=step, steps=steps))

    def close(self) -> None:
        self._trainer.close()
        self._supervisor.close()
        self._log.close()


async def _main(config_path: Path) -> None:
    config = read_resolved(config_path)
    run = RunDir(config_path.parent)
    feed = Feed(run, warmup_steps=config.data.warmup.steps, deadline_s=config.train.batch_deadline_s)
    try:
        await feed.play()
    finally:
        feed.close()


if __name__ == "__main__":
    die_with_parent(os.getppid())
    asyncio.run(_main(Path(sys.argv[1])))
