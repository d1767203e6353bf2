"""Who may use a shared device; each clause with a control."""

import pytest

from palestra.orchestrate.turns import TRAINER, Turns
from palestra.wire.messages import TurnGiven

ENGINE = "engine-0"


def make(**options) -> tuple[Turns, list[str]]:
    sent: list[str] = []

    async def send(peer: str, message: TurnGiven) -> None:
        sent.append(peer)

    return Turns([TRAINER, ENGINE], send, **options), sent


async def test_a_turn_is_given_to_one_that_asks_where_nobody_else_has_it():
    turns, sent = make()
    turns.asked(ENGINE)
    turns.asked(TRAINER)
    await turns.give(ENGINE)
    assert (sent, turns.asks(ENGINE), turns.asks(TRAINER)) == ([ENGINE], False, True)
    assert not turns.is_free_for(TRAINER)
    with pytest.raises(ValueError, match="trainer cannot begin its turn"):
        await turns.give(TRAINER)
    turns.over(ENGINE)
    await turns.give(TRAINER)
    assert sent == [ENGINE, TRAINER]
    with pytest.raises(ValueError, match="engine-0 cannot begin its turn"):
        turns.begin(ENGINE)  # a publish that would wake it


async def test_who_asks_again_has_nothing():
    """It was started again, before its end was heard."""
    turns, _ = make()
    turns.asked(TRAINER)
    await turns.give(TRAINER)
    turns.asked(TRAINER)
    assert turns.is_free_for(ENGINE)


def test_a_successor_takes_both_to_be_at_it_until_they_say_otherwise():
    turns, _ = make(is_inherited=True)
    assert not turns.is_free_for(TRAINER)
    assert not turns.is_free_for(ENGINE)
    turns.over(TRAINER)
    assert turns.is_free_for(ENGINE)
    assert not turns.is_idle(ENGINE)


def test_without_turns_each_has_a_device_of_its_own():
    async def send(peer: str, message: TurnGiven) -> None:
        raise AssertionError(peer)

    turns = Turns([], send, is_inherited=True)
    turns.begin(ENGINE)
    turns.asked(TRAINER)
    assert turns.is_free_for(TRAINER)
    assert not turns.asks(TRAINER)
