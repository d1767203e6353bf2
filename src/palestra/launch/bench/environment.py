"""An environment whose replies have lengths of a given law, so that runs are compared on the same work."""

import itertools
from collections.abc import Iterator
from random import Random

from palestra.env import Agent, Environment, Rollout, Task, reward
from palestra.launch.bench.lengths import LengthLaw

_EARLY = frozenset("abcdefghijklm")


class ForcedLengths(Environment):
    """A prompt of `prompt_tokens` letters; a reply of a length drawn from the rollout's own chance.

    The reward is the share of letters of the first half of the alphabet, which differs within every group.
    """

    prompt_tokens: int = 16
    median_tokens: int = 64
    sigma: float = 1.0
    cap: float = 16.0
    alphabet: str = "abcdefghijklmnopqrstuvwxyz"

    @property
    def law(self) -> LengthLaw:
        return LengthLaw(self.median_tokens, self.sigma, self.cap)

    def tasks(self) -> Iterator[Task]:
        for number in itertools.count():
            letters = Random(f"{self.split} {self.seed} {number}").choices(self.alphabet, k=self.prompt_tokens)
            yield Task(prompt="".join(letters), key=str(number))

    async def run(self, task: Task, agent: Agent) -> None:
        await agent(task.prompt, num_tokens=self.law.draw(agent.random))

    @reward
    def early(self, task: Task, rollout: Rollout) -> float:
        return sum(letter in _EARLY for letter in rollout.reply) / max(rollout.num_tokens, 1)
