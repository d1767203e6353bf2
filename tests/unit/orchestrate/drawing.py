"""Sources with a curriculum on their own: real law, real events, a scripted list of tasks and scripted rewards."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from palestra.config.schema import RunConfig
from palestra.core.records import Ending, RolloutRecord, Task
from palestra.orchestrate.curriculum import Pool, SourcePools
from palestra.orchestrate.pooled import PooledSources, open_sources
from palestra.orchestrate.quarantine import Quarantine
from palestra.orchestrate.ratings import observe_group, rate_tasks
from palestra.orchestrate.state import Event, Group, GroupClosed, GroupOpened, LoopState
from palestra.wire.messages import Tasks
from palestra.wire.rundir import RunDir
from palestra.wire.runlog import RunLog

ListKeys = Callable[[str, int], list[str]]  # source, epoch -> the keys of its tasks

_decode = msgspec.msgpack.Decoder(Event).decode


def drawing_config(outputs: Path, *, mix: list[dict] | None = None, chunk_tasks: int = 4, **curriculum: Any):
    tree = {
        "log": {"name": "drawing", "outputs": str(outputs)},
        "model": {"path": "unused"},
        "algo": {"groups_per_step": 2, "group_size": 4, "pace_age": 0.0},
        "env": {"mix": mix or [{"id": "s"}], "chunk_tasks": chunk_tasks, "curriculum": {"on": True} | curriculum},
    }
    return RunConfig.model_validate(tree)


@dataclass
class Drawing:
    """One life after another of the same sources: `restart` keeps nothing but the journal."""

    config: RunConfig
    keys: ListKeys
    journal: list[bytes] = field(default_factory=list)
    state: LoopState = field(default_factory=LoopState)
    said: list[str] = field(default_factory=list)
    listed: list[tuple[str, int, int]] = field(default_factory=list)
    groups: dict[int, Group] = field(default_factory=dict)  # open

    def __post_init__(self):
        self._begin()

    def _begin(self) -> None:
        run = RunDir(self.config.run_dir)
        log = RunLog(run)
        log.close()  # moves are written all the same
        self.desk: Any = SimpleNamespace(
            config=self.config,
            run=run,
            state=self.state,
            journal=SimpleNamespace(record=self.record, state=self.state),
            pool=SimpleNamespace(
                list_tasks=self._list_tasks, quarantine=Quarantine(self.state.quarantined, self.record)
            ),
            teller=SimpleNamespace(log=log),
            progress=self._progress,
        )
        self.sources = open_sources(self.desk)

    def restart(self) -> None:
        before = msgspec.msgpack.encode(self.state)
        self.state = LoopState()
        for frame in self.journal:
            self.state.apply(_decode(frame))
        assert msgspec.msgpack.encode(self.state) == before, "the state is its journal"
        self.groups = {group_id: self.state.groups[group_id] for group_id in self.groups}
        self._begin()

    def record(self, event) -> None:
        self.journal.append(msgspec.msgpack.encode(event))
        self.state.apply(event)

    async def _progress(self, words: str) -> None:
        self.said.append(words)

    async def _list_tasks(self, source: str, epoch: int, offset: int, count: int) -> Tasks:
        self.listed.append((source, epoch, offset))
        keys = self.keys(source, epoch)
        tasks = [Task(prompt=key, key=key) for key in keys[offset : offset + count]]
        return Tasks(request_id=0, tasks=tasks, exhausted=offset + count > len(keys))

    def pools(self, source: str = "s") -> SourcePools:
        return self.state.pools[source]

    def pool_of(self, key: str, source: str = "s") -> Pool | None:
        return self.pools(source).pool_of(key)

    def open(self) -> GroupOpened:
        """The next group: nothing here ever waits."""
        coroutine = self.sources.open(self.state.next_group, self.config.algo.group_size)
        try:
            coroutine.send(None)
        except StopIteration as stop:
            opened: GroupOpened = stop.value
        self.record(opened)
        self.groups[opened.group_id] = self.state.groups[opened.group_id]
        return opened

    def close(self, group_id: int, rewards: list[float | None]) -> None:
        """All members end; None is an invalid one. The group leaves the state, as a dropped one does."""
        group = self.groups.pop(group_id)
        group.records = {
            rollout_id: _record(rollout_id, group.task, reward)
            for rollout_id, reward in zip(group.rollout_ids, rewards, strict=True)
        }
        observed = observe_group(self.config, group)
        self.record(GroupClosed(group_id=group_id, outcome="zero_signal", observed=observed))

    def rate(self) -> None:
        rate_tasks(self.desk)

    def play(self, rewards: Callable[[str, int], list[float | None]]) -> str:
        """Draw a task, play it, let it count. Gives its key."""
        opened = self.open()
        self.close(opened.group_id, rewards(opened.task.key, opened.group_id))
        self.rate()
        return opened.task.key

    @property
    def pooled(self) -> PooledSources:
        assert isinstance(self.sources, PooledSources)
        return self.sources


def _record(rollout_id: int, task: Task, reward: float | None) -> RolloutRecord:
    ending = Ending.INVALID if reward is None else Ending.OK
    return RolloutRecord(rollout_id=rollout_id, environment="s", task=task, ending=ending, reward=reward or 0.0)
