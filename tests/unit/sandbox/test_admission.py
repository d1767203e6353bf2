"""Admission: counts and memory are never exceeded and never lost, and tenants take turns."""

import asyncio
import random

import pytest

from palestra.core.errors import UserError
from palestra.sandbox.admission import Admission, RefusedError, Turns
from palestra.sandbox.tenants import Tenant


def tenant(name: str, most_sandboxes: int = 1000, most_memory_mb: int = 10**6) -> Tenant:
    return Tenant(name=name, token_sha256="0" * 64, most_sandboxes=most_sandboxes, most_memory_mb=most_memory_mb)


A, B = tenant("a"), tenant("b")


@pytest.mark.parametrize(
    ("who", "most", "most_memory_mb", "words"),
    [
        (tenant("a", most_sandboxes=2), 10, 1000, "2 sandboxes of yours are there, of at most 2"),
        (tenant("a", most_memory_mb=25), 10, 1000, "20 MB of sandboxes of yours are there, of at most 25"),
        (A, 2, 1000, "2 sandboxes are there, of at most 2"),
        (A, 10, 25, "20 MB of sandboxes are there, of at most 25"),
    ],
)
def test_each_bound_is_one_and_what_is_given_back_can_be_taken(who: Tenant, most: int, most_memory_mb: int, words: str):
    admission = Admission(most=most, most_memory_mb=most_memory_mb)
    for _ in range(2):
        admission.take(who, 1, 10)
    with pytest.raises(RefusedError) as refused:
        admission.take(who, 1, 10)
    assert words in str(refused.value)
    assert refused.value.reason == "full"
    admission.give_back(who, 1, 10)
    admission.take(who, 1, 10)
    with pytest.raises(RefusedError):
        admission.take(who, 1, 10)


def test_what_one_tenant_has_bounds_no_other():
    admission = Admission(most=10, most_memory_mb=1000)
    one, other = tenant("a", most_sandboxes=1), tenant("b", most_sandboxes=1)
    admission.take(one, 1, 10)
    admission.take(other, 1, 10)
    with pytest.raises(RefusedError):
        admission.take(one, 1, 10)


def test_what_can_never_be_is_a_mistake_and_not_a_wait():
    admission = Admission(most=10, most_memory_mb=1000)
    with pytest.raises(UserError, match="11 sandboxes were asked for"):
        admission.take(A, 11, 10)
    with pytest.raises(UserError, match="1001 MB"):
        admission.take(A, 1, 1001)


def turns(running: int, *, most_waiting: int = 100, wait_s: float = 10.0, most: int = 1000) -> Turns:
    admission = Admission(most=most, most_memory_mb=10**6)
    return Turns(admission, running=running, most_waiting=most_waiting, wait_s=wait_s)


async def test_tenants_take_turns_however_many_each_has_waiting():
    queue, order = turns(1), list[str]()
    await queue.begin(A, 1)

    async def one(who: Tenant) -> None:
        await queue.begin(who, 1)
        order.append(who.name)
        queue.end(who, 1)

    waiting = [asyncio.create_task(one(A)) for _ in range(6)]
    await asyncio.sleep(0)
    waiting += [asyncio.create_task(one(B)) for _ in range(3)]
    await asyncio.sleep(0)
    assert queue.num_waiting == 9
    queue.end(A, 1)
    await asyncio.gather(*waiting)
    assert "".join(order) == "abababaaa"
    assert queue.num_waiting == 0


async def test_a_queue_has_a_bound_for_each_tenant():
    queue = turns(1, most_waiting=2)
    await queue.begin(A, 1)
    waiting = [asyncio.create_task(queue.begin(A, 1)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(RefusedError, match="2 programs of yours wait already") as refused:
        await queue.begin(A, 1)
    assert refused.value.reason == "queue"
    other = asyncio.create_task(queue.begin(B, 1))
    await asyncio.sleep(0)
    assert queue.num_waiting == 3
    for who in (A, A, B):
        queue.end(who, 1)
    await asyncio.gather(*waiting, other)


async def test_a_queue_without_places_lets_those_through_that_need_not_wait():
    queue = turns(1, most_waiting=0)
    await queue.begin(A, 1)
    with pytest.raises(RefusedError):
        await queue.begin(A, 1)
    queue.end(A, 1)
    await queue.begin(A, 1)


async def test_a_wait_has_an_end_and_takes_nobodys_turn():
    queue = turns(1, wait_s=0.05)
    await queue.begin(A, 1)
    with pytest.raises(RefusedError, match=r"no turn came within 0\.05 s") as refused:
        await queue.begin(A, 1)
    assert refused.value.reason == "wait"
    assert queue.num_waiting == 0
    queue.end(A, 1)
    await queue.begin(A, 1)  # the slot is not lost
    queue.end(A, 1)


async def test_one_tenants_lack_of_room_holds_no_other_up():
    queue, small = turns(2), tenant("small", most_sandboxes=1)
    await queue.begin(small, 1)
    waits = asyncio.create_task(queue.begin(small, 1))
    await asyncio.sleep(0)
    await asyncio.wait_for(queue.begin(B, 1), timeout=1)
    assert not waits.done()
    queue.end(small, 1)
    await asyncio.wait_for(waits, timeout=1)


async def test_who_waits_is_told_when_nothing_more_begins():
    queue = turns(1)
    await queue.begin(A, 1)
    waiting = [asyncio.create_task(queue.begin(who, 1)) for who in (A, B)]
    await asyncio.sleep(0)
    queue.refuse_all(ConnectionError("the end"))
    assert [type(error) for error in await asyncio.gather(*waiting, return_exceptions=True)] == [ConnectionError] * 2


@pytest.mark.parametrize("seed", range(5))
async def test_whoever_gives_up_no_slot_is_lost_and_no_bound_is_broken(seed: int):
    """Random programs, some cancelled at random: at the end all slots are free, and there were never too many."""
    draw, running = random.Random(seed), 3
    queue, num, most_seen = turns(running, wait_s=0.02), 0, 0
    limited = tenant("limited", most_sandboxes=2)

    async def one(who: Tenant) -> None:
        nonlocal num, most_seen
        await queue.begin(who, 1)
        try:
            num += 1
            most_seen = max(most_seen, num)
            await asyncio.sleep(draw.random() * 0.004)
        finally:
            num -= 1
            queue.end(who, 1)

    tasks = []
    for _ in range(150):
        tasks.append(asyncio.create_task(one(draw.choice([A, B, limited]))))
        if draw.random() < 0.3:
            draw.choice(tasks).cancel()
        if draw.random() < 0.3:
            await asyncio.sleep(draw.random() * 0.002)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most_seen == running
    assert queue.num_waiting == 0
    for _ in range(running):
        await asyncio.wait_for(queue.begin(A, 1), timeout=1)
    with pytest.raises(RefusedError):
        await queue.begin(A, 1)
