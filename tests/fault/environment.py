"""An environment of two turns, with rewards of a rollout and of a group, that a table learns from its first step on."""

import os
import signal

from palestra.env import Environment, Task, image, reward


class TwoTurns(Environment):
    """Write letters of the first half of the alphabet, twice."""

    max_turns = 2

    def tasks(self):
        for number in range(64):
            yield Task(prompt="abcdefgh"[number % 8] * (1 + number // 8))

    async def run(self, task, agent):
        await agent(task.prompt)
        await agent("again")

    @reward
    def early(self, task, rollout):
        said = "".join(message["content"] or "" for message in rollout.messages if message["role"] == "assistant")
        return sum(letter < "n" for letter in said) / 24

    @reward(group=True, weight=0.1)
    def longest(self, task, rollouts):
        lengths = [rollout.num_tokens for rollout in rollouts]
        return [float(length == max(lengths)) for length in lengths]


class Deadly(TwoTurns):
    """One of its four tasks kills the process that plays it."""

    def tasks(self):
        yield from (Task(prompt=prompt, key=prompt) for prompt in ("a", "b", "deadly", "d"))

    async def run(self, task, agent):
        await agent(task.prompt)
        if task.prompt == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        await agent("again")


class Shows(TwoTurns):
    """Its second turn sends a picture."""

    async def run(self, task, agent):
        await agent(task.prompt)
        await agent(["again", image(b"\x89PNG\r\n\x1a\n")])


class Raises(TwoTurns):
    """Its reward crashes."""

    @reward
    def early(self, task, rollout):
        raise KeyError("no such column")
