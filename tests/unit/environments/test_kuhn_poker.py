"""Kuhn poker: every line of play by hand, odd words, and what a seat earns."""

from collections import Counter
from itertools import permutations
from random import Random

import palestra_kuhn_poker
import pytest
from palestra_kuhn_poker import KuhnPoker
from palestra_kuhn_poker.chance import AgainstChance, Chance, demonstrations

from palestra.core.records import Ending, Task
from palestra.env.play import score
from tests.unit.environments.laws import num_lines

PLAYS = [  # who plays what, and what the first one wins with the higher and with the lower card, in chips
    (("check", "check"), (1, -1)),
    (("bet", "fold"), (1, 1)),
    (("bet", "call"), (2, -2)),
    (("check", "bet", "fold"), (-1, -1)),
    (("check", "bet", "call"), (2, -2)),
]


@pytest.mark.parametrize(("moves", "wins"), PLAYS)
@pytest.mark.parametrize("cards", list(permutations("JQK", 2)))
async def test_the_pot_goes_to_whom_it_belongs(cards, moves, wins):
    won = wins["JQK".index(cards[0]) < "JQK".index(cards[1])]
    task = Task(key="t", info={"cards": list(cards)})
    record = await score(KuhnPoker(), task, {"first": moves[::2], "second": moves[1::2]})
    assert record.ending == Ending.OK
    assert [seat.rewards["won"] for seat in record.seats] == [won / 2, -won / 2]


@pytest.mark.parametrize("word", ["", "raise", "BET!", "\x00", "fold", "b" * 10_000])
async def test_what_is_no_move_costs_more_than_a_fold(word):
    task = Task(key="t", info={"cards": ["K", "J"]})
    record = await score(KuhnPoker(), task, {"first": [word], "second": ["check"]})
    assert [seat.rewards["won"] for seat in record.seats] == [-1.0, 1.0]


async def test_a_seat_that_says_nothing_loses_and_the_rollout_is_scored():
    record = await score(KuhnPoker(), Task(key="t", info={"cards": ["J", "K"]}), {"first": ["bet"], "second": []})
    assert record.ending == Ending.TRUNCATED
    assert [seat.rewards["won"] for seat in record.seats] == [1.0, -1.0]


def test_the_authors_code_is_short():
    assert num_lines(palestra_kuhn_poker) <= 40


async def test_a_player_that_moves_by_chance_plays_by_the_rules_and_sits_in_either_place():
    task, cards = Task(key="t", info={"cards": ["K", "J"]}), Counter()
    record = await score(AgainstChance(), task, ["check", "fold"])
    assert (record.ending, [seat.name for seat in record.seats]) == (Ending.OK, ["agent"])
    for seed in range(100):
        agent = Chance(Random(seed))
        await AgainstChance().run(task, agent)
        cards[agent.messages[0]["content"].split(".")[0]] += 1
    assert 30 < cards["Your card: K"] < 70
    assert cards.total() == 100


class Bold(Chance):
    """Bets, and calls every bet."""

    async def __call__(self, told):
        await super().__call__(told)
        return "call" if told.endswith("fold or call?") else "bet"


async def test_against_chance_a_king_that_is_bet_earns_the_most_and_what_is_no_move_loses_the_most():
    task, earned = Task(key="t", info={"cards": ["K", "J"]}), set()
    for seed in range(100):
        agent = Bold(Random(seed))
        await AgainstChance().run(task, agent)
        if agent.messages[0]["content"].startswith("Your card: K"):
            earned.add(agent.rewards["won"])
    assert earned == {0.5, 1.0}
    bad = await score(AgainstChance(), task, ["I pass."])
    assert (bad.ending, bad.reward, bad.rewards) == (Ending.OK, -1.0, {"won": -1.0})


async def test_demonstrations_are_conversations_of_the_game_with_every_move_by_chance():
    rows = await demonstrations(300)
    said = Counter(m["content"] for row in rows for m in row["messages"] if m["role"] == "assistant")
    assert said.keys() == {"check", "bet", "fold", "call"}
    assert 0.8 < said["check"] / said["bet"] < 1.25
    assert 0.8 < said["fold"] / said["call"] < 1.25
    assert all(row["messages"][0] == {"role": "system", "content": KuhnPoker.system} for row in rows)
