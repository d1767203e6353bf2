"""gymnasium-text: games whose returns are known by hand; actions as words, colours as brackets; what is refused."""

from itertools import islice
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from palestra_gymnasium import HELD_OUT, NO_ACTION, GymnasiumText, read
from palestra_gymnasium.guess import Guess
from palestra_gymnasium.words import shown, told

from palestra.core.errors import UserError
from palestra.core.records import Ending
from palestra.env.play import score
from tests.unit.environments.laws import ODD_REPLIES

LAKE = {"make": "FrozenLake-v1", "options": {"is_slippery": False}}
GUESS = {"make": "palestra_gymnasium.guess:Guess"}


def some_tasks(count: int, *, split: str = "train", **args):
    return list(islice(GymnasiumText(split=split, seed=1, **args).tasks(), count))


async def play(replies, number: int = 0, **args):
    return await score(GymnasiumText(**args), some_tasks(number + 1, **args)[number], replies)


async def test_the_way_over_the_lake_earns_one_on_its_last_step():
    record = await play(["down", "down", "right", "right", "down", "right"], **LAKE)
    assert (record.ending, record.rewards) == (Ending.OK, {"earned": 1.0})
    assert record.seats[0].credits == {0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 1}


async def test_a_hole_ends_the_game_with_nothing():
    record = await play(["right", "down", "down"], **LAKE)
    assert (record.ending, record.reward, record.num_turns) == (Ending.OK, 0.0, 2)


async def test_the_lake_is_drawn_and_explained():
    record = await play(["right", "down"], **LAKE)
    system, first, _, second, _ = [message["content"] for message in record.messages]
    assert "<action>" in system
    assert first.startswith("Walk over the frozen lake")
    assert first.endswith("Actions: left, down, right, up.\n\n[S]FFF\nFHFH\nFFFH\nHFFG")
    assert second == "  (Right)\nS[F]FF\nFHFH\nFFFH\nHFFG"


async def test_steps_that_cost_add_up():
    cliff = await play(["up", "right", "down"], make="CliffWalking-v1")
    assert (cliff.ending, cliff.rewards) == (Ending.TRUNCATED, {"earned": -1 - 1 - 100})
    taxi = await play(["drop off", "<action>South</action>"], make="Taxi-v4", max_turns=2)
    assert (taxi.rewards, taxi.seats[0].credits) == ({"earned": -11.0}, {0: -10.0, 1: -1.0})


async def test_what_is_no_action_costs_a_turn_and_nothing_else():
    record = await play(["jump", "", "DOWN ", "<action>1</action>"], **LAKE)
    assert (record.metrics, record.rewards) == ({"no_actions": 3.0}, {"earned": 0.0})
    assert record.messages[3]["content"] == f"{NO_ACTION} The actions are: left, down, right, up."


@settings(max_examples=40, deadline=None)
@given(ODD_REPLIES)
async def test_every_reply_is_scored(text):
    for args in (LAKE, GUESS):
        record = await play([text] * 3, **args)
        assert (record.ending, record.reward < 1) == (Ending.TRUNCATED, True), record.error


async def test_a_game_of_ones_own_takes_text():
    """By halves 7 guesses find every number to 100."""
    environment = GymnasiumText(**GUESS)
    for task in some_tasks(20, **GUESS):
        low, high, guesses = 1, 100, []
        game = Guess()
        game.reset(seed=task.info["seed"])
        while not guesses or int(guesses[-1]) != game.number:
            guesses.append(str((low + high) // 2))
            low, high = (int(guesses[-1]) + 1, high) if int(guesses[-1]) < game.number else (low, int(guesses[-1]) - 1)
        record = await score(environment, task, guesses)
        assert len(guesses) <= 7
        assert (record.ending, record.reward, record.seats[0].credits[len(guesses) - 1]) == (Ending.OK, 1.0, 1.0)
        assert {message["content"] for message in record.messages[3::2]} <= {"more", "less"}


async def test_wrong_guesses_earn_nothing_and_end():
    record = await play(["101"] * 20, **GUESS)
    assert (record.ending, record.reward, record.num_turns) == (Ending.OK, 0.0, 10)


async def test_the_same_task_is_the_same_game():
    first, again = [await play(["stick"], make="Blackjack-v1") for _ in range(2)]
    assert (first.messages, first.reward) == (again.messages, again.reward)
    starts = {(await play(["hit"], number, make="Blackjack-v1")).messages[1]["content"] for number in range(10)}
    assert len(starts) > 5


def test_seeds_are_deterministic_and_held_out():
    tasks = {split: some_tasks(50, split=split, **GUESS) for split in ("train", "test")}
    assert tasks["train"] == some_tasks(50, **GUESS)
    assert {task.info["seed"] % HELD_OUT == 0 for task in tasks["test"]} == {True}
    assert {task.info["seed"] % HELD_OUT == 0 for task in tasks["train"]} == {False}
    assert len({task.key for both in tasks.values() for task in both}) == 100


@pytest.mark.parametrize(
    ("drawing", "plain"),
    [
        ("\x1b[41mS\x1b[0mFF\n", "[S]FF"),
        ("|\x1b[34;1m\x1b[43mR\x1b[0m\x1b[0m: |\x1b[35mG\x1b[0m", "|{[R]}: |<G>"),
        ("\x1b[42m_\x1b[0m", "(_)"),
        ("\x1b[1mbold\x1b[0m", "bold"),
    ],
)
def test_colours_become_brackets(drawing, plain):
    assert shown(SimpleNamespace(render_mode="ansi", render=lambda: drawing)) == plain


def test_observations_are_told_as_python_has_them():
    numpy = pytest.importorskip("numpy")
    assert told("Go.") == "Go."
    assert told((numpy.int64(14), 10, False)) == "(14, 10, False)"
    assert told({"at": numpy.array([1, 2])}) == "{'at': [1, 2]}"


def test_an_action_is_a_name_or_text():
    actions = {"left": 0, "Right": 1}
    assert [read(reply, actions) for reply in ("left", " RIGHT\n", "<action>left</action>", "right!", "0", "")] == [
        0,
        1,
        0,
        None,
        None,
        None,
    ]
    assert read(" go north <action> ", {}) == "go north <action>"


async def test_names_of_ones_own():
    record = await play(["a"], **LAKE, actions=["w", "a", "s", "d"], rules="Walk.")
    assert record.messages[1]["content"].startswith("Walk. Actions: w, a, s, d.")
    assert record.messages[3]["content"].startswith("  (Down)")  # the second name is the second number
    few = await play(["a"], **LAKE, actions=["w"])
    assert few.ending == Ending.INVALID
    assert "args.actions has 1 names, and FrozenLake-v1 4 actions; name each" in few.error


@pytest.mark.parametrize(
    ("make", "words"),
    [
        ("NoSuchGame-v0", "args.make='NoSuchGame-v0': .*NoSuchGame"),
        ("no_such_module:Game", "cannot be found: No module named 'no_such_module'; give module:factory"),
        ("palestra_gymnasium.guess:Gess", "cannot be found: .*has no attribute 'Gess'"),
    ],
)
def test_what_cannot_be_made_is_refused_at_once(make, words):
    with pytest.raises(UserError, match=words):
        GymnasiumText(make=make)
