"""Kuhn poker: every line of play by hand, odd words, and what a seat earns."""

from itertools import permutations

import pytest
from palestra_kuhn_poker import KuhnPoker

from palestra.core.records import Ending, Task
from palestra.env.play import score

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
async def test_what_is_no_move_loses_the_pot(word):
    task = Task(key="t", info={"cards": ["K", "J"]})
    record = await score(KuhnPoker(), task, {"first": [word], "second": ["check"]})
    assert [seat.rewards["won"] for seat in record.seats] == [-0.5, 0.5]


async def test_a_seat_that_says_nothing_loses_what_it_staked_and_the_rollout_is_scored():
    record = await score(KuhnPoker(), Task(key="t", info={"cards": ["J", "K"]}), {"first": ["bet"], "second": []})
    assert record.ending == Ending.TRUNCATED
    assert [seat.rewards["won"] for seat in record.seats] == [0.5, -0.5]
