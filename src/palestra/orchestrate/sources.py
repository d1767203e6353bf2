"""Task sources: which task comes next. Environments list their tasks in worker processes; the order is decided here.

Consumes: `Tasks` of the workers. Produces: (source, task, cursor) in an order that depends on the seed alone.
Waits for: a worker's list of tasks, with a deadline. Ends: never, epochs follow each other.
"""

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np

from palestra.config.schema import Source
from palestra.core.errors import UserError
from palestra.core.records import Task
from palestra.orchestrate.state import Cursor, GroupOpened
from palestra.wire.messages import Tasks

ListTasksCall = Callable[[str, int, int, int], Awaitable[Tasks]]  # source, epoch, offset, count


def seed_for(*parts: int | str) -> int:
    """A seed in [0, 2**31) that depends on `parts` alone."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little") >> 1


@dataclass
class _Shelf:
    """Tasks of one source that are fetched and not taken: one shuffled chunk."""

    cursor: Cursor
    chunk: list[Task] = field(default_factory=list)
    chunk_start: int = 0
    exhausted: bool = False


class TaskSources:
    """A mix of environments by weight. Tasks are fetched in chunks, each shuffled with a seed of its own."""

    def __init__(
        self,
        mix: tuple[Source, ...],
        list_tasks: ListTasksCall,
        *,
        seed: int,
        chunk_tasks: int,
        refuses: Callable[[str, Task], bool] = lambda source, task: False,
    ):
        """`refuses` says which tasks are passed over."""
        self.refuses = refuses
        self._list_tasks, self._seed, self._chunk_tasks = list_tasks, seed, chunk_tasks
        self._labels = [source.label for source in mix]
        weights = np.asarray([source.weight for source in mix])
        self._shares = weights / weights.sum()
        self._shelves: dict[str, _Shelf] = {}
        self.has_group_rewards: dict[str, bool] = {}

    def resume(self, cursors: dict[str, Cursor]) -> None:
        self._shelves = {label: _Shelf(Cursor(epoch=c.epoch, taken=c.taken)) for label, c in cursors.items()}

    async def begin(self) -> None:
        """Fetch the first tasks of every source: what is wrong with one is known before an engine is waited for.

        Errors: as `next`.
        """
        for label in self._labels:
            await self._fetch(label, self._shelves.setdefault(label, _Shelf(Cursor())))

    def source_of(self, group_id: int) -> str:
        """The source that group `group_id` takes its task from."""
        rng = np.random.default_rng((self._seed, group_id))
        return self._labels[int(rng.choice(len(self._labels), p=self._shares))]

    async def open(self, group_id: int, size: int) -> GroupOpened:
        """Group `group_id` of `size` rollouts. Errors: as `next`."""
        label, task, cursor = await self.next(group_id)
        return GroupOpened(
            group_id=group_id,
            source=label,
            task=task,
            size=size,
            cursor_epoch=cursor.epoch,
            cursor_taken=cursor.taken,
            has_group_rewards=self.has_group_rewards[label],
        )

    async def next(self, group_id: int) -> tuple[str, Task, Cursor]:
        """The task of group `group_id`, and its source's cursor after it.

        Errors: UserError, if an environment's `tasks` raised or is empty.
        """
        label = self.source_of(group_id)
        shelf = self._shelves.setdefault(label, _Shelf(Cursor()))
        epoch = shelf.cursor.epoch
        while self.refuses(label, task := await self._take(label, shelf)):
            if shelf.cursor.epoch > epoch + 1:
                raise UserError(f"every task of environment {label!r} is quarantined; see the log of the orchestrator")
        return label, task, shelf.cursor

    async def _take(self, label: str, shelf: _Shelf) -> Task:
        while (index := shelf.cursor.taken - shelf.chunk_start) >= len(shelf.chunk):
            if shelf.chunk and shelf.exhausted:
                shelf.cursor, shelf.chunk, shelf.chunk_start = Cursor(epoch=shelf.cursor.epoch + 1), [], 0
            await self._fetch(label, shelf)
        shelf.cursor = Cursor(epoch=shelf.cursor.epoch, taken=shelf.cursor.taken + 1)
        return shelf.chunk[index]

    async def _fetch(self, label: str, shelf: _Shelf) -> None:
        """Replace the shelf's chunk by the one that holds the cursor."""
        start = shelf.cursor.taken // self._chunk_tasks * self._chunk_tasks
        tasks = await self.read_chunk(label, shelf.cursor.epoch, start)
        order = self.order_of_chunk(shelf.cursor.epoch, start, len(tasks.tasks))
        shelf.chunk = [tasks.tasks[i] for i in order]
        shelf.chunk_start, shelf.exhausted = start, tasks.exhausted or not tasks.tasks
        if shelf.cursor.taken - start >= len(shelf.chunk) and shelf.exhausted:  # the epoch ended at a chunk's edge
            shelf.cursor, shelf.chunk, shelf.chunk_start = Cursor(epoch=shelf.cursor.epoch + 1), [], 0

    async def read_chunk(self, label: str, epoch: int, start: int) -> Tasks:
        """Tasks [start, start + chunk_tasks) in the environment's order. Errors: as `next`."""
        tasks = await self._list_tasks(label, epoch, start, self._chunk_tasks)
        if tasks.error:
            raise UserError(f"environment {label!r} could not list its tasks: {tasks.error}")
        if not tasks.tasks and start == 0:
            raise UserError(f"environment {label!r} has no tasks in epoch {epoch}; its tasks() must yield some")
        self.has_group_rewards[label] = tasks.has_group_rewards
        return tasks

    def order_of_chunk(self, epoch: int, start: int, size: int) -> list[int]:
        """Positions within a chunk in the order they are taken."""
        return np.random.default_rng((self._seed, epoch, start)).permutation(size).tolist()
