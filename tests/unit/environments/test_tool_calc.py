"""The calculator: known answers, wrong ones, and what a model may do to a tool."""

import re
from itertools import islice

import palestra_tool_calc
import pytest
from palestra_tool_calc import ToolCalc
from palestra_tool_calc.careless import Careless

from palestra.core.records import Ending
from palestra.env.play import score
from tests.unit.environments.laws import num_lines


async def test_gold_earns_one_and_the_answer_is_pythons():
    for task in islice(ToolCalc(operations=3, largest=99, seed=1).tasks(), 30):
        assert str(eval(task.prompt)) == task.answer
        record = await score(ToolCalc(), task, task.gold)
        assert (record.ending, record.reward, record.metrics["tool_errors"]) == (Ending.OK, 1.0, 0.0)


async def test_the_value_without_a_call_is_enough_and_another_value_is_not():
    task = next(iter(ToolCalc(seed=2).tasks()))
    assert (await score(ToolCalc(), task, [f" {task.answer}\n"])).reward == 1.0
    for wrong in ("", f"{task.answer}.0", f"{task.answer} or 7", str(int(task.answer) + 1)):
        assert (await score(ToolCalc(), task, [wrong])).reward == 0.0


@pytest.mark.parametrize(
    "call",
    [
        ("calculate", {"a": 1, "operator": "/", "b": 2}),
        ("calculate", {"a": 1, "b": 2}),
        ("calculate", {"a": "many", "operator": "+", "b": 2}),
        ("calculate", '{"a": 1'),
        ("divide", {"a": 1, "b": 2}),
    ],
)
async def test_calls_that_do_not_fit_are_told_and_cost_a_turn(call):
    task = next(iter(ToolCalc(seed=2).tasks()))
    record = await score(ToolCalc(), task, [{"calls": [call]}, task.answer])
    assert (record.ending, record.reward, record.metrics["tool_errors"]) == (Ending.OK, 1.0, 1.0)
    assert record.messages[2]["content"].startswith("Error: ")


async def test_who_only_calls_earns_nothing_though_the_last_reply_holds_the_value():
    task = next(iter(ToolCalc(seed=2).tasks()))
    calls = {"calls": [("calculate", {"a": 1, "operator": "+", "b": 2})], "content": task.answer}
    record = await score(ToolCalc(), task, [calls] * 10)
    assert (record.ending, record.reward) == (Ending.TRUNCATED, 0.0)


def test_train_and_test_share_no_expression():
    train, test = ({task.prompt for task in islice(ToolCalc(split=split).tasks(), 200)} for split in ("train", "test"))
    assert len(train) > 100 < len(test)
    assert not train & test


async def test_the_careless_call_for_the_right_numbers_and_are_right_as_often_as_their_chances_say():
    """One of three is right on purpose, and a third of the others by chance."""
    records = []
    for task in islice(Careless(operations=1, seed=1).tasks(), 600):
        first, second = map(int, re.findall(r"\d+", task.prompt))
        [(_, call)] = task.gold[0]["calls"]
        assert (call["a"], call["b"]) == (first, second)
        assert task.gold[1] == str(ToolCalc().calculate(**call))
        records.append(await score(ToolCalc(), task, task.gold))
    assert {record.metrics["tool_errors"] for record in records} == {0.0}
    assert abs(sum(record.reward for record in records) / 600 - 5 / 9) < 0.06  # three standard deviations


def test_the_authors_code_is_short():
    assert num_lines(palestra_tool_calc) <= 20
