"""Expressions worked out in the head."""

from itertools import islice

import pytest
from palestra_arithmetic import Arithmetic

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
