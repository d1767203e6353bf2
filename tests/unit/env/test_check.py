"""`palestra env check`: a sound environment is green, and each law sees the environment that breaks it."""

from pathlib import Path

import pytest

from palestra.env.check import Case, Check, Here
from palestra.launch.env import examine

pytestmark = pytest.mark.slow

FAULTY = Path(__file__).with_name("faulty.py")


async def cases(name: str, **args) -> dict[str, Case]:
    return {case.name: case async for case in Check(Here(f"{FAULTY}:{name}", args, num_tasks=8)).cases()}


async def test_a_sound_environment_passes_everything():
    found = await cases("Sound")
    assert {case.ending for case in found.values()} == {"passed"}, found
    assert len(found) == 14


async def test_mutants_are_played_where_an_environment_has_some():
    found = await cases("Mutated")
    assert ({case.ending for case in found.values()}, len(found)) == ({"passed"}, 15)


def test_an_environment_says_how_many_tasks_are_looked_at():
    assert [Here(f"{FAULTY}:{name}", {}).num_tasks for name in ("Sound", "Mutated")] == [20, 7]
    assert Here(f"{FAULTY}:Mutated", {}, num_tasks=3).num_tasks == 3


@pytest.mark.parametrize(
    ("name", "law", "words"),
    [
        ("Undescribed", "it says what it is", "class Undescribed has no docstring"),
        ("OneKey", "tasks have keys of their own", "tasks 0 and 1 differ and have one key, 'task'"),
        ("AnyOrder", "tasks are the same in every process", "in another process"),
        ("Leaks", "train and test share no task", "8 of 8 are in both"),
        ("WrongGold", "gold scores 1", "scores 0.5: {'said': 0.5}"),
        ("Generous", "nothing scores less", "scores 1"),
        ("Generous", "an empty reply scores less", "scores 1"),
        ("Fooled", "mutants score less", "scores 1: {'said': 1.0}"),
        ("Lenient", "half of a JSON scores less", "scores 1"),
        ("Crashes", "numbers that are none scores less", "ValueError: invalid literal for int()"),
    ],
)
async def test_a_broken_law_is_seen(name, law, words):
    case = (await cases(name))[law]
    assert case.ending == "failed"
    assert words in case.detail


async def test_an_environment_without_tasks_fails_and_says_so():
    found = await cases("Empty")
    assert "gives none" in found["tasks have keys of their own"].detail
    assert found["gold scores 1"].ending == "skipped"


@pytest.mark.parametrize(("name", "words"), [("Hangs", "took more than 20 s"), ("Dies", "ended with 7")])
def test_one_that_hangs_or_dies_is_a_failed_case(name, words):
    report = examine(f"{FAULTY}:{name}", num_tasks=2, deadline_s=20)
    assert report.count("failed") == 1
    assert report.cases[-1]["name"] == "it ends"
    assert "random bytes" in report.cases[-1]["detail"]
    assert words in report.cases[-1]["detail"]


def test_a_program_that_it_leaves_behind_is_not_waited_for():
    report = examine(f"{FAULTY}:Servant", num_tasks=2, deadline_s=25)
    assert (report.count("passed"), report.count("failed")) == (14, 0), report.cases
