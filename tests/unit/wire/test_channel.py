"""Messages between processes: fencing, deadlines, last words."""

import asyncio
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from palestra.core.errors import DeadlineError, InfrastructureError
from palestra.wire.channel import BlockingCaller, Caller, Listener, Reconnected, Woken
from palestra.wire.messages import Done, Finish, FromTrainer, Progress, ToSupervisor, ToTrainer, TrainerReady


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/s"


def listener(address: str, attempt: int = 1) -> Listener[FromTrainer, ToTrainer]:
    return Listener(address, attempt=attempt, receives=FromTrainer)


def caller(address: str, attempt: int = 1, name: str = "trainer", *, life: int = 0) -> Caller[ToTrainer, FromTrainer]:
    return Caller(address, name=name, attempt=attempt, receives=ToTrainer, life=life)


async def test_there_and_back(address: str):
    here, there = listener(address), caller(address)
    await there.send(TrainerReady(version=7))
    async with asyncio.timeout(20):
        assert await here.receive() == ("trainer", TrainerReady(version=7))
    await here.send("trainer", Finish())
    assert await there.receive(deadline_s=20, waiting_for="a batch") == Finish()
    there.close()
    here.close()


async def wait_for_refusal(here: Listener) -> None:
    while here.num_refused == 0:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await here.receive()


async def test_a_message_of_an_older_attempt_is_refused(address: str):
    here, old, new = listener(address, attempt=2), caller(address, attempt=1, name="old"), caller(address, attempt=2)
    await old.send(TrainerReady(version=1))
    await wait_for_refusal(here)
    await new.send(TrainerReady(version=2))
    async with asyncio.timeout(20):
        assert await here.receive() == ("trainer", TrainerReady(version=2))
    assert here.num_refused == 1
    for channel in (old, new, here):
        channel.close()


async def test_a_caller_refuses_an_older_listener_too(address: str):
    here, there = listener(address, attempt=1), caller(address, attempt=2)
    await there.send(TrainerReady(version=0))
    await wait_for_refusal(here)
    await here.send("trainer", Finish())
    with pytest.raises(DeadlineError, match=r"waited 0\.2 s for a batch"):
        await there.receive(deadline_s=0.2, waiting_for="a batch")
    there.close()
    here.close()


async def test_a_successor_takes_the_name_over_and_its_predecessor_counts_no_more(address: str):
    here, first = listener(address), caller(address)
    await first.send(TrainerReady(version=1))
    async with asyncio.timeout(20):
        assert await here.receive() == ("trainer", TrainerReady(version=1))
        second = caller(address, life=1)
        await second.send(TrainerReady(version=2))
        assert await here.receive() == ("trainer", TrainerReady(version=2))
        await here.send("trainer", Finish())
        assert await second.receive(deadline_s=20, waiting_for="a batch") == Finish()
        late = caller(address, life=0)  # what a predecessor had still to say
        await late.send(TrainerReady(version=3))
        await wait_for_refusal(here)
    assert here.num_refused == 1
    for channel in (first, second, late, here):
        channel.close()


async def test_words_that_are_read_after_a_successor_took_the_name_over_are_nobodys(address: str):
    """Both are connected, and have spoken, before the listener looks: ZeroMQ gives the old connection another name."""
    here = listener(address)
    connected = here._socket.zmq.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    channels: list[Listener | Caller] = [here]
    for life in (0, 1):
        channels.append(there := caller(address, life=life))
        await there.send(TrainerReady(version=1 + life))
        assert connected.poll(20_000)
        recv_monitor_message(connected)
        await asyncio.sleep(0.2)
    here._socket.zmq.disable_monitor()
    connected.close()
    async with asyncio.timeout(20):
        assert await here.receive() == ("trainer", TrainerReady(version=2))
    for channel in reversed(channels):
        channel.close()


async def test_a_caller_hears_that_its_listener_was_replaced_and_reaches_the_new_one(address: str):
    first, there = listener(address), caller(address)
    await there.send(TrainerReady(version=1))
    async with asyncio.timeout(20):
        await first.receive()
        first.close()
        second: Listener[FromTrainer, ToTrainer] = Listener(address, attempt=1, life=1, receives=FromTrainer)
        assert await there.receive(deadline_s=20, waiting_for="a batch") == Reconnected()
        await there.send(TrainerReady(version=2))
        assert await second.receive() == ("trainer", TrainerReady(version=2))
        await second.send("trainer", Finish())
        assert await there.receive(deadline_s=20, waiting_for="a batch") == Finish()
    there.close()
    second.close()


async def test_a_blocking_caller_hears_of_a_new_listener_too(address: str):
    there: BlockingCaller[ToTrainer, FromTrainer] = BlockingCaller(
        address, name="trainer", attempt=1, receives=ToTrainer
    )
    first = listener(address)
    there.send(TrainerReady(version=1))
    async with asyncio.timeout(20):
        await first.receive()
        first.close()
        second = listener(address)
        heard = await asyncio.to_thread(there.receive, deadline_s=20, waiting_for="a batch")
        assert heard == Reconnected()
        there.send(TrainerReady(version=2))
        assert await second.receive() == ("trainer", TrainerReady(version=2))
        await second.send("trainer", Finish())
        assert await asyncio.to_thread(there.receive, deadline_s=20, waiting_for="a batch") == Finish()
    there.close()
    second.close()


async def test_nothing_is_lost_when_a_wait_is_cancelled(address: str):
    here, there = listener(address), caller(address)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await here.receive()
    for version in range(3):
        await there.send(TrainerReady(version=version))
    async with asyncio.timeout(20):
        assert [(await here.receive())[1] for _ in range(3)] == [TrainerReady(version=v) for v in range(3)]
    there.close()
    here.close()


async def test_a_peer_that_is_not_there_is_an_error(address: str):
    here = listener(address)
    with pytest.raises(InfrastructureError, match=r"trainer is not connected .*see logs/trainer\.log"):
        await here.send("trainer", Finish())
    here.close()


def test_an_address_has_one_owner():
    with socket.create_server(("127.0.0.1", 0)) as owner:
        address = f"tcp://127.0.0.1:{owner.getsockname()[1]}"
        with pytest.raises(InfrastructureError, match=f"cannot listen at {address}: .*is another run using it"):
            listener(address)


def test_a_blocking_caller_has_a_deadline(address: str):
    alone: BlockingCaller[ToTrainer, FromTrainer] = BlockingCaller(
        address, name="trainer", attempt=1, receives=ToTrainer
    )
    with pytest.raises(DeadlineError, match=r"waited 0\.05 s for the batch of step 3"):
        alone.receive(deadline_s=0.05, waiting_for="the batch of step 3")
    alone.close()


LAST_WORDS = """
import os, sys
from palestra.wire.channel import BlockingCaller
from palestra.wire.messages import Done, Progress, ToSupervisor
caller = BlockingCaller(sys.argv[1], name="trainer", attempt=1, receives=ToSupervisor)
for step in range(100):
    caller.send(Progress(process="trainer", stage="training", step=step))
caller.send(Done(process="trainer"))
caller.close()
"""


async def test_last_words_arrive_although_the_process_ends_at_once(address: str):
    here: Listener[ToSupervisor, ToSupervisor] = Listener(address, attempt=1, receives=ToSupervisor)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", LAST_WORDS + "os._exit(0)", address)
    async with asyncio.timeout(60):
        messages = [(await here.receive())[1] for _ in range(101)]
        assert await process.wait() == 0
    assert [message.step for message in messages[:-1] if isinstance(message, Progress)] == list(range(100))
    assert messages[-1] == Done(process="trainer")
    here.close()


def test_closing_without_a_listener_does_not_wait_for_ever(address: str):
    script = LAST_WORDS + "print('ended')"
    ended = subprocess.run([sys.executable, "-c", script, address], capture_output=True, text=True, timeout=30)
    assert ended.stdout == "ended\n"


def test_a_thread_wakes_who_waits_once_and_nobody_else(address: str):
    there = BlockingCaller(address, name="trainer", attempt=1, receives=ToTrainer)
    threading.Timer(0.1, lambda: [there.wake() for _ in range(3)]).start()
    assert there.receive(deadline_s=20, waiting_for="a thread") == Woken()
    there.wake()  # before anybody waits
    assert there.receive(deadline_s=0, waiting_for="a thread") == Woken()
    with pytest.raises(DeadlineError):
        there.receive(deadline_s=0.05, waiting_for="nothing")
    there.close()
    there.wake()  # by a thread that is late
