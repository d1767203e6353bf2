"""Task sources with a curriculum: reads a source on when it must, and fetches known tasks again by their position.

Consumes: `Tasks` of the workers, pools of the state. Produces: the next group's task; `TasksSeeded` and `SourceRead`
in the journal. Waits for: a worker's list of tasks, with a deadline. Ends: never.
"""

import sys
from collections import OrderedDict
from pathlib import Path

from palestra.core.errors import UserError
from palestra.core.records import Task
from palestra.orchestrate.curriculum import (
    Pool,
    SourcePools,
    Standing,
    decide,
    find,
    forget,
    knows_whole,
    num_strangers,
)
from palestra.orchestrate.desk import Desk
from palestra.orchestrate.ratings import log_moves, rules_of
from palestra.orchestrate.seeding import read_seeds
from palestra.orchestrate.sources import TaskSources
from palestra.orchestrate.state import Cursor, GroupOpened, SourceRead, TasksSeeded
from palestra.wire.messages import Tasks

_CHUNKS = 4  # of a source that are kept: one a pool, and the one that is read


def open_sources(desk: Desk) -> "TaskSources | PooledSources":
    """The sources of env.mix, from where the state is. Errors: UserError, for a curriculum's file."""
    env = desk.config.env
    sources = TaskSources(
        env.mix,
        desk.pool.list_tasks,
        seed=desk.config.train.seed,
        chunk_tasks=env.chunk_tasks,
        refuses=lambda source, task: bool(desk.pool.quarantine.reason(source, task)),
    )
    if env.curriculum.on:
        return PooledSources(desk, sources)
    sources.resume(desk.state.cursors)
    return sources


class PooledSources:
    """`TaskSources` whose order follows the observed solve rate. All its decisions are events, so a new one goes on
    where the journal ends."""

    def __init__(self, desk: Desk, sources: TaskSources):
        """Errors: UserError, if `env.curriculum.seed_from` cannot be read."""
        self._desk, self._sources = desk, sources
        self._curriculum, self._chunk_tasks = desk.config.env.curriculum, desk.config.env.chunk_tasks
        self._rules = rules_of(desk.config)
        self._chunks: OrderedDict[tuple[str, int, int], list[Task]] = OrderedDict()
        self._all_retired: set[str] = set()  # sources of which that was said
        log_moves(desk)
        if self._curriculum.seed_from is not None and not desk.state.seeds:
            self._seed(self._curriculum.seed_from)

    def _seed(self, path: Path) -> None:
        results = read_seeds(path, self._rules.solved_at)
        print(f"curriculum: {len(results)} tasks begin with a rate from {path}", file=sys.stderr)
        self._desk.journal.record(TasksSeeded(results=results))

    # --- the next task

    async def begin(self) -> None:
        """As `TaskSources.begin`."""
        for source in self._desk.config.env.mix:
            if source.label not in self._desk.state.pools:
                await self._read_on(source.label)

    async def open(self, group_id: int, size: int) -> GroupOpened:
        """As `TaskSources.open`. Errors: UserError, also if a task is not found again at its place."""
        label = self._sources.source_of(group_id)
        while (pool := self._decide(label, group_id)) is None:
            await self._read_on(label)
        key = self._pools(label)[pool].head
        task = await self._fetch(label, key, self._pools(label)[pool][key])
        await self._tell_if_all_retired(label, pool)
        cursor = self._desk.state.cursors[label]
        return GroupOpened(
            group_id=group_id,
            source=label,
            task=task,
            size=size,
            cursor_epoch=cursor.epoch,
            cursor_taken=cursor.taken,
            has_group_rewards=self._sources.has_group_rewards[label],
            pool=pool,
        )

    def _decide(self, label: str, group_id: int) -> Pool | None:
        pools = self._pools(label)
        if pools.is_whole and not pools.num_tasks:
            raise UserError(f"every task of environment {label!r} is quarantined; see the log of the orchestrator")
        return decide(pools, self._rules, group_id=group_id)

    def _pools(self, label: str) -> SourcePools:
        return self._desk.state.pools.get(label) or SourcePools()

    async def _read_on(self, label: str) -> None:
        """The next chunk of the source: its new tasks enter their pools, in a seeded order."""
        state, known = self._desk.state, self._pools(label)
        cursor = state.cursors.get(label, Cursor())
        listed = await self._chunk(label, cursor.epoch, cursor.taken)
        order = self._sources.order_of_chunk(cursor.epoch, cursor.taken, len(listed.tasks))
        placed = [(cursor.taken + i, listed.tasks[i]) for i in order]
        playable = [(place, task) for place, task in placed if not self._sources.refuses(label, task)]
        found = find(known, state.seeds, playable, self._rules, epoch=cursor.epoch)
        barren, taken = (0 if found else known.barren + len(placed)), cursor.taken + len(placed)
        ended = listed.exhausted or not placed
        is_whole = knows_whole(known, barren=barren, taken=taken, chunk_tasks=self._chunk_tasks, exhausted=ended)
        after = Cursor(epoch=cursor.epoch + 1) if ended else Cursor(epoch=cursor.epoch, taken=taken)
        event = SourceRead(
            source=label,
            cursor_epoch=after.epoch,
            cursor_taken=after.taken,
            num_tasks=len(placed),
            found=found,
            forgotten=forget(known, len(found), self._rules),
            barren=barren,
            is_whole=is_whole,
        )
        is_first = label not in state.pools
        self._desk.journal.record(event)
        await self._tell_of_seeds(label, is_first=is_first)

    async def _fetch(self, label: str, key: str, standing: Standing) -> Task:
        """A task that is known, from where it was found."""
        start = standing.offset // self._chunk_tasks * self._chunk_tasks
        tasks = self._chunks.get((label, standing.epoch, start))
        if tasks is None:
            tasks = (await self._chunk(label, standing.epoch, start)).tasks
        self._chunks.move_to_end((label, standing.epoch, start))
        index = standing.offset - start
        task = tasks[index] if index < len(tasks) else None
        if task is None or task.key != key:
            raise UserError(
                f"environment {label!r} does not list the same tasks again: task {standing.offset} of epoch "
                f"{standing.epoch} was {key!r} and is {task.key if task else 'missing'!r} now; tasks() must depend on "
                "split, seed and arguments alone, or turn env.curriculum off"
            )
        return task

    async def _chunk(self, label: str, epoch: int, start: int) -> Tasks:
        listed = await self._sources.read_chunk(label, epoch, start)
        self._chunks[label, epoch, start] = listed.tasks
        if len(self._chunks) > _CHUNKS * len(self._desk.config.env.mix):
            self._chunks.popitem(last=False)
        return listed

    # --- words

    async def _tell_of_seeds(self, label: str, *, is_first: bool) -> None:
        state, path = self._desk.state, self._curriculum.seed_from
        if not state.seeds:
            return
        pools = state.pools[label]
        if is_first and not any(pools.pool_of(key) for key in state.seeds):
            await self._tell(f"none of the first {pools.num_tasks} tasks of {label!r} is among those of {path}")
        if pools.is_whole and all(self._pools(source.label).is_whole for source in self._desk.config.env.mix):
            strangers = num_strangers(state.pools, state.seeds)
            await self._tell(f"{strangers} of {len(state.seeds)} task keys of {path} match no task of env.mix")

    async def _tell_if_all_retired(self, label: str, pool: Pool) -> None:
        if pool != Pool.RETIRED:
            self._all_retired.discard(label)
        elif label not in self._all_retired:
            self._all_retired.add(label)
            await self._tell(
                f"all {len(self._pools(label).retired)} tasks of {label!r} are solved; they are drawn again, those "
                "solved longest ago first, and come back where the policy does not solve them any more"
            )

    async def _tell(self, words: str) -> None:
        print(f"curriculum: {words}", file=sys.stderr)
        await self._desk.progress(f"curriculum: {words}")
