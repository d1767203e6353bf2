"""The tasks of an environment as the wire carries them: in the environment's order, with stable keys."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from palestra.core.records import Task
from palestra.env.environment import Environment
from palestra.env.images import require_small

_encoder, _decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Task)
_content_encoder = msgspec.msgpack.Encoder(order="deterministic")


@dataclass
class _Reader:
    epoch: int
    position: int
    rest: Iterator[Task]

    def take(self, offset: int, count: int) -> list[Task]:
        start = self.position + sum(1 for _ in itertools.islice(self.rest, offset - self.position))
        tasks = [as_sent(task, start + i) for i, task in enumerate(itertools.islice(self.rest, count))]
        self.position = start + len(tasks)
        return tasks


class TaskList:
    """Reads an environment's tasks, each epoch with an instance of its own. Not for two threads at once."""

    def __init__(self, make: Callable[[int], Environment]):
        """`make` gives the environment of an epoch."""
        self._make = make
        self._readers: list[_Reader] = []  # at most two: one goes ahead, the other back to tasks that come again

    def take(self, epoch: int, offset: int, count: int) -> tuple[list[Task], bool]:
        """Tasks [offset, offset + count) of the epoch, and whether there is none after them.

        Going on where an earlier call ended costs nothing extra; going back reads the epoch from its start.
        Errors: whatever the environment's `tasks` raises; TypeError for a task that cannot be sent.
        """
        reader = self._reader(epoch, offset)
        try:
            tasks = reader.take(offset, count)
        except BaseException:  # nobody knows how far it got
            self._readers = [kept for kept in self._readers if kept is not reader]
            raise
        return tasks, len(tasks) < count

    def _reader(self, epoch: int, offset: int) -> _Reader:
        """The nearest one before `offset`, or a new one in place of the one that is least far."""
        fitting = [reader for reader in self._readers if reader.epoch == epoch and reader.position <= offset]
        if fitting:
            return max(fitting, key=lambda reader: reader.position)
        ahead = max(self._readers, key=lambda reader: (reader.epoch, reader.position), default=None)
        new = _Reader(epoch, 0, iter(self._make(epoch).tasks()))
        self._readers = [new] if ahead is None else [ahead, new]
        return new


def as_sent(task: Task, position: int) -> Task:
    """The task as `run` and the rewards will see it after the wire, with its key.

    Errors: TypeError naming the task's position, if it holds what cannot be sent; UserError, if an image is too large.
    """
    if not isinstance(task, Task):
        raise TypeError(f"task {position} is {task!r}, not a Task; yield Task(prompt=...)")
    try:
        sent = _decoder.decode(_encoder.encode(task))
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        raise TypeError(f"task {position} cannot be sent: {error}; give it JSON-like values with text keys") from error
    if isinstance(sent.prompt, list):
        require_small(sent.prompt, f"the prompt of task {position}")
        for one in sent.prompt:
            require_small(one.get("content") if isinstance(one, dict) else None, f"the prompt of task {position}")
    return sent if sent.key else msgspec.structs.replace(sent, key=content_key(sent))


def content_key(task: Task) -> str:
    """Depends on what the task says, not on where it stands: 16 hexadecimal digits."""
    return hashlib.blake2b(_content_encoder.encode(task), digest_size=8).hexdigest()
