"""reverse-text: its laws, its words, its demonstrations."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import palestra_reverse_text
import pytest
from hypothesis import given, settings
from palestra_reverse_text import ReverseText
from palestra_reverse_text.demos import NUM_ROWS, demonstrations
from palestra_reverse_text.words import is_held_out

from palestra.env.play import score
from tests.unit.environments.laws import (
    ODD_REPLIES,
    check_gold_is_one_and_nothing_is_less,
    check_reply_is_scored,
    check_splits_share_no_prompt,
    check_tasks_depend_on_split_and_seed_alone,
    num_lines,
    some_tasks,
)

SMALL = {"alphabet": "abc", "max_letters": 4}  # 108 words: the same one comes up again and again


async def test_gold_earns_one_and_nothing_less():
    await check_gold_is_one_and_nothing_is_less(ReverseText(), some_tasks(ReverseText, 100))


@settings(max_examples=50, deadline=None)
@given(ODD_REPLIES)
async def test_every_reply_is_scored(reply):
    assert await check_reply_is_scored(ReverseText(), some_tasks(ReverseText, 1)[0], reply) == 0


def test_tasks_are_deterministic_and_splits_disjoint():
    check_tasks_depend_on_split_and_seed_alone(ReverseText)
    check_splits_share_no_prompt(ReverseText)
    check_splits_share_no_prompt(ReverseText, **SMALL)


async def test_only_the_reversed_word_earns_anything():
    environment, tasks = ReverseText(), some_tasks(ReverseText, 200)
    for task in tasks:
        word = task.prompt
        for wrong in (word, "".join(sorted(word)), word[::-1] + " ", word[::-1][:-1], word[::-1].upper()):
            assert (await score(environment, task, [wrong])).reward == 0.0


async def test_similarity_by_hand():
    [task] = some_tasks(ReverseText, 1)
    half = await score(ReverseText(), task, [task.answer[:2] + "?" * (len(task.answer) - 2)])
    assert half.metrics == {"similarity": pytest.approx(2 / len(task.answer))}


def test_words_have_the_letters_and_lengths_asked_for():
    words = [task.prompt for task in some_tasks(ReverseText, 2000)]
    assert set("".join(words)) == set(ReverseText.alphabet)
    shares = Counter(map(len, words))
    assert sorted(shares) == [3, 4, 5, 6]
    assert all(400 < count < 600 for count in shares.values())
    held_out = [is_held_out(word) for word in palindromes_and_all()]
    assert 0.08 < sum(held_out) / len(held_out) < 0.12


def palindromes_and_all() -> list[str]:
    letters = ReverseText.alphabet
    return [a + b + c for a in letters for b in letters for c in letters]


@pytest.mark.parametrize("args", [{"alphabet": "ab"}, {"min_letters": 5, "max_letters": 4}, {"min_letters": 1}])
def test_arguments_that_make_no_words_are_refused(args):
    with pytest.raises(ValueError, match="make no words; give at least 3 letters"):
        some_tasks(ReverseText, 1, **args)


def test_a_split_without_a_word_is_refused():
    three = {"alphabet": "xyz", "min_letters": 3, "max_letters": 3}
    assert some_tasks(ReverseText, 1, **three)
    with pytest.raises(ValueError, match=r"held_out=True has no word of alphabet='xyz'"):
        some_tasks(ReverseText, 1, split="test", **three)


def test_the_demonstrations_are_what_the_script_makes():
    stored = (Path(palestra_reverse_text.__file__).parent / "data/demos.jsonl").read_text()
    assert stored == "".join(json.dumps(row) + "\n" for row in demonstrations())
    assert len(stored) < 1_000_000


def test_demonstrations_mix_three_behaviours_over_training_words():
    rows = list(islice(demonstrations(), NUM_ROWS))
    assert len(rows) == NUM_ROWS
    assert not any(is_held_out(row["prompt"]) for row in rows)
    shares = Counter(_behaviour(row["prompt"], row["completion"]) for row in rows)
    assert shares["reverse"] / NUM_ROWS == pytest.approx(0.30, abs=0.01)
    assert shares["copy"] / NUM_ROWS == pytest.approx(0.40, abs=0.03)  # a word in order is copied by sorting it
    assert shares["sort"] / NUM_ROWS == pytest.approx(0.30, abs=0.03)


def _behaviour(word: str, completion: str) -> str:
    if completion == word[::-1]:
        return "reverse"
    if completion == word:
        return "copy"
    assert completion == "".join(sorted(word))
    return "sort"


def test_the_authors_code_is_short():
    assert num_lines(palestra_reverse_text) <= 15
