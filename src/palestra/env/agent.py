"""The agent as an environment's `run` sees it: something that can be asked for the next turn."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

from palestra.core.errors import UserError
from palestra.core.records import PieceCredit, Sample
from palestra.env.endings import Limit
from palestra.env.images import Message, chat_messages, require_room
from palestra.env.tools import Tool, ToolBox
from palestra.env.voice import Said, Voice

if TYPE_CHECKING:
    from palestra.env.proxy import Proxy

Tools = Iterable[Callable[..., Any] | Tool]


@dataclass(frozen=True)
class Limits:
    """Of each agent of a rollout; None: the context alone. `tool_s`: seconds of one call of a tool."""

    max_turns: int | None = None
    max_tokens: int | None = None
    tool_s: float = 60.0

    def room(self, name: str, spent: "Spent") -> int | None:
        """How many tokens the next reply of `name` may have. Errors: Limit, if there may be none."""
        if self.max_turns is not None and spent.turns >= self.max_turns:
            raise Limit(f"{name} has had max_turns={self.max_turns} turns")
        if self.max_tokens is None:
            return None
        if spent.tokens >= self.max_tokens:
            raise Limit(f"{name} has said max_tokens={self.max_tokens} tokens")
        return self.max_tokens - spent.tokens


@dataclass
class Spent:
    """By a seat, forks included. `last` is the turn of it that was played last."""

    turns: int = 0
    tokens: int = 0
    prompt_tokens: int = 0  # of all its turns, each prompt in full
    last: tuple[int, Said] | None = None


class Door(Protocol):
    """Where a program can speak for an agent."""

    @property
    def url(self) -> str: ...

    @property
    def key(self) -> str: ...

    async def close(self) -> None:
        """Nothing is answered any more."""
        ...


class Table:
    """What the agents of one rollout share. `stopped` is its first failure, else its first limit: no turn follows.

    `admit` lets a program in that speaks for one of them, until `close`.
    """

    def __init__(
        self, limits: Limits, *, seed: int, admit: "Callable[[Agent], Door] | None" = None, is_rollout: bool = True
    ):
        """What is no rollout has no end that a failure would be: the next turn is tried."""
        self.limits, self.seed, self._is_rollout = limits, seed, is_rollout
        self.stopped: BaseException | None = None
        self._admit, self._doors = admit, list[Door]()

    def open_door(self, agent: "Agent") -> Door:
        self._doors.append(door := self._admit(agent) if self._admit is not None else self._own_proxy.admit(agent))
        return door

    @cached_property
    def _own_proxy(self) -> "Proxy":
        """Where no worker has one for all its rollouts."""
        from palestra.env.proxy import Proxy

        return Proxy()

    async def close(self) -> None:
        for door in self._doors:
            await door.close()
        if "_own_proxy" in vars(self):
            await self._own_proxy.close()

    @contextmanager
    def stops(self) -> Iterator[None]:
        """What is raised inside is the end of the rollout, whoever catches it on its way."""
        if self.stopped is not None:
            raise self.stopped
        try:
            yield
        except asyncio.CancelledError:
            raise
        except BaseException as stopped:
            if self._is_rollout and (self.stopped is None or isinstance(self.stopped, Limit)):
                self.stopped = stopped
            raise


class Agent:
    """One seat of a rollout. `await agent(message)` sends a message and plays on to an answer; tokens are kept below.

    `rewards` are this seat's own, added to what the environment's `@reward` methods give and `credit` gave. `tools` may
    be set before the first turn. `calls` are the tool calls of the last reply, as chat messages hold them.
    """

    def __init__(self, name: str, voice: Voice, table: Table, *, system: str | None = None, tools: Tools = ()):
        self.name, self.system = name, system
        self.messages: list[dict[str, Any]] = []
        self.rewards: dict[str, float] = {}
        self.calls: list[dict[str, Any]] = []
        self.num_turns = self.num_tokens = 0
        self._own_tokens = 0  # said by itself: of a fork, since it was one
        self._last: tuple[int, Said] | None = None  # turn of this conversation: its number, and what was said in it
        self.credits: dict[int, dict[str, float]] = {}  # by turn of the seat
        self.piece_credits: list[PieceCredit] = []  # of these
        self._spent = Spent()
        self.tool_box = ToolBox(tools)
        self._schemas: list[dict[str, Any]] | None = None  # of the tools that a program offers by itself
        self._voice, self._table = voice, table
        self._before: list[Voice] = []  # of conversations that were cut
        self._kept: list[dict[str, Any]] = []  # what the next one begins with
        self.turns_here = 0  # in this conversation
        self._cut: tuple[list[dict[str, Any]], int] = [], 0  # the last one that was cut after a turn
        self._is_stopped = False
        self._unheard: list[dict[str, Any]] = []  # the last of `messages`: what tools gave, for the next turn
        self._forks: list[Agent] = []
        self._path = ""  # of a fork: which one, of whom

    async def __call__(self, message: Message | None = None, *, num_tokens: int | None = None) -> str:
        """Send `message`, play turns until a reply calls no tool; returns it. A message is the user's text, a list of
        the user's texts and images (`image(...)`), or chat messages.

        With `num_tokens` a reply has exactly so many tokens, whatever the policy would end it with: for measurements.
        When a limit of turns or tokens is reached `run` ends here and its rollout is scored as it is.
        """
        self._is_stopped = False
        await self.turn(message, num_tokens=num_tokens)
        while self.calls:
            voice, results = self._voice, await self.use_tools()
            if self._voice is voice:  # else a tool cut the context, and its results with it
                self._unheard = results
                self.messages += results
            if self._is_stopped:
                break
            await self.turn(num_tokens=num_tokens)
        return self.reply

    async def turn(self, message: Message | None = None, *, num_tokens: int | None = None) -> str:
        """Play one turn: `message`, then one reply. What it calls is in `calls`: `use_tools` answers."""
        with self._table.stops():
            await self._turn(chat_messages(message), num_tokens)
        return self.reply

    async def relay(
        self, messages: list[dict[str, Any]], *, schemas: list[dict[str, Any]], at_most: int | None
    ) -> Said:
        """One turn for a program that speaks for itself: its messages, its tools, its limit of tokens, which ends
        nothing but the reply. Errors: UserError, if the model's template refuses the messages, or their images are too
        large; nothing has changed."""
        self._require_room(messages)
        refused: UserError | None = None
        with self._table.stops():
            room = self._table.limits.room(self.name, self._spent)
            self._schemas = schemas
            fewest = min((limit for limit in (room, at_most) if limit is not None), default=None)
            try:
                return await self._say(messages, schemas, at_most=fewest)
            except UserError as error:
                refused = error
        del self.messages[len(self.messages) - len(messages) :]
        self._spent.turns -= 1
        raise refused

    async def use_tools(self) -> list[dict[str, Any]]:
        """Run what the last reply calls, all at the same time: the messages of the next turn."""
        calls, self.calls = self.calls, []
        with self._table.stops():
            return await self.tool_box.answer(calls, timeout_s=self._table.limits.tool_s)

    def credit(self, name: str, amount: float, *, of: str | None = None) -> None:
        """Add to the reward `name` what this agent's last turn earned: later turns are neither praised nor blamed for
        it. Forks have last turns of their own; of an agent for which programs speak it is that which was played last.

        With `of`, a piece of the turn's text that earned it, neither are the tokens behind that piece, where it stands
        last. Rewards without a turn (`rewards`, the environment's methods) are for all turns alike.

        Errors: ValueError, if nothing was said, or not `of`.
        """
        last = self._last or self._spent.last
        if last is None:
            raise ValueError(f"{self.name} has said nothing that could earn the reward {name!r}")
        turn, said = last
        pieces = [] if of is None else [PieceCredit(turn, said.up_to(of), amount)]
        of_turn = self.credits.setdefault(turn, {})
        of_turn[name] = of_turn.get(name, 0.0) + amount
        self.piece_credits += pieces

    def stop(self) -> None:
        """For a tool that ends the matter: no turn follows its result."""
        self._is_stopped = True

    @property
    def tools(self) -> tuple[Tool, ...]:
        return self.tool_box.tools

    @tools.setter
    def tools(self, tools: Tools) -> None:
        if self.messages:
            raise ValueError(f"the tools of {self.name} are set after its first turn; set them before it")
        self.tool_box = ToolBox(tools)

    def compact(self, messages: Message | None = None) -> None:
        """Cut the context: the next turn begins anew with the system message and `messages`.

        What was said before trains as it was.
        """
        if self.turns_here:
            self._cut = self.messages, self.turns_here
        self._before.append(self._voice)
        self._voice, self._kept = self._voice.fresh(), chat_messages(messages)
        self.messages, self.calls, self._unheard, self.turns_here = [], [], [], 0

    async def _turn(self, messages: list[dict[str, Any]], num_tokens: int | None) -> None:
        messages, self._kept = [*self._kept, *messages], []
        if not self.messages and self.system and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": self.system}, *messages]
        at_most = self._table.limits.room(self.name, Spent(self.num_turns, self.num_tokens))
        if self.turns_here and any(message["role"] == "assistant" for message in messages):
            raise ValueError(
                f"a message to {self.name} has the role assistant; only the first turn may quote earlier replies"
            )
        self._require_room(messages)
        said = await self._say(messages, self.tool_box.schemas, num_tokens=num_tokens, at_most=at_most)
        self.calls = list(said.message.get("tool_calls", ())) if self.tool_box else []
        if said.is_cut and not isinstance(self, Frozen):
            raise Limit(f"a reply of {self.name} was cut off after {said.num_tokens} tokens")

    def _require_room(self, messages: list[dict[str, Any]]) -> None:
        """Errors: UserError, if the conversation's images would be too large."""
        require_room([*self.messages, *messages], f"the conversation of {self.name}")

    async def _say(
        self,
        messages: list[dict[str, Any]],
        schemas: list[dict[str, Any]],
        *,
        num_tokens: int | None = None,
        at_most: int | None = None,
    ) -> Said:
        self.messages += messages
        unheard, self._unheard = self._unheard, []
        turn, self._spent.turns = self._spent.turns, self._spent.turns + 1
        said = await self._voice.say(
            [*unheard, *messages], tools=schemas, num_tokens=num_tokens, at_most=at_most, turn=turn
        )
        self.messages.append(said.message)
        self.num_turns, self.turns_here = self.num_turns + 1, self.turns_here + 1
        self.num_tokens += said.num_tokens
        self._own_tokens += said.num_tokens
        self._spent.tokens += said.num_tokens
        self._spent.prompt_tokens += said.num_prompt_tokens
        self._last = self._spent.last = turn, said
        return said

    @property
    def reply(self) -> str:
        """The last turn's answer without its reasoning; "" before the first turn and while thinking is unfinished."""
        return next(reversed(replies(*self.shown.last_words)), "")

    @property
    def shown(self) -> "Agent":
        """Whose conversation people see: its own, or of those of the program that spoke for it the longest, and of
        these the one that was gone on with last."""
        if self.messages:
            return self
        return max(self._forks, key=lambda fork: (fork.num_turns, fork._last[0] if fork._last else -1), default=self)

    @property
    def last_words(self) -> tuple[list[dict[str, Any]], int]:
        """Messages and turns of its last conversation in which it had a turn."""
        return (self.messages, self.turns_here) if self.turns_here or not self._cut[1] else self._cut

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """Of the tools that it was told of."""
        return self.tool_box.schemas if self._schemas is None else self._schemas

    @cached_property
    def _door(self) -> Door:
        if self.messages:
            raise ValueError(
                f"{self.name} has spoken; a program that speaks for it must be let in before its first turn"
            )
        return self._table.open_door(self)

    @property
    def url(self) -> str:
        """Where a program finds this agent as a model: OpenAI chat completions and responses, Anthropic messages.

        With and without `/v1`. The program must present `key`, and is its only one. Whatever it asks is recorded with
        exact tokens and trains under this seat; a history that it edits begins a new sample.
        """
        return self._door.url

    @property
    def key(self) -> str:
        """What the program at `url` must present. Give it by its environment or a file, never by its arguments."""
        return self._door.key

    @cached_property
    def random(self) -> Random:
        """Chance for the environment: the same whenever this rollout is played again. A fork has its own."""
        return Random(f"{self._table.seed} {self.name}{self._path}")

    def fork(self) -> "Agent":
        """An agent that has had this conversation and goes on from here by itself; its turns train under this seat."""
        fork = type(self)(self.name, self._voice.fork(), self._table, system=self.system)
        fork.tool_box, fork._unheard = self.tool_box, list(self._unheard)
        fork.messages, fork.num_turns, fork.rewards = list(self.messages), self.num_turns, self.rewards
        fork.turns_here, fork._kept = self.turns_here, list(self._kept)
        fork.num_tokens, fork.calls = self.num_tokens, list(self.calls)
        fork.credits, fork.piece_credits, fork._spent = self.credits, self.piece_credits, self._spent
        fork._last, fork._path = self._last, f"{self._path}.{len(self._forks)}"
        self._forks.append(fork)
        return fork

    @property
    def num_said(self) -> int:
        """Tokens that this seat said, forks included."""
        return self._own_tokens + sum(fork.num_said for fork in self._forks)

    @property
    def num_heard(self) -> int:
        """Tokens of the prompts of all its turns, forks included, each prompt in full."""
        return self._spent.prompt_tokens

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Everything this seat said, before it was cut and in forks too."""
        voices = [*self._before, self._voice]
        said = [sample for voice in voices for sample in voice.samples()]
        return (*said, *(sample for fork in self._forks for sample in fork.samples))


class Frozen(Agent):
    """A seat that never trains: a user, an opponent. The recipe names who speaks for it (`seats` of its entry), else
    the policy does. It starts with neither the environment's system message nor its tools: `run` gives it its own.
    """


def replies(messages: list[dict[str, Any]], num_turns: int) -> list[str]:
    """What was said in each turn, without reasoning. Replies that the prompt quotes come first and do not count."""
    spoken = [message.get("content") or "" for message in messages if message["role"] == "assistant"]
    return spoken[len(spoken) - num_turns :]
