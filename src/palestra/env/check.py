"""What must hold for an environment, without a model: `python -m palestra.env.check ID`, a JSON line per case.

A process of its own, so that an environment that hangs or crashes is a failed case and no more. The laws ask a
`Subject`, which is the environment in this process, or one in a process that is not trusted (env/subject.py).
"""

import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, TextIO

import msgspec

from palestra.core.errors import UserError
from palestra.core.records import Ending, Task
from palestra.env.case import Case
from palestra.env.environment import Environment, seats, tools_of
from palestra.env.load import code_of, find_environment, make_environment
from palestra.env.play import score
from palestra.env.sandbox import Sandboxes
from palestra.env.subject import LISTING_S, OTHER_HASHSEED, About, Failure, Replies, Scored, Subject
from palestra.env.tasklist import TaskList
from palestra.env.voice import Script

MAX_TURNS = 30  # of a script that repeats itself
HUGE = 200_000  # characters: more than a policy says in a reply
_EXACT = 1e-9


class Skip(Exception):
    """Why there is nothing to look at."""


class Here:
    """A subject: an environment in this process, with one set of arguments."""

    def __init__(self, id: str, args: Mapping[str, Any], *, num_tasks: int | None = None):
        """`num_tasks`: None for as many as the environment says."""
        self.id, self.args = id, dict(args)
        self.num_tasks = num_tasks or find_environment(id).checked_tasks
        self._played: dict[str, Environment] = {}

    def make(self, *, split: str = "train", seed: int = 1) -> Environment:
        return make_environment(self.id, split=split, seed=seed, args=self.args)

    def listed(self, *, split: str = "train", seed: int = 1) -> list[Task]:
        """The first ones, as rollouts see them."""
        with code_of(self.id, "cannot list its tasks"):
            found, _ = TaskList(lambda _: self.make(split=split, seed=seed)).take(0, 0, self.num_tasks)
        return found

    async def about(self) -> About:
        environment = find_environment(self.id)
        return About(
            name=environment.__name__,
            doc=str(vars(environment).get("__doc__") or ""),
            seats=list(seats(environment)),
            tools=[tool.name for tool in tools_of(self._environment("train" if self.listed() else "test"))],
            has_mutants=environment.mutants is not Environment.mutants,
        )

    async def tasks(self, split: str) -> list[Task]:
        return self.listed(split=split)

    async def told_elsewhere(self, split: str) -> list[str]:
        """In a process that hashes differently: an order taken from a set differs there."""
        command = [sys.executable, "-m", "palestra.env.check", self.id, "--args", json.dumps(self.args)]
        command += ["--num-tasks", str(self.num_tasks), "--list", split]
        there = ran(command, deadline_s=LISTING_S, PYTHONHASHSEED=OTHER_HASHSEED)
        if there.code is None:
            raise Failure(f"listing them in another process took more than {LISTING_S:g} s")
        if there.code:
            raise Failure(f"listing them in another process failed: {there.err.strip()[-500:]}")
        return there.out.split("\n")[:-1]

    async def score(self, split: str, task: Task, replies: Replies) -> Scored:
        environment = self._environment(split)
        script = replies.given if not replies.odd else odd_scripts(environment)[replies.odd](task)
        record = await score(environment, task, script)
        return Scored(ending=record.ending, reward=record.reward, rewards=record.rewards, error=record.error)

    async def mutants(self, split: str, task: Task) -> list[Any]:
        return list(self._environment(split).mutants(task))

    def _environment(self, split: str) -> Environment:
        """One for all of its tasks."""
        if split not in self._played:
            self._played[split] = self.make(split=split)
        return self._played[split]


class Check:
    """The laws, of one subject."""

    def __init__(self, subject: Subject):
        self._subject = subject

    async def cases(self) -> AsyncIterator[Case]:
        """Of an environment for evaluation alone, by tasks of its test split."""
        split = "train" if await self._subject.tasks("train") else "test"
        tasks, about = await self._subject.tasks(split), await self._subject.about()
        yield await _case("it says what it is", lambda: _is_described(about))
        yield await _case("tasks have keys of their own", lambda: _have_keys(tasks))
        yield await _case("tasks are the same in every process", lambda: self._is_deterministic(split))
        yield await _case("train and test share no task", lambda: self._is_split())
        yield await _case("gold scores 1", lambda: self._gold_scores_1(split, about, tasks))
        yield await _case("nothing scores less", lambda: self._scores_less(split, tasks, lambda _: Replies()))
        if about.has_mutants:
            yield await _case("mutants score less", lambda: self._mutants_score_less(split, about, tasks))
        for name in odd_kinds(about.tools):
            odd = Replies(odd=name)
            yield await _case(f"{name} scores less", lambda odd=odd: self._scores_less(split, tasks, lambda _: odd))

    async def _is_deterministic(self, split: str) -> None:
        here = [told(task) for task in await self._subject.tasks(split)]
        there = await self._subject.told_elsewhere(split)
        if len(here) != len(there):
            raise Failure(f"there are {len(here)} here and {len(there)} in another process")
        for position, (one, other) in enumerate(zip(here, there, strict=True)):
            if one != other:
                raise Failure(f"task {position} is {one[:200]} here and {other[:200]} in another process")

    async def _is_split(self) -> None:
        train, test = await self._subject.tasks("train"), await self._subject.tasks("test")
        if not train or not test:
            raise Skip(f"it has no {'test' if train else 'train'} tasks")
        if shared := {task.key for task in train} & {task.key for task in test}:
            raise Failure(f"{len(shared)} of {len(train)} are in both, such as {shared.pop()!r}")

    async def _gold_scores_1(self, split: str, about: About, tasks: Sequence[Task]) -> None:
        known = [task for task in tasks if task.gold is not None]
        if not known:
            raise Skip("its tasks have no gold")
        for task in known:
            found = await self._scored(split, task, Replies(given=_gold(about.seats, task.gold)))
            if abs(found.reward - 1) > _EXACT:
                raise Failure(f"task {task.key!r}: gold {_short(task.gold)} scores {found.reward:g}: {found.rewards}")

    async def _scores_less(self, split: str, tasks: Sequence[Task], replies: Callable[[Task], Replies]) -> None:
        for task in tasks:
            found = await self._scored(split, task, replies(task))
            if not found.reward < 1:
                raise Failure(f"task {task.key!r}: scores {found.reward:g}: {found.rewards}")

    async def _mutants_score_less(self, split: str, about: About, tasks: Sequence[Task]) -> None:
        for task in tasks:
            for mutant in await self._subject.mutants(split, task):
                known = msgspec.structs.replace(task, gold=mutant)
                replies = Replies(given=_gold(about.seats, mutant))
                await self._scores_less(split, [known], lambda _, replies=replies: replies)

    async def _scored(self, split: str, task: Task, replies: Replies) -> Scored:
        found = await self._subject.score(split, task, replies)
        if found.ending == Ending.INVALID:
            raise Failure(f"task {task.key!r}: {found.error}")
        return found


async def _case(name: str, hold: Callable[[], Any]) -> Case:
    try:
        held = hold()
        if asyncio.iscoroutine(held):
            await held
    except Skip as skip:
        return Case(name=name, ending="skipped", detail=str(skip))
    except Exception as error:  # an environment may raise anything
        words = str(error) if isinstance(error, Failure | UserError) else f"{type(error).__name__}: {error}"
        return Case(name=name, ending="failed", detail=words)
    return Case(name=name, ending="passed")


# --- laws


def _is_described(about: About) -> None:
    if not about.doc.strip():
        raise Failure(f"class {about.name} has no docstring; say in it what the task is")


def _have_keys(tasks: Sequence[Task]) -> None:
    if not tasks:
        raise Failure("`tasks` gives none, neither for the split train nor for test")
    for one, other in itertools.combinations(range(len(tasks)), 2):
        if tasks[one].key == tasks[other].key and tasks[one] != tasks[other]:
            raise Failure(f"tasks {one} and {other} differ and have one key, {tasks[one].key!r}")


def gold_script(environment: Environment, task: Task) -> Script | dict[str, Script]:
    """The replies of one who knows the answer: `gold` is one or a list of them, turn after turn; or these by seat."""
    return _gold(list(seats(type(environment))), task.gold)


def _gold(of_seats: Sequence[str], gold: Any) -> list[Any] | dict[str, list[Any]]:
    if isinstance(gold, dict) and gold.keys() <= set(of_seats):
        return {seat: _turns(of_seat) for seat, of_seat in gold.items()}
    return _turns(gold)


def _turns(gold: Any) -> list[Any]:
    return list(gold) if isinstance(gold, list) else [gold]


# --- odd replies


def odd_scripts(environment: Environment) -> dict[str, Callable[[Task], Script]]:
    """What a policy may say before it has learnt anything, turn after turn; the same for the same task."""
    kinds = odd_kinds([tool.name for tool in tools_of(environment)])
    return {name: lambda task, say=say: _repeated(say, task) for name, say in kinds.items()}


def odd_kinds(tools: Sequence[str]) -> dict[str, Callable[[random.Random], Any]]:
    return {
        "an empty reply": lambda _: "",
        "random bytes": lambda chance: chance.randbytes(300).decode("utf-8", "replace"),
        "a huge reply": lambda chance: chance.choice(["a", "1 ", "(", "é", "\n"]) * HUGE,
        "half of a JSON": lambda chance: '{"answer": [1, {"b": "' + "x" * chance.randrange(20),
        "markup": lambda chance: "".join(chance.choices(_MARKUP, k=12)),
        "numbers that are none": lambda chance: chance.choice(["nan", "inf", "1e999", "-0", "1/0", "٣"]),
        "a call of a tool that is not there": lambda _: {"calls": [("no_such_tool", {"x": 1})]},
        "calls that fit no tool": lambda chance: {"calls": [(chance.choice(tools or ["a"]), _arguments(chance))] * 2},
    }


_MARKUP = ["<answer>", "</answer>", "<think>", "</think>", "\\boxed{", "}", "```", "<", "&amp;", "[[", "]]", "\0", "42"]


def _arguments(chance: random.Random) -> Any:
    return chance.choice([None, "", '{"a": ', [], {"": ""}, '{"x": ' + "9" * 30 + "}", {"a": None}, 7])


def _repeated(say: Callable[[random.Random], Any], task: Task) -> Iterator[Any]:
    chance = random.Random(task.key)
    return (say(chance) for _ in range(MAX_TURNS))


# --- the process


class Ran(NamedTuple):
    """What a process said. `code`: None, if it did not end in time."""

    code: int | None
    out: str
    err: str


def ran(command: Sequence[str], *, deadline_s: float, **environ: str) -> Ran:
    """It writes to files: with pipes, a program that it leaves in the background would be waited for too."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            ended = subprocess.run(
                command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, timeout=deadline_s, env=os.environ | environ
            )
            code = ended.returncode
        except subprocess.TimeoutExpired:
            code = None
        return Ran(code, _written(out), _written(err))


def _written(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def told(task: Task) -> str:
    return msgspec.json.encode(task).decode()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


async def _run(id: str, args: dict[str, Any] | None, num_tasks: int | None, sandbox: str | None, out: TextIO) -> None:
    variants = [args] if args is not None else [dict(args) for args in find_environment(id).checked_with]
    for variant in variants:
        name = f" ({json.dumps(variant)})" if len(variants) > 1 else ""
        async with Sandboxes(sandbox):
            async for case in Check(Here(id, variant, num_tasks=num_tasks)).cases():
                print(json.dumps(msgspec.to_builtins(msgspec.structs.replace(case, name=case.name + name))), file=out)


def main() -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m palestra.env.check")
    parser.add_argument("id")
    parser.add_argument("--args", type=json.loads)
    parser.add_argument("--num-tasks", type=int)
    parser.add_argument("--sandbox", help="where programs of its rollouts run")
    parser.add_argument("--list", metavar="SPLIT", help="print the tasks, and check nothing")
    asked = parser.parse_args()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the environment prints is not what the check says
    try:
        if asked.list:
            here = Here(asked.id, asked.args or {}, num_tasks=asked.num_tasks)
            out.writelines(f"{told(task)}\n" for task in here.listed(split=asked.list))
        else:
            asyncio.run(_run(asked.id, asked.args, asked.num_tasks, asked.sandbox, out))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
