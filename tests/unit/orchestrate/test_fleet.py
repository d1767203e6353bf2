"""The fleet: room by limits, who gets it, and where sessions go; each clause with a control."""

import asyncio
import heapq
import random
from collections.abc import Callable

import pytest

from palestra.core.errors import DeadlineError
from palestra.core.ledger import Ledger
from palestra.orchestrate.fleet import EngineLink, Fleet


class Silent:
    def forget(self):
        pass


def make_fleet(*limits: int, healthy_s: float = 5) -> Fleet:
    links = [EngineLink(f"engine-{i}", Silent(), Ledger(f"engine-{i}"), limit=n) for i, n in enumerate(limits)]  # type: ignore[arg-type]
    fleet = Fleet(links, healthy_s=healthy_s, restart=lambda *why: None, changed=lambda: None)
    for link in links:
        fleet.healthy(link)
        fleet.joined(link)
    return fleet


def sessions(fleet: Fleet) -> list[int]:
    return [link.sessions for link in fleet.links]


async def engine_of(fleet: Fleet, session: int) -> str:
    return (await fleet.engine_for(session)).name


# --- room


async def test_who_was_let_in_as_the_engine_left_waits_for_the_next():
    """Both before it runs again: it has no home then, and there is none to choose from."""
    fleet = make_fleet(1)
    link = fleet.links[0]
    fleet.sleeps(link)
    waiting = asyncio.create_task(fleet.engine_for(7))
    await asyncio.sleep(0)
    fleet.joined(link)
    fleet.sleeps(link)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    fleet.joined(link)
    assert (await waiting).name == "engine-0"
    assert sessions(fleet) == [1]


async def test_one_deadline_counts_however_often_it_was_let_in():
    fleet = make_fleet(1, healthy_s=0.3)
    link = fleet.links[0]
    fleet.sleeps(link)
    waiting = asyncio.create_task(fleet.engine_for(7))
    for _ in range(5):
        await asyncio.sleep(0.1)
        fleet.joined(link)
        fleet.sleeps(link)
    with pytest.raises(DeadlineError, match="an engine that serves"):
        await asyncio.wait_for(waiting, 0.1)


async def test_a_group_shares_an_engine_while_that_has_room_and_spills_over_then():
    fleet = make_fleet(6, 6)
    for session in range(8):
        fleet.admit(session, group=0)
    assert sessions(fleet) == [6, 2]
    assert [await engine_of(fleet, session) for session in (0, 5, 6)] == ["engine-0", "engine-0", "engine-1"]
    assert fleet.room == 4
    fleet.release(0)
    fleet.admit(8, group=0)
    assert await engine_of(fleet, 8) == "engine-0", "the prefix of the group is there"
    fleet.release(1)
    fleet.forget(0)
    fleet.admit(9, group=0)
    assert await engine_of(fleet, 9) == "engine-1", "nobody remembers the prefix"


async def test_a_lower_limit_stops_nobody_and_lets_nobody_in_until_it_is_reached():
    fleet = make_fleet(4)
    [link] = fleet.links
    for session in range(4):
        fleet.admit(session, group=0)
    fleet.limit(link, 2, is_braked=False)
    assert sessions(fleet) == [4]
    assert [fleet.room for session in range(3) if fleet.release(session) is None] == [0, 0, 1]


async def test_a_braked_engine_takes_nobody_but_one_if_it_is_empty():
    """Control for a gauge that stays high although nothing runs: the run would stand still."""
    fleet = make_fleet(4)
    [link] = fleet.links
    fleet.admit(0, group=0)
    fleet.limit(link, 4, is_braked=True)
    assert fleet.room == 0
    fleet.release(0)
    assert fleet.room == 1


async def test_sessions_whose_engine_left_wait_for_room_and_come_before_new_ones():
    fleet = make_fleet(2, 2)
    for session in range(4):
        fleet.admit(session, group=session)
    moved = [session for session in range(4) if await engine_of(fleet, session) == "engine-0"]
    stayed = [session for session in range(4) if session not in moved]
    fleet.engine_ended("engine-0")
    calls = [asyncio.create_task(engine_of(fleet, session)) for session in moved]
    await asyncio.sleep(0)
    assert sessions(fleet) == [0, 2]
    assert not any(call.done() for call in calls)
    fleet.release(stayed[0])
    assert fleet.room <= 0, "what was freed is not for new sessions"
    assert await calls[0] == "engine-1"
    assert not calls[1].done()
    fleet.healthy(fleet.engine_started("engine-0"))
    fleet.joined(fleet.links[0])
    assert await calls[1] == "engine-0"
    assert fleet.room == 1


async def test_for_want_of_room_a_session_goes_over_the_limit_after_a_while_rather_than_fail():
    fleet = make_fleet(1, healthy_s=0.05)
    fleet.admit(0, group=0)
    assert await engine_of(fleet, 1) == "engine-0"
    assert sessions(fleet) == [2]


async def test_without_any_engine_it_fails_in_words():
    fleet = make_fleet(1, healthy_s=0.05)
    fleet.engine_ended("engine-0")
    with pytest.raises(DeadlineError, match="an engine that serves"):
        await fleet.engine_for(0)


async def test_a_call_that_is_given_up_while_it_waits_takes_no_room():
    fleet = make_fleet(1)
    fleet.admit(0, group=0)
    call = asyncio.create_task(engine_of(fleet, 1))
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    fleet.release(0)
    assert sessions(fleet) == [0]
    assert fleet.room == 1


async def test_calls_of_one_session_that_wait_together_take_one_place():
    fleet = make_fleet(1)
    fleet.admit(0, group=0)
    calls = [asyncio.create_task(engine_of(fleet, 1)) for _ in range(3)]
    await asyncio.sleep(0)
    fleet.release(0)
    assert await asyncio.gather(*calls) == ["engine-0"] * 3
    assert sessions(fleet) == [1]


# --- who gets the work


Step = Callable[[int], float]
"""Seconds of one token of each rollout, by how many rollouts an engine has."""


def play(fleet: Fleet, steps_s: list[Step], *, groups: int, outstanding: int, size: int = 8) -> list[int]:
    """Groups of rollouts, `outstanding` of them at once. Returns the tokens of each engine until no more were left."""
    rng, now, tokens = random.Random(0), 0.0, [0] * len(steps_s)
    todo = [(group * size + member, group) for group in range(groups) for member in range(size)]
    ends: list[tuple[float, int, int, float, EngineLink]] = []
    while todo or ends:
        while todo and len(ends) < outstanding and fleet.room > 0:
            session, group = todo.pop(0)
            before = sessions(fleet)
            fleet.admit(session, group)
            [link] = [link for link, known in zip(fleet.links, before, strict=True) if link.sessions > known]
            if (session + 1) % size == 0:
                fleet.forget(group)
            length = rng.randint(50, 150)
            step_s = steps_s[fleet.links.index(link)](link.sessions)
            heapq.heappush(ends, (now + length * step_s, session, length, now, link))
        now, session, length, began, link = heapq.heappop(ends)
        link.note_speed(length, now - began)
        tokens[fleet.links.index(link)] += length if todo else 0
        fleet.release(session)
    return tokens


def even(step_s: float) -> Step:
    """Room to spare: a token takes as long however many rollouts there are."""
    return lambda num_rollouts: step_s


def saturated(step_s: float) -> Step:
    """As many tokens per second however many rollouts there are."""
    return lambda num_rollouts: step_s * num_rollouts


def test_a_saturated_engine_three_times_slower_gets_a_third_of_the_work():
    slow, fast = play(make_fleet(64, 64), [saturated(0.003), saturated(0.001)], groups=300, outstanding=64)
    assert 0.28 < slow / fast < 0.38


def test_with_room_to_spare_the_slow_engine_gets_less_still_but_never_nothing():
    """A third of the rollouts, each three times as long: a ninth of the work, where the fast engine has room for it."""
    slow, fast = play(make_fleet(64, 64), [even(0.03), even(0.01)], groups=300, outstanding=64)
    assert 1 / 11 < slow / fast < 1 / 6


def test_by_numbers_alone_an_engine_with_room_to_spare_would_get_a_third(monkeypatch):
    """Control: without its speed the slow engine gets as many rollouts as the fast one."""
    monkeypatch.setattr(EngineLink, "backlog", lambda link, typical: link.sessions + 1)
    slow, fast = play(make_fleet(64, 64), [even(0.03), even(0.01)], groups=300, outstanding=64)
    assert slow / fast > 0.28


@pytest.mark.parametrize("engines", [2, 4, 5])
def test_new_groups_spread_evenly_over_equal_engines(engines: int):
    tokens = play(make_fleet(*[64] * engines), [even(0.01)] * engines, groups=400, outstanding=32 * engines)
    assert max(tokens) < 1.1 * min(tokens)


def joined_late() -> float:
    """Tokens of an engine that joins beside one that is known to sample 100 per second, by that one's."""
    fleet = make_fleet(64, 64)
    fleet.engine_ended("engine-1")
    assert play(fleet, [even(0.01)] * 2, groups=40, outstanding=32)[1] == 0
    fleet.healthy(fleet.engine_started("engine-1"))
    fleet.joined(fleet.links[1])
    first, second = play(fleet, [even(0.01)] * 2, groups=200, outstanding=32)
    return second / max(first, 1)


def test_an_engine_that_joins_late_gets_its_part(monkeypatch):
    assert 0.8 < joined_late() < 1.25
    monkeypatch.setattr(EngineLink, "backlog", lambda link, typical: (link.sessions + 1) / (link.tokens_per_s or 1.0))
    assert joined_late() < 0.1, "control: an engine of unknown speed, taken for a slow one"
