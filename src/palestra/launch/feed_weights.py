"""`python -m palestra.launch.feed_weights CONFIG_JSON`: a run's recorded weights, published to one engine in order.

Consumes: recorded versions, finished rollouts of the journal. Produces: metrics.jsonl, a row per version: how far the
engine is from the trainer's probe, and its scores of recorded replies from the log-probabilities of then.
Waits for: the engine, each call with a deadline. Ends when: the last version is scored.
It stands where the orchestrator stands in a run, and calls itself so.
"""

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from palestra.config import RunConfig, read_resolved
from palestra.core.metrics import Max, Mean, Metrics, merge
from palestra.core.process import die_with_parent
from palestra.core.records import Sample
from palestra.launch.feed import NAME
from palestra.launch.replay_env import recorded as recorded_rollouts
from palestra.wire.channel import Caller
from palestra.wire.messages import Done, Progress, ToSupervisor
from palestra.wire.policy import EngineClient
from palestra.wire.publish import publish
from palestra.wire.rundir import RunDir
from palestra.wire.runlog import RunLog
from palestra.wire.weights.manifest import Staged, recorded

SAMPLES_PER_VERSION = 8


def _is_at_temperature_1(config: RunConfig) -> bool:
    return all(config.sampling_of(label).temperature == 1 for label in ("", *(entry.label for entry in config.env.mix)))


class Feed:
    """One engine and the versions it gets."""

    def __init__(self, config: RunConfig, run: RunDir, client: EngineClient):
        self._config, self._client, self._log = config, client, RunLog(run)
        self._samples = samples_by_version(run) if _is_at_temperature_1(config) else {}

    async def play(self, run: RunDir, supervisor: Caller[None, ToSupervisor]) -> None:
        """Errors: PublishError with the numbers, if the engine is not where the trainer was."""
        versions = recorded(run.published)
        for number, staged in enumerate(versions):
            stage = "replay: publishing recorded weights"
            await supervisor.send(Progress(process=NAME, stage=stage, step=number, steps=len(versions)))
            if number == 0:
                await self._client.wait_healthy(self._config.engine.healthy_s)
            self._log.metrics(staged.version, await self._load(staged) | await self._score(staged.version))
        await supervisor.send(Done(process=NAME))

    async def _load(self, staged: Staged) -> Metrics:
        report = await publish(
            [self._client],
            staged,
            kv="recompute",
            at_once=1,
            tolerance=self._config.probe_tolerance,
            deadline_s=self._config.sync.deadline_s,
        )
        engine = report.engines[0]
        gap = Max(report.max_gap)
        return {"publish/max_abs_logprob_gap": gap, "publish/stopped_s": Mean(engine.stopped_s)}

    async def _score(self, version: int) -> Metrics:
        """Against the log-probabilities that this version sampled its replies with."""
        return merge([await self._difference(sample) for sample in self._samples.get(version, [])])

    async def _difference(self, sample: Sample) -> Metrics:
        scores = [0.0, *await self._client.score(sample.token_ids, deadline_s=self._config.engine.call_s)]
        gaps = [
            abs(score - logprob)
            for score, logprob, sampled in zip(scores, sample.logprobs, sample.sampled, strict=True)
            if sampled
        ]
        return {
            "replay/abs_logprob_difference": Mean(sum(gaps), len(gaps)),
            "replay/largest_difference": Max(max(gaps)),
        }

    def close(self) -> None:
        self._log.close()


def samples_by_version(run: RunDir) -> dict[int, list[Sample]]:
    """Of the finished rollouts that one version sampled from their first token to their last, a few of each version."""
    found: dict[int, list[Sample]] = {}
    for record, _ in recorded_rollouts(run):
        if len(record.versions) == 1:
            known = found.setdefault(record.versions[0], [])
            known += list(_trained(record.seats))[: SAMPLES_PER_VERSION - len(known)]
    return found


def _trained(seats) -> Iterator[Sample]:
    for seat in seats:
        yield from (sample for sample in seat.samples if any(sample.sampled))


async def _main(config_path: Path) -> None:
    config, run = read_resolved(config_path), RunDir(config_path.parent)
    attempt = run.read_attempt()
    supervisor: Caller[None, ToSupervisor] = Caller(
        attempt.supervisor, name=NAME, attempt=attempt.number, receives=None
    )
    async with EngineClient(attempt.engines[0]) as client:
        feed = Feed(config, run, client)
        try:
            await feed.play(run, supervisor)
        finally:
            feed.close()
            supervisor.close()


if __name__ == "__main__":
    die_with_parent(os.getppid())
    asyncio.run(_main(Path(sys.argv[1])))
