"""The agent as an environment's `run` sees it: something that can be asked for the next turn."""

import asyncio
from functools import cached_property
from random import Random
from typing import Any

from palestra.core.records import Sample
from palestra.env.voice import Limit, Voice

Message = str | dict[str, Any] | list[dict[str, Any]]


class Table:
    """What the agents of one rollout share. `stopped` is the first limit or failure: no turn follows it."""

    def __init__(self, *, max_turns: int | None, seed: int):
        self.max_turns, self.seed = max_turns, seed
        self.stopped: BaseException | None = None


class Agent:
    """One seat of a rollout. `await agent(message)` sends a message and plays one turn; tokens are recorded below it.

    `rewards` are this seat's own, added to what the environment's `@reward` methods give.
    """

    def __init__(self, name: str, voice: Voice, table: Table, *, system: str | None = None):
        self.name, self.system = name, system
        self.messages: list[dict[str, Any]] = []
        self.rewards: dict[str, float] = {}
        self.num_turns = self.num_tokens = 0
        self._voice, self._table = voice, table
        self._forks: list[Agent] = []
        self._path = ""  # of a fork: which one, of whom

    async def __call__(self, message: Message | None = None, *, num_tokens: int | None = None) -> str:
        """Play one turn: `message` (text of the user, or chat messages), then the reply, which is returned.

        With `num_tokens` the reply has exactly so many tokens, whatever the policy would end it with: for measurements.
        When a limit of turns or tokens is reached `run` ends here and its rollout is scored as it is.
        """
        if self._table.stopped is not None:
            raise self._table.stopped
        try:
            await self._turn(_messages(message), num_tokens)
        except asyncio.CancelledError:
            raise
        except BaseException as stopped:
            self._table.stopped = stopped
            raise
        return self.reply

    async def _turn(self, messages: list[dict[str, Any]], num_tokens: int | None) -> None:
        if not self.messages and self.system and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": self.system}, *messages]
        if self._table.max_turns is not None and self.num_turns >= self._table.max_turns:
            raise Limit(f"{self.name} has had max_turns={self._table.max_turns} turns")
        if self.num_turns and any(message["role"] == "assistant" for message in messages):
            raise ValueError(
                f"a message to {self.name} has the role assistant; only the first turn may quote earlier replies"
            )
        self.messages += messages
        said = await self._voice.say(messages, num_tokens=num_tokens)
        self.messages.append(said.message)
        self.num_turns += 1
        self.num_tokens += said.num_tokens
        if said.is_cut:
            raise Limit(f"a reply of {self.name} was cut off after {said.num_tokens} tokens")

    @property
    def reply(self) -> str:
        """The last turn's answer without its reasoning; "" before the first turn and while thinking is unfinished."""
        return next(reversed(replies(self.messages, self.num_turns)), "")

    @cached_property
    def random(self) -> Random:
        """Chance for the environment: the same whenever this rollout is played again. A fork has its own."""
        return Random(f"{self._table.seed} {self.name}{self._path}")

    def fork(self) -> "Agent":
        """An agent that has had this conversation and goes on from here by itself; its turns train under this seat."""
        fork = Agent(self.name, self._voice.fork(), self._table, system=self.system)
        fork.messages, fork.num_turns, fork.rewards = list(self.messages), self.num_turns, self.rewards
        fork._path = f"{self._path}.{len(self._forks)}"
        self._forks.append(fork)
        return fork

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Everything this seat said, forks included."""
        return sum((fork.samples for fork in self._forks), self._voice.samples())


def replies(messages: list[dict[str, Any]], num_turns: int) -> list[str]:
    """What was said in each turn, without reasoning. Replies that the prompt quotes come first and do not count."""
    spoken = [message.get("content") or "" for message in messages if message["role"] == "assistant"]
    return spoken[len(spoken) - num_turns :]


def _messages(message: Message | None) -> list[dict[str, Any]]:
    if message is None:
        return []
    if isinstance(message, str):
        return [{"role": "user", "content": message}]
    return [message] if isinstance(message, dict) else list(message)
