"""What holds for every environment, given its class and arguments. No model is needed."""

import ast
import inspect
from collections.abc import Iterable
from itertools import islice
from types import ModuleType
from typing import Any

from hypothesis import strategies as st

from palestra.core.records import Ending, Task
from palestra.env import Environment
from palestra.env.check import gold_script
from palestra.env.play import score
from palestra.env.tasklist import as_sent

ODD_REPLIES = st.text() | st.lists(
    st.sampled_from(
        [
            "<answer>",
            "</answer>",
            "1",
            "-",
            "nan",
            "inf",
            "1e999",
            "/0",
            "[",
            "]",
            "{",
            "}",
            ",",
            '"',
            "\n",
            " ",
            "None",
            "é",
            "\0",
        ]
    )
).map("".join)


def some_tasks(
    make: type[Environment], count: int = 20, *, split: str = "train", seed: int = 1, **args: Any
) -> list[Task]:
    """As a rollout sees them."""
    tasks: Iterable[Task] = make(split=split, seed=seed, **args).tasks()
    return [as_sent(task, position) for position, task in enumerate(islice(tasks, count))]


async def check_gold_is_one_and_nothing_is_less(environment: Environment, tasks: list[Task]) -> None:
    for task in tasks:
        gold = await score(environment, task, gold_script(environment, task))
        assert (gold.ending, gold.reward) == (Ending.OK, 1.0), (task, gold.error)
        for nothing in ([], [""], ["<answer></answer>"]):
            record = await score(environment, task, nothing)
            assert record.ending != Ending.INVALID, (task, record.error)
            assert record.reward < 1, (task, nothing)


async def check_reply_is_scored(environment: Environment, task: Task, reply: str) -> float:
    """Whatever a policy says has a reward in [0, 1]; returns it."""
    record = await score(environment, task, [reply])
    assert record.ending == Ending.OK, (reply, record.error)
    assert 0 <= record.reward <= 1, (reply, record.reward)
    return record.reward


def check_tasks_depend_on_split_and_seed_alone(make: type[Environment], **args: Any) -> None:
    assert some_tasks(make, **args) == some_tasks(make, **args)
    assert some_tasks(make, **args) != some_tasks(make, seed=2, **args)
    assert some_tasks(make, **args) != some_tasks(make, split="test", **args)


def check_splits_share_no_prompt(make: type[Environment], count: int = 200, **args: Any) -> None:
    """Over several seeds: what is held out is held out for ever."""
    prompts = {
        split: {
            str(task.prompt) for seed in (1, 2, 3) for task in some_tasks(make, count, split=split, seed=seed, **args)
        }
        for split in ("train", "test")
    }
    assert all(prompts.values())
    assert not prompts["train"] & prompts["test"]


def num_lines(module: ModuleType) -> int:
    """Of an author's code: without blank lines, docstrings, comments and imports."""
    text = inspect.getsource(module)
    left_out = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    code = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(1 for number, line in code if line and not line.startswith("#") and number not in left_out)
