"""Expressions worked out in the head."""

import re
from itertools import islice

import pytest
from palestra_arithmetic import Arithmetic
from palestra_arithmetic.careless import Careless

from palestra.core.records import Task
from palestra.env.play import score

ONE = Task(prompt="12 - 34 =", answer=-22, key="t")


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        ("-22", 1.0),
        ("It is -22.", 1.0),
        ("12 - 34 = -22", 1.0),
        ("22", 0.0),
        ("-22 or 22", 0.0),
        ("-220", 0.0),
        ("", 0.0),
    ],
)
async def test_the_last_number_of_the_reply_counts(reply, reward):
    assert (await score(Arithmetic(), ONE, [reply])).reward == reward


@pytest.mark.parametrize("args", [{}, {"operators": "+-*", "operations": 3, "largest": 9}, {"operations": 2}])
def test_expressions_have_their_values_and_splits_share_none(args):
    asked = {}
    for split in ("train", "test"):
        tasks = list(islice(Arithmetic(split=split, **args).tasks(), 200))
        assert all(eval(task.prompt.removesuffix("=")) == task.answer for task in tasks)
        asked[split] = {task.prompt for task in tasks}
    assert not asked["train"] & asked["test"]


def test_the_careless_are_right_as_often_as_their_chances_say():
    """One of three is right on purpose, and half of the others by chance."""
    tasks = list(islice(Careless(largest=9, seed=1).tasks(), 900))
    sums = [[sum(numbers), numbers[0] - numbers[1]] for task in tasks if (numbers := numbers_of(task))]
    assert all(int(task.gold) in both for task, both in zip(tasks, sums, strict=True))
    differ = [task for task, both in zip(tasks, sums, strict=True) if both[0] != both[1]]
    right = sum(task.gold == str(task.answer) for task in differ) / len(differ)
    assert abs(right - 2 / 3) < 0.05  # three standard deviations


def numbers_of(task: Task) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(task.prompt))]
