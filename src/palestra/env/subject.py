"""What the laws of an environment ask it, wherever it runs: in this process, or in one that is not trusted.

`Boxed` is the judge's side of a process in a sandbox: it asks, the environment's process answers, and what the answers
mean is decided here. Whatever that process prints, it can answer wrongly and no more: there is no word that means
"passed".
"""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import msgspec
from msgspec import Struct

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError
from palestra.core.records import Ending, Task
from palestra.sandbox.box import Process, Sandbox

LISTING_S = 120.0
OTHER_HASHSEED = "12345"
_MOST_ANSWER = 16 << 20
_Answer = TypeVar("_Answer")


class Failure(Exception):
    """What does not hold, in words."""


class About(Struct, frozen=True, kw_only=True):
    """`name` and `doc` of the class; names of its seats and tools."""

    name: str
    doc: str
    seats: list[str]
    tools: list[str]
    has_mutants: bool


class Replies(Struct, frozen=True, kw_only=True):
    """What agents say: `given`, one a turn, or by seat; or a kind of `check.odd_kinds`."""

    given: list[Any] | dict[str, list[Any]] = []
    odd: str = ""


class Scored(Struct, frozen=True, kw_only=True):
    ending: Ending
    reward: float
    rewards: dict[str, float] = {}
    error: str = ""


class Subject(Protocol):
    """Errors of all: Failure and UserError, in words; whatever an environment raises."""

    async def about(self) -> About: ...

    async def tasks(self, split: str) -> list[Task]: ...

    async def told_elsewhere(self, split: str) -> list[str]:
        """The same tasks as JSON, from a process that hashes differently."""
        ...

    async def score(self, split: str, task: Task, replies: Replies) -> Scored: ...

    async def mutants(self, split: str, task: Task) -> list[Any]: ...


class Question(Struct, frozen=True, kw_only=True):
    """One line to the process. `number` comes back with the answer."""

    number: int
    do: str
    split: str = ""
    task: Task | None = None
    replies: Replies = Replies()


class Answer(Struct, frozen=True, kw_only=True):
    number: int
    value: Any = None
    error: str = ""


class Boxed:
    """A subject in a sandbox: `python -m palestra.env.player` there, asked line by line.

    Errors of all: Failure, also where the process ends, is late or says what is no answer; SandboxError.
    """

    def __init__(
        self, box: Sandbox, id: str, args: Mapping[str, Any], *, num_tasks: int, env: Mapping[str, str], answer_s: float
    ):
        self._box, self._env, self._answer_s = box, dict(env), answer_s
        given = msgspec.json.encode(args).decode()
        self._words = [id, "--args", given, "--num-tasks", str(num_tasks)]
        self._process: Process | None = None
        self._number, self._rest = 0, b""
        self._listed: dict[str, list[Task]] = {}
        self.said = b""  # the end of what it printed

    async def about(self) -> About:
        return await self._ask(About, "about")

    async def tasks(self, split: str) -> list[Task]:
        if split not in self._listed:
            self._listed[split] = await self._ask(list[Task], "tasks", split=split)
        return self._listed[split]

    async def told_elsewhere(self, split: str) -> list[str]:
        command = ["python3", "-m", "palestra.env.check", *self._words, "--list", split]
        env = {**self._env, "PYTHONHASHSEED": OTHER_HASHSEED}
        there = await self._box.exec(command, env=env, timeout_s=LISTING_S, max_output=_MOST_ANSWER)
        if there.status != "ok":
            raise Failure(f"listing them in another process: {there.status}: {there.stderr.strip()[-500:]}")
        return there.stdout.split("\n")[:-1]

    async def score(self, split: str, task: Task, replies: Replies) -> Scored:
        return await self._ask(Scored, "score", split=split, task=task, replies=replies)

    async def mutants(self, split: str, task: Task) -> list[Any]:
        return await self._ask(list[Any], "mutants", split=split, task=task)

    async def close(self) -> None:
        if self._process is not None:
            await self._process.forget()

    async def _ask(self, kind: type[_Answer], do: str, **what: Any) -> _Answer:
        self._number += 1
        question = Question(number=self._number, do=do, **what)
        try:
            line = await within(self._answer_s, self._line(question), waiting_for=f"the environment's answer to {do!r}")
        except (DeadlineError, OSError) as error:
            raise Failure(f"{error}{self._last_words()}") from None
        try:
            answer = msgspec.json.decode(line, type=Answer)
            if answer.number != self._number:
                raise Failure(f"its process answered {answer.number} to question {self._number}")
            if answer.error:
                raise Failure(answer.error[:2000])
            return msgspec.convert(answer.value, kind)
        except msgspec.DecodeError as error:
            raise Failure(f"its process said what is no answer to {do!r}: {error}: {line[:200]!r}") from None

    async def _line(self, question: Question) -> bytes:
        if self._process is None:
            command = ["python3", "-m", "palestra.env.player", *self._words]
            self._process = await self._box.open_process(command, env=self._env)
        await self._process.send(msgspec.json.encode(question) + b"\n")
        while b"\n" not in self._rest:
            out, err = await self._process.read()
            self.said = (self.said + err)[-20_000:]
            self._rest += out
            if len(self._rest) > _MOST_ANSWER:
                raise OSError(f"its process answered more than {_MOST_ANSWER} bytes")
            if self._process.has_ended and not out:
                raise OSError("its process has ended")
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def _last_words(self) -> str:
        words = self.said.decode("utf-8", "replace").strip()[-500:]
        return f": {words}" if words else ""
