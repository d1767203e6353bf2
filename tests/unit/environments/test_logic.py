"""logic: its levels, its laws, and its puzzles solved in other ways than their makers'."""

import inspect
import itertools
import re
import sys

import pytest
from hypothesis import given, settings
from palestra_logic import Logic
from palestra_logic.levels import LEVELS
from palestra_reasoning_gym import UNUSABLE
from reasoning_gym.factory import DATASETS

from palestra.core.errors import UserError
from palestra.core.records import Ending
from palestra.env import Task
from palestra.env.play import score
from tests.unit.environments.laws import (
    ODD_REPLIES,
    check_gold_is_one_and_nothing_is_less,
    check_reply_is_scored,
    check_splits_share_no_prompt,
    check_tasks_depend_on_split_and_seed_alone,
    some_tasks,
)

pytestmark = pytest.mark.slow

FAST = ["course_schedule", "cryptarithm", "kakurasu", "mini_sudoku"]
EACH = [(level, generator) for level, generators in LEVELS.items() for generator in generators]


def answer_of(task: Task) -> str:
    return task.gold.removeprefix("<answer>").removesuffix("</answer>")


def swapped(text: str, pattern: str) -> str:
    """With the first two different matches of the pattern in each other's place."""
    first, *rest = re.finditer(pattern, text)
    second = next(match for match in rest if match[0] != first[0])
    return text[: first.start()] + second[0] + text[first.end() : second.start()] + first[0] + text[second.end() :]


WRONG = {
    "circuit_logic": lambda answer, prompt: str(1 - int(answer)),
    "course_schedule": lambda answer, prompt: str(answer != "True"),
    "cryptarithm": lambda answer, prompt: re.sub(r"=(.)(.*?)=.", r"=\1\2=\1", answer, count=1),  # two letters alike
    "futoshiki": lambda answer, prompt: swapped(answer, "[0-9]"),
    "jugs": lambda answer, prompt: re.sub(r', "[^"]*"\]$', "]", answer),
    "kakurasu": lambda answer, prompt: swapped(answer, "[01]"),
    "knights_knaves": lambda answer, prompt: answer.partition(",")[0] + ".",
    "mini_sudoku": lambda answer, prompt: swapped(answer, "[1-4]"),
    "sudoku": lambda answer, prompt: swapped(answer, "[1-9]"),
    "zebra_puzzles": lambda answer, prompt: next(
        name for name in re.search(r"unique name: (.*)", prompt)[1].split(", ") if name != answer
    ),
}


@pytest.mark.parametrize(("level", "generator"), EACH)
async def test_right_and_wrong_answers(level, generator):
    options = {"level": level, "generators": [generator], "size": 3}
    environment, tasks = Logic(**options), some_tasks(Logic, 3, **options)
    assert len(tasks) == 3
    await check_gold_is_one_and_nothing_is_less(environment, tasks)
    for task in tasks:
        wrong = WRONG[generator](answer_of(task), task.prompt)
        assert wrong != answer_of(task)
        record = await score(environment, task, [f"<answer>{wrong}</answer>"])
        assert (record.ending, record.rewards, record.metrics) == (Ending.OK, {"correct": 0.0}, {"answered": 1.0})


@pytest.mark.parametrize(("partial", "earned"), [(False, 0.0), (True, 0.9 * 15 / 16)])
async def test_an_answer_that_is_partly_right(partial, earned):
    """mini_sudoku gives each of the 16 cells its part of 0.9 where not all are right."""
    [task] = some_tasks(Logic, 1, generators=["mini_sudoku"])
    gold = answer_of(task)
    one_cell = gold[:-1] + str(int(gold[-1]) % 4 + 1)
    record = await score(Logic(partial=partial), task, [f"<answer>{one_cell}</answer>"])
    assert record.reward == pytest.approx(earned)
    assert (await score(Logic(partial=partial), task, [task.gold])).reward == 1.0


@settings(max_examples=25, deadline=None)
@given(ODD_REPLIES)
async def test_every_reply_is_scored(text):
    options = {"level": "easy", "size": 1}
    for task in some_tasks(Logic, 20, **options):
        if answer_of(task).lower() != text.strip().lower():
            assert await check_reply_is_scored(Logic(**options), task, f"<answer>{text}</answer>") == 0
        assert await check_reply_is_scored(Logic(**options), task, text) == 0


def test_tasks_are_deterministic_and_splits_disjoint():
    check_tasks_depend_on_split_and_seed_alone(Logic, generators=FAST)
    for level in ("easy", "normal"):
        check_splits_share_no_prompt(Logic, 200, level=level, generators=FAST, size=50)


@pytest.mark.parametrize("level", LEVELS)
def test_generators_take_turns(level):
    tasks = some_tasks(Logic, 100, level=level, size=2)
    assert [task.info["generator"] for task in tasks] == list(LEVELS[level]) * 2
    assert [task.info["generator"] for task in some_tasks(Logic, 9, generators=FAST[:2], size=3)] == FAST[:2] * 3


async def test_without_tags_the_whole_reply_is_the_answer():
    options = {"tags": False, "generators": FAST}
    tasks = some_tasks(Logic, 4, **options)
    await check_gold_is_one_and_nothing_is_less(Logic(**options), tasks)
    assert not any("<answer>" in task.gold for task in tasks)
    assert "<answer>" not in Logic(tags=False).system
    assert "<answer>" in Logic().system
    assert Logic(system="Go.").system == "Go."


SIZES = {
    "circuit_logic": lambda task: task.prompt.count(" = "),
    "course_schedule": lambda task: int(re.search(r"total of (\d+) courses", task.prompt)[1]),
    "cryptarithm": lambda task: len(re.findall(r"^\+? *[A-Z]+$", task.prompt, re.MULTILINE)),
    "futoshiki": lambda task: int(re.search(r"following (\d)x", task.prompt)[1]),
    "jugs": lambda task: answer_of(task).count(",") + 1,
    "kakurasu": lambda task: len(re.sub("[^01]", "", answer_of(task))),
    "knights_knaves": lambda task: int(re.search(r"meet (\d) inhabitants", task.prompt)[1]),
    "zebra_puzzles": lambda task: len(re.findall(r"^\d+\.", task.prompt, re.MULTILINE)),
}


@pytest.mark.parametrize("generator", SIZES)
def test_a_higher_level_has_larger_puzzles(generator):
    means = []
    for level in LEVELS:
        tasks = some_tasks(Logic, 8, level=level, generators=[generator], size=8)
        means.append(sum(map(SIZES[generator], tasks)) / len(tasks))
    assert means == sorted(set(means)), means


@pytest.mark.parametrize(("level", "fewest", "most"), [("easy", 4, 6), ("normal", 8, 10)])
def test_a_small_sudoku_has_one_solution(level, fewest, most):
    for task in some_tasks(Logic, 5, level=level, generators=["mini_sudoku"], size=5):
        grid = [row.split() for row in re.findall(r"^(?:[1-4_] ){3}[1-4_]$", task.prompt, re.MULTILINE)]
        assert fewest <= sum(row.count("_") for row in grid) <= most
        [only] = small_sudoku_solutions(grid)
        assert "\n".join(" ".join(row) for row in only) == answer_of(task)


def small_sudoku_solutions(grid):
    fitting = (
        [row for row in itertools.permutations("1234") if all(map(lambda one, told: told in ("_", one), row, given))]
        for given in grid
    )
    for rows in itertools.product(*fitting):
        blocks = [{rows[i][j] for i in (a, a + 1) for j in (b, b + 1)} for a in (0, 2) for b in (0, 2)]
        if all(len(set(part)) == 4 for part in (*zip(*rows, strict=True), *blocks)):
            yield rows


@pytest.mark.parametrize("level", LEVELS)
def test_courses_can_be_put_in_order_or_not(level):
    answers = set()
    for task in some_tasks(Logic, 20, level=level, generators=["course_schedule"], size=20):
        before = [tuple(map(int, pair)) for pair in re.findall(r"\((\d+), (\d+)\)", task.prompt)]
        left = set(itertools.chain.from_iterable(before))
        while free := {course for course in left if not any(one == course and other in left for one, other in before)}:
            left -= free
        assert answer_of(task) == str(not left)
        answers.add(answer_of(task))
    assert answers == {"True", "False"}


def test_no_verifier_runs_a_reply():
    """Some of reasoning-gym's hand the answer to `eval`, or to sympy, which does."""
    runs = re.compile(r"\b(eval|exec|parse_expr|sympify)\(")
    modules = {name: inspect.getsource(sys.modules[DATASETS[name][0].__module__]) for name in ("n_queens", "countdown")}
    assert all(runs.search(source) for source in modules.values()), "this is how it would be found"
    for _, generator in EACH:
        assert generator not in UNUSABLE
        assert not runs.search(inspect.getsource(sys.modules[DATASETS[generator][0].__module__])), generator


def test_what_there_is_not_is_said():
    with pytest.raises(
        UserError, match=r"level='hard' has no generator 'mini_sudoku'; it has: .*sudoku, zebra_puzzles"
    ):
        Logic(level="hard", generators=["mini_sudoku"])
    with pytest.raises(UserError, match=r"args\.level='harder'"):
        Logic(level="harder")
