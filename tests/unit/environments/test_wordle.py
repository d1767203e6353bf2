"""wordle: its marks by hand and by law, its games, its words, and how short it is."""

from collections import Counter
from pathlib import Path

import palestra_wordle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from palestra_wordle import WORDS, Wordle, marks
from palestra_wordle.careless import Careless
from palestra_wordle.words import of_five_letters

from palestra.core.records import Ending
from palestra.env.play import score
from tests.unit.environments.laws import (
    ODD_REPLIES,
    check_gold_is_one_and_nothing_is_less,
    check_reply_is_scored,
    check_tasks_depend_on_split_and_seed_alone,
    num_lines,
    some_tasks,
)

HERE = Path(palestra_wordle.__file__).parent
DEBIAN = Path("/usr/share/dict/american-english")
FEW_LETTERS = st.text("abc", min_size=5, max_size=5)


@pytest.mark.parametrize(
    ("guess", "word", "told"),
    [
        ("crane", "crane", "GGGGG"),
        ("pound", "crane", "---G-"),
        ("nacre", "crane", "YYYYG"),
        ("speed", "abide", "--Y-Y"),  # one e: the first is it, the second is not
        ("speed", "erase", "Y-YY-"),
        ("speed", "steal", "G-G--"),  # the e at its place is it
        ("geese", "elegy", "YYG--"),
        ("eerie", "crepe", "Y-Y-G"),
        ("llama", "hello", "YY---"),
        ("hello", "llama", "--YY-"),
        ("aaaaa", "abbba", "G---G"),
    ],
)
def test_marks_by_hand(guess, word, told):
    assert marks(guess, word) == told


@settings(max_examples=300)
@given(FEW_LETTERS, FEW_LETTERS)
def test_a_letter_is_marked_as_often_as_both_have_it(guess, word):
    told = marks(guess, word)
    assert [mark == "G" for mark in told] == [one == other for one, other in zip(guess, word, strict=True)]
    found = Counter(letter for letter, mark in zip(guess, told, strict=True) if mark != "-")
    assert found == Counter(guess) & Counter(word)
    for letter in set(guess):
        rest = [mark for one, mark in zip(guess, told, strict=True) if one == letter and mark != "G"]
        assert rest == sorted(rest, reverse=True), "yellows come first, from the left"


async def test_gold_earns_one_and_nothing_less():
    await check_gold_is_one_and_nothing_is_less(Wordle(), some_tasks(Wordle, 30))


@settings(max_examples=50, deadline=None)
@given(ODD_REPLIES)
async def test_every_reply_is_scored(text):
    [task] = some_tasks(Wordle, 1)
    for reply in (text, f"<guess>{text}</guess>"):
        record = await score(Wordle(), task, [reply] * 6)
        assert (record.ending, record.reward, record.num_turns) == (Ending.OK, 0.0, 6)


async def test_a_game_is_told_turn_after_turn():
    task = task_of("crane")
    record = await score(
        Wordle(), task, ["<guess>pound</guess>", "zzzzz", "Let me see. <guess> NACRE </guess>", "Crane\n"]
    )
    heard = [message["content"] for message in record.messages if message["role"] == "user"]
    assert heard == ["Your first guess?", "---G-", "That is not in the list of words. Guess again.", "YYYYG"]
    assert (record.ending, record.rewards, record.num_turns) == (Ending.OK, {"solved": 1.0}, 4)


async def test_the_sixth_guess_is_the_last():
    task = task_of("crane")
    assert (await score(Wordle(), task, ["pound"] * 5 + ["crane"])).reward == 1.0
    late = await score(Wordle(), task, ["pound"] * 6 + ["crane"])
    assert (late.ending, late.rewards, late.num_turns) == (Ending.OK, {"solved": 0.0}, 6)
    assert late.messages[-1]["role"] == "assistant", "nothing is told after the last guess"


@pytest.mark.parametrize(
    "reply",
    ["The word is crane", "crane plane", "<guess>crane plane</guess>", "<guess>crane", "c r a n e", "cranes", "GGGGG"],
)
async def test_what_is_no_guess_earns_nothing(reply):
    assert await check_reply_is_scored(Wordle(max_turns=1), task_of("crane"), reply) == 0


async def test_a_reply_that_is_cut_off_is_no_guess():
    record = await score(Wordle(), task_of("crane"), [])
    assert (record.rewards, record.num_turns) == ({"solved": 0.0}, 0)


def test_an_epoch_is_every_word_of_the_split_once():
    check_tasks_depend_on_split_and_seed_alone(Wordle)
    words = {split: [task.key for task in Wordle(split=split).tasks()] for split in ("train", "test")}
    assert sorted(words["train"] + words["test"]) == sorted(WORDS)
    assert 0.08 < len(words["test"]) / len(WORDS) < 0.12
    assert set(words["test"]) == {task.key for task in Wordle(split="test", seed=7).tasks()}


def test_words_are_small_letters_in_order():
    words = list(WORDS)
    assert words == of_five_letters(words)
    assert len(words) > 4000
    assert {"crane", "about", "queen"} <= WORDS.keys()
    lines = [
        "crane",
        "crane\n",
        "xviii",
        "civic",
        "Paris",
        "it's",
        "cafés",
        "éclat",
        "abcdef",
        "abcd",
        "a-bcd",
        "",
        "about",
    ]
    assert of_five_letters(lines) == ["about", "civic", "crane"]


@pytest.mark.skipif(not DEBIAN.exists(), reason="needs Debian's wamerican")
def test_the_list_is_what_the_script_makes():
    assert list(WORDS) == of_five_letters(DEBIAN.read_text(encoding="utf-8").splitlines())


def test_the_notices_of_the_list_travel_with_it():
    notices = (HERE / "words.LICENSE").read_text(encoding="utf-8")
    assert "Kevin Atkinson" in notices
    assert "Permission to use, copy, modify, distribute and sell" in " ".join(notices.split())


async def test_the_careless_heed_the_marks_in_every_second_game():
    """And then all marks before a guess allow it. Of the others those do that are right at once, and some by luck."""
    heeded, tasks = 0, some_tasks(Careless, 400, every=20)
    for task in tasks:
        assert task.gold[-1] == task.answer
        assert len(set(task.gold)) == len(task.gold)
        won = float(len(task.gold) <= Wordle.max_turns)
        assert (await score(Wordle(), task, task.gold)).reward == won
        pairs = [(guess, later) for i, guess in enumerate(task.gold) for later in task.gold[i + 1 :]]
        heeded += all(marks(guess, later) == marks(guess, task.answer) for guess, later in pairs)
    assert 0.5 <= heeded / len(tasks) < 0.8


def test_the_authors_code_is_short():
    assert num_lines(palestra_wordle) <= 25


def task_of(word: str):
    """The task whose word it is."""
    for split in ("train", "test"):
        for task in some_tasks(Wordle, len(WORDS), split=split):
            if task.answer == word:
                return task
    raise AssertionError(f"{word} is not in the list")
