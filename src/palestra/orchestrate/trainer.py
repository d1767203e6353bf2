"""The trainer as the orchestrator sees it: which steps it has, which versions exist, what is due when."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from palestra.wire.messages import (
    Finish,
    SendWeights,
    StageFiles,
    StillEvaluating,
    ToTrainer,
    TrainBatch,
    WeightsLoaded,
)


@dataclass(frozen=True)
class Schedule:
    """When weights are published and saved. Step `s` turns version `s` into `s + 1`."""

    steps: int
    publish_every: int
    save_every: int

    def publishes(self, step: int) -> bool:
        return (step + 1) % self.publish_every == 0 or step + 1 == self.steps

    def next_published(self, version: int) -> int:
        """The first version after `version` that is published."""
        return min((version // self.publish_every + 1) * self.publish_every, self.steps)

    def saves(self, step: int) -> bool:
        return (step + 1) % self.save_every == 0 or step + 1 == self.steps


class TrainerLink:
    """Sends batches and keeps count. `catch_up` is the version that the trainer has once it trained all batches shipped
    before this link; older versions are not published, and none below `published`, which engines had. `restages`: what
    engines hold is staged again by a trainer that took another's place, as it died with that one."""

    def __init__(
        self,
        send: Callable[[ToTrainer], Awaitable[None]],
        schedule: Schedule,
        *,
        next_step: int,
        published: int = -1,
        restages: bool = False,
    ):
        self._send, self.schedule = send, schedule
        self.catch_up = self._next_step = next_step
        self.published = published
        self._restages = restages
        self.trained = -1  # version the trainer has; -1: not ready, or gone
        self.loaded = -1  # version the engines have
        self.is_finishing = False

    async def ready(self, version: int, *, staged: int | None = None) -> None:
        """The trainer is at `version`: it gets the batches after it, in order, whoever has trained them before.

        `staged` is the newest version of a trainer that outlived the orchestrator before this one: publishes go on
        with it.
        """
        first = version
        if staged is not None and self.loaded < 0:
            if staged >= self.published:
                self.catch_up = min(self.catch_up, staged)
            elif version == self.catch_up:
                first = version - 1  # it caught up, and nobody asked it to stage where it is: now somebody does
        self.trained = version
        for step in range(first, self._next_step):
            await self._send_batch(step)
        if self.is_finishing:
            await self._send(Finish())

    def note_trained(self, step: int) -> None:
        """What a trainer says before it is ready was said to another orchestrator."""
        if self.trained >= 0:
            self.trained = step + 1

    def gone(self) -> None:
        """Its process ended; what is shipped meanwhile is sent to its successor."""
        self.trained = -1

    async def ship(self, step: int) -> None:
        self._next_step = step + 1
        if self.trained >= 0:
            await self._send_batch(step)

    async def _send_batch(self, step: int) -> None:
        version = step + 1
        is_due = version == self.catch_up or (version > self.catch_up and self.schedule.publishes(step))
        publish = is_due and (version > self.loaded or (self._restages and version == self.loaded))
        await self._send(TrainBatch(step=step, publish=publish, save=self.schedule.saves(step)))

    def is_outdated(self, version: int) -> bool:
        """Engines have a newer version, or had one: this one would take them back."""
        return version < max(self.loaded, self.published)

    @property
    def is_current(self) -> bool:
        """Engines hold what the trainer has, or will have once it caught up: rollouts may start."""
        return self.loaded >= max(self.catch_up, 0)

    async def note_loaded(self, version: int) -> None:
        self.loaded = self.published = max(self.loaded, version)
        await self._send(WeightsLoaded(version=version))

    async def discard(self, version: int) -> None:
        """A staged version that need not be published: a newer one follows."""
        await self._send(WeightsLoaded(version=version))

    async def send_weights(self, version: int, *, num_workers: int, is_new_group: bool) -> None:
        await self._send(SendWeights(version=version, num_workers=num_workers, is_new_group=is_new_group))

    async def stage_files(self) -> None:
        """For engines that missed what was sent."""
        await self._send(StageFiles())

    async def still_evaluating(self) -> None:
        if self.trained >= 0:
            await self._send(StillEvaluating())

    async def finish(self) -> None:
        self.is_finishing = True
        if self.trained >= 0:
            await self._send(Finish())

    def has_room(self, step: int) -> bool:
        """One batch may wait while another is trained."""
        return self.trained >= 0 and step - self.trained < 2

    @property
    def steps_on_the_way(self) -> int:
        """Steps whose batches are shipped and whose weights are not in the engines yet."""
        return self._next_step - max(self.loaded, 0)

    @property
    def steps_to_publish(self) -> int:
        """Steps that are not shipped yet, and without which engines get no other version."""
        return max(self.schedule.next_published(max(self.loaded, 0)) - self._next_step, 0)
