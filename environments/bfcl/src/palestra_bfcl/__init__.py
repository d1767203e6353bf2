"""Function calling, with the data of the Berkeley Function Calling Leaderboard."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from random import Random
from typing import Any

import msgspec

from palestra.env import Environment, Task, Tool
from palestra.env.tools import ToolBox
from palestra_bfcl.answers import Call, gold, is_right
from palestra_bfcl.data import ANY_CALL, MULTI_TURN, NO_CALL, ONE_ANSWER, api, chosen, rows, told
from palestra_bfcl.world import World, contains, written_call

MOST_STEPS = 20  # replies with calls, to one message
MORE_FUNCTIONS = "There are more functions now:\n{}\nCan you do it with them?"


class FunctionCalling(Environment):
    """Call the functions that a message asks for, with the right arguments; of many messages, after each of them.

    The data is a benchmark: all of it belongs to the split `test`, save the share that is given to `train`.
    """

    categories: str | list[str] = list(ONE_ANSWER[:4])
    train_share: float = 0.0
    checked_with = (
        {},
        {"categories": ["live_simple", "live_parallel_multiple", "simple_java"], "train_share": 0.5},
        {"categories": "multi_turn"},
    )

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self._categories = chosen(self.categories)

    def tasks(self) -> Iterator[Task]:
        found = [row for category in self._categories for row in rows(category)]
        for row in Random(f"{self.split} {self.seed}").sample(found, len(found)):
            if (place(row["id"]) < self.train_share) == (self.split == "train"):
                yield many_messages(row) if row["category"] in MULTI_TURN else one_message(row)

    async def run(self, task, agent):
        agent.rewards["correct"] = 0.0  # stands if a reply is cut off
        if task.info["category"] in MULTI_TURN:
            agent.rewards["correct"] = float(await carries_on(task, agent))
        else:
            agent.tools = [Tool(**function, function=str) for function in task.info["functions"]]
            await agent.turn(task.prompt)
            calls = [(call["function"]["name"], call["function"]["arguments"]) for call in agent.calls]
            agent.rewards["correct"] = float(is_answer(task, calls))


def one_message(row: dict[str, Any]) -> Task:
    functions = [told(function) for function in row["function"]]
    info = {"category": row["category"], "functions": functions}
    task = Task(key=row["id"], prompt=row["question"][0], answer=row["answer"], info=info)
    calls = gold(row["answer"] or [], functions)
    known = {"calls": calls, "content": "" if calls else "None of the functions does this."}
    return msgspec.structs.replace(task, gold=known) if is_answer(task, calls) else task


def is_answer(task: Task, calls: Sequence[Call]) -> bool:
    if task.info["category"] in NO_CALL:
        return not calls
    if task.info["category"] in ANY_CALL:
        names = {function["name"] for function in task.info["functions"]}
        return any(name in names and isinstance(arguments, dict) for name, arguments in calls)
    return is_right(calls, task.answer, task.info["functions"])


def many_messages(row: dict[str, Any]) -> Task:
    """`functions` are there from the start, `more` from a message on."""
    described = {function["name"]: function for name in row["involved_classes"] for function in api(name)}
    later = {int(turn): names for turn, names in row.get("missed_function", {}).items()}
    away = {*row.get("excluded_function", ()), *(name for names in later.values() for name in names)}
    more = [[told(described[name]) for name in later.get(turn, ())] for turn in range(len(row["question"]))]
    answer = [[written_call(call, list(described.values())) for call in calls] for calls in row["answer"]]
    info = {
        "category": row["category"],
        "functions": [told(function) for name, function in described.items() if name not in away],
        "more": more,
        "messages": [messages or announced(new) for messages, new in zip(row["question"], more, strict=True)],
        "apis": row["involved_classes"],
        "config": row["initial_config"],
    }
    return Task(key=row["id"], prompt=row["question"][0], answer=answer, gold=known_replies(answer, info), info=info)


def known_replies(answer: list[list[Call]], info: dict[str, Any]) -> list[Any] | None:
    """None, where the benchmark calls a function before it is there."""
    names, replies = {function["name"] for function in info["functions"]}, list[Any]()
    for calls, more in zip(answer, info["more"], strict=True):
        names |= {function["name"] for function in more}
        if not all(name in names for name, _ in calls):
            return None
        replies += [{"calls": calls, "content": ""}] * bool(calls) + ["Done."]
    return replies


def announced(functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": MORE_FUNCTIONS.format("\n".join(map(json.dumps, functions)))}]


async def carries_on(task: Task, agent: Any) -> bool:
    """Whether every message is done: the state is then what the benchmark's own calls make it, and whatever those
    calls gave has been given. Ends with the first message that is not."""
    is_long = "long_context" in task.info["category"]
    actual, ideal = (World(task.info["apis"], task.info["config"], is_long=is_long) for _ in range(2))
    tools = agent.tools = offered(task.info["functions"], actual)
    for messages, more, calls in zip(task.info["messages"], task.info["more"], task.answer, strict=True):
        if more:
            tools = [*tools, *offered(more, actual)]
            agent.tool_box = with_more(agent.tool_box, tools)
        so_far, given = len(actual.results), [await ideal.call(name, arguments) for name, arguments in calls]
        if not await is_ended(agent, messages):
            return False
        is_same = actual.state() == ideal.state() and contains(actual.results, given)
        if calls and not (is_same and len(actual.results) > so_far):
            return False
    return True


async def is_ended(agent: Any, messages: list[dict[str, Any]]) -> bool:
    """Plays until a reply calls nothing; false, if there are too many that do."""
    await agent.turn(messages)
    for _ in range(MOST_STEPS):
        if not agent.calls:
            break
        await agent.turn(await agent.use_tools())
    return not agent.calls


def offered(functions: list[dict[str, Any]], world: World) -> list[Tool]:
    return [Tool(**function, function=partial(world.call, function["name"])) for function in functions]


def with_more(box: ToolBox, tools: list[Tool]) -> ToolBox:
    """In place of `box`: what tools there are is told once, at the start, and what is new by a message."""
    more = ToolBox(tools)
    more.num_calls, more.num_errors = box.num_calls, box.num_errors
    return more


def place(id: str) -> float:
    """From 0 to 1, by chance; the same for all rows of one scenario."""
    scenario = re.sub(r"^(multi_turn_)\D*", r"\1", id)
    return int.from_bytes(hashlib.blake2b(scenario.encode(), digest_size=4).digest(), "big") / 2**32
