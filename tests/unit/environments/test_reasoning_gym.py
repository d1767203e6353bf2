"""reasoning-gym: its laws, over generators of several kinds; verifiers that raise or accept too much."""

import msgspec
import pytest
from hypothesis import given, settings
from palestra_reasoning_gym import UNUSABLE, ReasoningGym, make_entry, scored
from palestra_reasoning_gym.harmless import ARITHMETIC, EVALUATED, FORMULAS, is_harmless
from reasoning_gym.factory import DATASETS, create_dataset

from palestra.core.errors import UserError
from palestra.core.records import Ending
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

KINDS = ["basic_arithmetic", "leg_counting", "spell_backward", "base_conversion", "prime_factorization", "game_of_life"]


@pytest.mark.parametrize("kind", KINDS)
async def test_gold_earns_one_and_nothing_less(kind):
    environment = ReasoningGym(generators=kind, size=5)
    await check_gold_is_one_and_nothing_is_less(environment, some_tasks(ReasoningGym, 5, generators=kind, size=5))


@settings(max_examples=40, deadline=None)
@given(ODD_REPLIES)
async def test_every_reply_is_scored(text):
    for task in some_tasks(ReasoningGym, len(KINDS), generators=KINDS, size=1):
        environment = ReasoningGym(generators=KINDS, size=1)
        await check_reply_is_scored(environment, task, text)
        assert await check_reply_is_scored(environment, task, f"<answer>{text}</answer>") < 1


def test_tasks_are_deterministic_and_splits_disjoint():
    check_tasks_depend_on_split_and_seed_alone(ReasoningGym, generators=KINDS[:2])
    check_splits_share_no_prompt(ReasoningGym, 100, generators="leg_counting", size=100)


def test_generators_take_turns():
    tasks = some_tasks(ReasoningGym, 100, generators=["leg_counting", "spell_backward"], size=3)
    assert [task.info["generator"] for task in tasks] == ["leg_counting", "spell_backward"] * 3


async def test_a_generators_own_settings_reach_it():
    config = {"min_word_len": 4, "max_word_len": 4}
    tasks = some_tasks(ReasoningGym, 5, generators="spell_backward", config=config)
    assert {len(task.gold.removeprefix("<answer>").removesuffix("</answer>")) for task in tasks} == {4}
    await check_gold_is_one_and_nothing_is_less(ReasoningGym(generators="spell_backward", config=config), tasks)


async def test_without_tags_the_whole_reply_is_the_answer():
    plain = ReasoningGym(generators="leg_counting", tags=False)
    tasks = some_tasks(ReasoningGym, 5, generators="leg_counting", tags=False)
    await check_gold_is_one_and_nothing_is_less(plain, tasks)
    assert (await score(plain, tasks[0], [f" {tasks[0].gold}\n"])).reward == 1.0
    assert "<answer>" not in plain.system
    assert "<answer>" in ReasoningGym(generators="leg_counting").system
    assert ReasoningGym(generators="leg_counting", system="Go.").system == "Go."


async def test_an_answer_the_verifier_cannot_read_is_wrong():
    """prime_factorization's verifier calls int() on what it gets."""
    [task] = some_tasks(ReasoningGym, 1, generators="prime_factorization")
    dataset = create_dataset("prime_factorization", size=1)
    with pytest.raises(ValueError, match="invalid literal"):
        dataset.score_answer(answer="many", entry=dataset[0])
    record = await score(ReasoningGym(generators="prime_factorization"), task, ["<answer>many</answer>"])
    assert (record.ending, record.reward, record.metrics) == (Ending.OK, 0.0, {"answered": 1.0})


def test_a_verifier_that_raises_on_its_own_answer_gives_no_reward(monkeypatch):
    [task] = some_tasks(ReasoningGym, 1, generators="leg_counting")
    *origin, index = (task.info[part] for part in ("generator", "config", "seed", "size", "index"))

    def broken(self, answer, entry):
        raise OSError("disk")

    monkeypatch.setattr(DATASETS["leg_counting"][0], "score_answer", broken)
    with pytest.raises(OSError, match="disk"):
        scored(*origin, make_entry(*origin, index), "4")


@pytest.mark.parametrize(
    ("generators", "words"),
    [
        ("leg_count", "no generator 'leg_count'; it has: .*leg_counting"),
        (["leg_counting", "rush_hour"], "'rush_hour' keeps no answer"),
        ([], "generators is empty"),
    ],
)
def test_generators_that_cannot_be_used_are_refused(generators, words):
    with pytest.raises(UserError, match=words):
        ReasoningGym(generators=generators)


CHEATS = {
    "coin_flip": "0",
    "complex_arithmetic": "nan",
    "game_of_life_halting": "nonsense",
    "number_sorting": None,  # as many nan as there are numbers
    "puzzle24": "6*4*1*1",
}


@pytest.mark.parametrize("name", CHEATS)
async def test_what_a_verifier_wrongly_takes_for_right_earns_less(name):
    tasks = some_tasks(ReasoningGym, 10, generators=name, size=10)
    for task in tasks:
        gold = task.gold.removeprefix("<answer>").removesuffix("</answer>")
        cheat = CHEATS[name] or str(["NaN"] * (gold.count(",") + 1))
        assert (await score(ReasoningGym(generators=name, size=10), task, [task.gold])).reward == 1.0
        if cheat != gold:
            assert (await score(ReasoningGym(generators=name, size=10), task, [f"<answer>{cheat}</answer>"])).reward < 1


USABLE = sorted(DATASETS.keys() - UNUSABLE.keys())


def test_there_are_a_hundred_generators_beside_those_that_are_refused():
    assert UNUSABLE.keys() <= DATASETS.keys()
    assert len(USABLE) >= 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of arc_agi
@pytest.mark.parametrize("name", USABLE)
async def test_every_generator_gives_tasks_and_takes_its_own_answer(name):
    [task] = some_tasks(ReasoningGym, 1, generators=name, size=1)
    record = await score(ReasoningGym(generators=name, size=1), task, [task.gold])
    assert (record.ending, record.reward) == (Ending.OK, 1.0), record.error


RUNNING = sorted((EVALUATED | ARITHMETIC | FORMULAS) - UNUSABLE.keys())


@pytest.mark.parametrize("name", RUNNING)
async def test_a_verifier_that_runs_answers_runs_nothing_but_expressions(name, tmp_path):
    witness = tmp_path / "witness"
    task = some_tasks(ReasoningGym, 1, generators=name, size=1)[0]
    for evil in (
        f"__import__('pathlib').Path({str(witness)!r}).touch()",
        f" [open({str(witness)!r}, 'w')]",
        f"(lambda: open({str(witness)!r}, 'w'))()",
        f"5! + __import__('pathlib').Path({str(witness)!r}).touch()",
        f"[x for x in [open({str(witness)!r}, 'w')]]",
        f"sin(\"__import__('pathlib').Path({str(witness)!r}).touch()\")",
        "[0]*10**10",
        "'a'*10**10",
        "1" + "+1" * 900,
    ):
        record = await score(ReasoningGym(generators=name, size=1), task, [f"<answer>{evil}</answer>"])
        assert record.ending == Ending.OK
        assert record.reward < 1
        assert not witness.exists()


@pytest.mark.parametrize("name", RUNNING)
async def test_its_own_answers_are_harmless_and_earn_one(name):
    tasks = some_tasks(ReasoningGym, 20, generators=name, size=20)
    answers = [task.gold.removeprefix("<answer>").removesuffix("</answer>") for task in tasks]
    assert [is_harmless(name, answer) for answer in answers] == [True] * len(answers)
    for task in tasks[:3]:
        assert (await score(ReasoningGym(generators=name, size=20), task, [task.gold])).reward == 1.0


@pytest.mark.parametrize(
    ("name", "answer", "is_so"),
    [
        ("simple_integration", "3*x**2/2 + sin(x) + C", True),
        ("simple_integration", "(x**2 + 1)**3/6", True),
        ("simple_integration", "9**9**9", False),
        ("simple_integration", "((9**1000)**1000)**1000", False),
        ("simple_integration", "x**(10**9)", False),
        ("simple_integration", "x.__class__", False),
        ("simple_integration", "os", False),
        ("simple_integration", "eval('1')", False),
        ("simple_integration", "sin('1')", False),
        ("simple_integration", "Integral(x, x)", False),
        ("simple_integration", "f(x)", False),
        ("simple_integration", "x[0]", False),
        ("simple_integration", "3 +", False),
        ("simple_integration", "1" + " + 1" * 2000, False),
        ("countdown", "(20 + 7)*5/3 - 1", True),
        ("countdown", "(20+7+5)*0e0+87e0", False),
        ("countdown", "0x57", False),
        ("countdown", "8_7", False),
        ("countdown", "x/x", False),
        ("countdown", "9**9", False),
        ("spiral_matrix", "1 2 3", True),
        ("spiral_matrix", "[1, 2, 3]", True),
        ("spiral_matrix", " exit()", False),
        ("spiral_matrix", "[0]*10**10", False),
        ("string_insertion", "DACEDDCD", True),
        ("string_insertion", "oracle_answer", False),
        ("string_insertion", "['A', 'B']", True),
        ("leg_counting", "__import__('os')", True),
    ],
)
def test_what_may_be_given_to_a_verifier_that_runs_it(name, answer, is_so):
    assert is_harmless(name, answer) == is_so


async def test_an_entry_that_is_another_here_makes_the_rollout_invalid():
    [task] = some_tasks(ReasoningGym, 1, generators="leg_counting", size=1)
    record = await score(
        ReasoningGym(generators="leg_counting", size=1), msgspec.structs.replace(task, prompt="?"), ["x"]
    )
    assert record.ending == Ending.INVALID
    assert "another entry" in record.error
