"""Publishes: weights into the engines, while they generate; and turns, where the trainer shares their device.

Consumes: staged versions, the newest first; engines that join; turns that are asked for. Produces: engines that are
proved to hold them, or asleep; turns.
Waits for: the trainer's next staged version; the end of an evaluation that withholds publishes, and turns; the end of
the trainer's turn; with `sync.wait` what runs.
Woken by: `changed`.
Ends when: cancelled; the last version is in the engines when `trainer.loaded` says so.
"""

import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec

from palestra.core.errors import InfrastructureError, PalestraError
from palestra.core.metrics import Max, Mean, Metrics
from palestra.orchestrate.desk import Desk
from palestra.orchestrate.fleet import EngineLink, EngineState
from palestra.orchestrate.measure import Evaluations
from palestra.orchestrate.state import Published
from palestra.orchestrate.turns import TRAINER
from palestra.wire.messages import EnginesAsked, WeightsSent
from palestra.wire.policy import EngineClient, UnpublishedError
from palestra.wire.publish import EnginePublish, NoEngineLeft, PublishReport, is_lost, publish
from palestra.wire.sending import Sending
from palestra.wire.weights.manifest import Staged


class Publisher:
    """Brings each staged version to the engines, unless a newer one is staged already; and the current one to engines
    that join."""

    def __init__(self, desk: Desk, evaluations: Evaluations):
        self._desk, self._evaluations = desk, evaluations
        self._newest: Staged | None = None  # not published yet
        self._later: Staged | None = None  # newer still, where the first one is to be measured before it is replaced
        self._current: Staged | None = None  # what the engines hold
        self._sending: Sending | None = None  # on its way now
        self._group: list[tuple[str, int]] = []  # engines, and which of their lives: who has met the trainer
        self._holds: dict[tuple[str, int], str] = {}  # the mark of what each of them was proved to hold
        self._awaits_files = False

    def stage(self, staged: Staged) -> None:
        """The trainer has it on disk; whoever calls tells `changed`. One that trains again what was trained before may
        stage older ones than what waits here already."""
        if not staged.is_sent:
            self._awaits_files = False
        if self._newest is None:
            self._newest = staged
        elif self._evaluations.awaits_start:
            self._later = staged
        elif staged.version >= self._newest.version:
            self._newest = staged

    async def run(self) -> None:
        fleet, turns = self._desk.fleet, self._desk.turns
        while True:
            is_theirs = turns.is_free_for(fleet.links[0].name)
            if is_theirs and (asking := [link.name for link in fleet.links if turns.asks(link.name)]):
                await turns.give(asking[0])
            elif is_theirs and self._newest is not None and fleet.reachable and not self._evaluations.is_pinned:
                await self._bring_newest()
            elif turns.asks(TRAINER) and not self._evaluations.is_running and self._can_yield:
                await self._yield_to_trainer()
            elif is_theirs and self._current is not None and fleet.joining and not self._awaits_files:
                await self._bring_current(self._current)
            else:
                await self._desk.changed.wait("weights staged by the trainer, and an engine to take them")

    def trainer_ended(self) -> None:
        """What it handed out from its own memory is gone with it."""
        if self._desk.config.sync.kind == "ipc":
            self._newest = self._later = self._current = None
        if self._newest is not None and self._newest.is_sent:
            self._newest = None
        self._group, self._awaits_files = [], False
        if self._sending is not None:
            self._sending.sent(error="it has died")

    def engines_asked(self, message: EnginesAsked) -> None:
        if self._sending is not None:
            self._sending.asked(message.what, message.info)

    def sent(self, message: WeightsSent) -> None:
        if message.error:
            print(f"version {message.version} was not sent: {message.error}", file=sys.stderr)
            self._group = []
        else:
            self._desk.teller.note({"publish/send_s": Mean(message.send_s)})
        if self._sending is not None:
            self._sending.sent(message.error)

    async def _bring_current(self, staged: Staged) -> None:
        """To engines that join. What was sent is nowhere any more."""
        if staged.is_sent:
            await self._ask_for_files()
        else:
            await self._publish(staged, self._desk.fleet.joining)

    async def _ask_for_files(self) -> None:
        self._awaits_files = True
        await self._desk.trainer.stage_files()

    @asynccontextmanager
    async def _sending_to(self, staged: Staged, links: list[EngineLink]) -> AsyncIterator[Sending | None]:
        """None for a version that engines read."""
        by_client = {id(link.client): link for link in links}

        async def begin(clients: Sequence[EngineClient]) -> bool:
            group = [(link.name, link.starts) for link in (by_client[id(client)] for client in clients)]
            is_new, self._group = group != self._group, group
            num_workers = len(group) * self._desk.config.engine.tensor_parallel
            await self._desk.trainer.send_weights(staged.version, num_workers=num_workers, is_new_group=is_new)
            return is_new

        if not staged.is_sent:
            yield None
            return
        clients = [link.client for link in links]
        self._sending = Sending(clients, begin, width=self._desk.config.engine.tensor_parallel)
        try:
            yield self._sending
        finally:
            self._sending = None

    @property
    def _can_yield(self) -> bool:
        """Whether the device is free for the trainer, or will be once those who can sleep do."""
        fleet, turns = self._desk.fleet, self._desk.turns
        at_it = [link for link in fleet.links if not turns.is_idle(link.name)]
        return all(link in fleet.reachable for link in at_it)

    async def _yield_to_trainer(self) -> None:
        """The engines sleep. One that cannot is started again: then the device is free as soon as it has ended."""
        desk = self._desk
        links = desk.fleet.of_state(EngineState.SERVING, EngineState.JOINING)
        began = time.monotonic()
        async with self._between_rollouts(links):
            for link in links:
                await self._put_to_sleep(link)
        if links:
            desk.teller.note({"turns/sleep_s": Mean(time.monotonic() - began)})
        if desk.turns.asks(TRAINER) and desk.turns.is_free_for(TRAINER):  # it may have died meanwhile
            await desk.turns.give(TRAINER)

    async def _put_to_sleep(self, link: EngineLink) -> None:
        """With adapters, weights are kept in host memory, as no publish brings them; else the next one brings all."""
        desk, life = self._desk, link.starts
        if link not in desk.fleet.reachable:
            return  # it died meanwhile
        desk.fleet.sleeps(link)
        try:
            keeps_weights = desk.config.model.lora is not None
            await link.client.sleep(keeps_weights=keeps_weights, deadline_s=desk.config.sync.deadline_s)
        except PalestraError as failure:
            if link.starts == life:
                desk.fleet.take_out(link, f"it was not put to sleep: {failure}")
        else:
            if link.starts == life:
                desk.turns.over(link.name)

    async def _bring_newest(self) -> None:
        trainer, staged = self._desk.trainer, self._newest
        assert staged is not None
        self._newest, self._later = self._later, None
        if trainer.is_outdated(staged.version):
            await trainer.discard(max(staged.version, trainer.loaded))
        elif staged.version == trainer.loaded:
            self._current = staged  # from now on for whoever joins
            await trainer.discard(staged.version)
        elif staged.version < trainer.catch_up and not self._evaluations.due_at_start:
            await trainer.discard(staged.version)
        elif staged.is_sent and not self._can_be_sent(staged):
            await self._ask_for_files()  # the trainer stages the same version again
        elif await self._publish(staged, self._desk.fleet.serving if staged.is_sent else self._desk.fleet.reachable):
            self._current = staged
            self._desk.journal.record(Published(version=staged.version))
            await trainer.note_loaded(staged.version)
            self._desk.changed.tell()
            self._evaluations.published(staged.version)
        else:
            self._newest = self._newest or staged  # for whoever joins

    def _can_be_sent(self, staged: Staged) -> bool:
        """To engines that serve, and hold what it changes."""
        serving = self._desk.fleet.serving
        holds = {self._holds.get((link.name, link.starts), "") for link in serving}
        return bool(serving) and (not staged.base or holds == {staged.base})

    async def _publish(self, staged: Staged, links: list[EngineLink]) -> bool:
        """Whether any engine holds the version. Errors: NoEngineLeft, if the last ones failed the proof."""
        if not links:
            return False
        starts = {link.name: link.starts for link in links}
        for link in links:
            self._desk.turns.begin(link.name)
        async with self._between_rollouts(links):
            report = await self._publish_to(staged, links, starts)
        held = [
            await self._account(link, engine, staged, life=starts[link.name])
            for link, engine in zip(links, report.engines, strict=True)
        ]
        if any(held):
            desk = self._desk
            desk.teller.note({"publish/max_abs_logprob_gap": Max(report.max_gap), **_staged_metrics(staged)})
            desk.teller.totals.note_publish(report.max_gap, staged)
        return any(held)

    async def _publish_to(self, staged: Staged, links: list[EngineLink], starts: dict[str, int]) -> PublishReport:
        """`starts`: what a publish says of an engine that died meanwhile, it says of two processes."""
        desk = self._desk
        with desk.teller.spans.span("publish", version=staged.version) as attributes:
            try:
                report = await self._published(staged, links)
            except NoEngineLeft as failure:
                is_whole_fleet = len(links) == len(desk.fleet.links)
                has_changed = any(link.starts != starts[link.name] or link.state is EngineState.OUT for link in links)
                adopts = any(link.is_inherited for link in links)  # left by a dead orchestrator: a new start may help
                if not failure.is_lost and is_whole_fleet and not has_changed and not adopts:
                    raise
                report = failure.report
            attributes |= {"max_gap": report.max_gap, "stopped_s": report.stopped_s}
        return report

    async def _published(self, staged: Staged, links: list[EngineLink]) -> PublishReport:
        """Errors: NoEngineLeft."""
        sync = self._desk.config.sync
        async with self._sending_to(staged, links) as sending:
            report = await publish(
                [link.client for link in links],
                staged,
                kv=sync.kv,
                at_once=sync.at_once,
                tolerance=self._desk.config.probe_tolerance,
                deadline_s=sync.deadline_s,
                watch=self._note_stop,
                sending=sending,
            )
        if staged.is_sent and report.failed:
            self._group = []
        return report

    @asynccontextmanager
    async def _between_rollouts(self, links: list[EngineLink]) -> AsyncIterator[None]:
        """With `sync.wait`: none runs, and none starts before it is over. Rollouts that wait for an engine do not end:
        once none of those that are published to serves, they are not waited for."""
        desk = self._desk
        desk.fleet.holds = desk.config.sync.wait and _serves(links)
        while desk.fleet.holds and desk.pool.num_playing and _serves(links):
            await desk.changed.wait(f"{desk.pool.num_playing} rollouts to end before a publish (sync.wait)")
        try:
            yield
        finally:
            desk.fleet.holds = False
            desk.changed.tell()

    async def _account(self, link: EngineLink, engine: EnginePublish, staged: Staged, *, life: int) -> bool:
        """Whether it serves the version: one that failed is taken out, one that joined serves from now on.

        What was found out about another `life` of it says nothing of the process that is there now.
        """
        desk = self._desk
        if link.starts == life and not engine.failure and link.state is EngineState.JOINING:
            engine = await self._require_logprobs(link, engine, staged)
        if link.starts != life:
            return False
        if engine.failure:
            print(f"{link.name} is taken out: {engine.failure}", file=sys.stderr)
            desk.fleet.take_out(link, engine.failure)
            return False
        if link in desk.fleet.joining:
            desk.fleet.joined(link)
        if link.state is not EngineState.SERVING:
            return False  # it died meanwhile
        self._holds[link.name, life] = staged.mark
        desk.teller.note(
            {
                "publish/stopped_s": Mean(engine.stopped_s),
                "publish/pause_s": Mean(engine.pause_s),
                "publish/load_s": Mean(engine.load_s),
                "publish/resume_s": Mean(engine.resume_s),
            }
        )
        if engine.wake_s:
            desk.teller.note({"turns/wake_s": Mean(engine.wake_s)})
        return True

    async def _require_logprobs(self, link: EngineLink, engine: EnginePublish, staged: Staged) -> EnginePublish:
        """What its publish comes to. Errors: EngineError, if its log-probabilities are not those of the distribution
        it samples from."""
        try:
            await link.client.require_processed_logprobs(staged.probe.token_ids[:4])
        except InfrastructureError as failure:
            if not isinstance(failure, UnpublishedError) and not await is_lost(link.client, failure):
                raise
            return msgspec.structs.replace(engine, failure=str(failure), is_lost=True)
        return engine

    def _note_stop(self, client: EngineClient, is_stopped: bool) -> None:
        link = next(link for link in self._desk.fleet.links if link.client is client)
        link.stop(is_stopped, refills=self._desk.config.sync.kv == "recompute")


def _staged_metrics(staged: Staged) -> Metrics:
    """What a version cost to send, beside what it is."""
    return {
        "publish/bytes": Mean(staged.sent_bytes),
        "publish/full_bytes": Mean(staged.full_bytes),
        "publish/shard_bytes": Mean(staged.shard_bytes),
        "publish/stage_s": Mean(staged.stage_s),
    }


def _serves(links: list[EngineLink]) -> bool:
    return any(link.state is EngineState.SERVING for link in links)
