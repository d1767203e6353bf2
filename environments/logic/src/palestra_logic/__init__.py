"""Puzzles that thinking alone solves, at three levels."""

from collections.abc import Iterator
from itertools import chain, zip_longest
from typing import Any, Literal

from palestra_reasoning_gym import IN_TAGS, PLAIN, ReasoningGym

from palestra.core.errors import UserError
from palestra.env import Environment, Rollout, Task, metric, reward
from palestra_logic.levels import LEVELS


class Logic(Environment):
    """Puzzles of reasoning-gym's generators, which take turns, at the level `easy`, `normal` or `hard`.

    An answer is right if the generator's own verifier gives it all it can; with `partial` it earns what that gives.
    With `tags` the answer stands inside <answer> tags; otherwise it is the whole reply, for models too small for tags.
    """

    level: Literal["easy", "normal", "hard"] = "normal"
    generators: list[str] = []  # of the level; none named: all
    size: int = 1000
    partial: bool = False
    tags: bool = True
    max_turns = 1
    checked_with = ({"level": "easy"}, {"level": "normal"}, {"level": "hard"}, {"level": "easy", "tags": False})

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.system = self.system or (IN_TAGS if self.tags else PLAIN)
        self._puzzles = {name: self._make(name) for name in self.generators or LEVELS[self.level]}

    def _make(self, generator: str) -> ReasoningGym:
        known = LEVELS[self.level]
        if generator not in known:
            raise UserError(f"level={self.level!r} has no generator {generator!r}; it has: {', '.join(known)}")
        options: dict[str, Any] = {"split": self.split, "seed": self.seed, "size": self.size, "tags": self.tags}
        return ReasoningGym(generators=generator, config=known[generator], **options)

    def tasks(self) -> Iterator[Task]:
        together = zip_longest(*(puzzle.tasks() for puzzle in self._puzzles.values()))
        return (task for task in chain.from_iterable(together) if task is not None)

    @reward
    async def correct(self, task: Task, rollout: Rollout) -> float:
        earned = await self._puzzles[task.info["generator"]].correct(task, rollout)
        return earned if self.partial else float(earned == 1)

    @metric
    def answered(self, task: Task, rollout: Rollout) -> bool:
        return self._puzzles[task.info["generator"]].answered(task, rollout)
