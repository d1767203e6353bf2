"""The pool of environment workers, message by message; and which task is quarantined."""

import asyncio
import dataclasses
import math
from collections.abc import Sequence

import msgspec
import pytest

from palestra.core.errors import DeadlineError, InfrastructureError
from palestra.core.ledger import LedgerEntry
from palestra.core.records import NO_ROUTES, Ending, Reply, RolloutRecord, Routes, Sample, Sampling, Seat, Task
from palestra.orchestrate.quarantine import Quarantine
from palestra.orchestrate.state import TaskQuarantined
from palestra.orchestrate.workers import Deadlines, PlayOrder, WorkerPool
from palestra.wire.messages import (
    Call,
    CallReply,
    Cancel,
    Cancelled,
    Ended,
    GroupScored,
    LedgerClosed,
    ListTasks,
    Play,
    ScoreGroup,
    Tasks,
    WorkerReady,
)
from tests.unit.core.clocks import LoopClock


class Bench:
    """A pool, what it sent to whom, and what it asked of the supervisor."""

    def __init__(
        self,
        *workers: int,
        life: int = 0,
        ready_s: float = 5,
        stall_s: float = 5,
        answer_s: float = 5,
        max_bytes: float = math.inf,
    ):
        self.sent: list[tuple[str, object]] = []
        self.restarts: list[tuple[str, str]] = []
        self.planned: list[bool] = []  # of these
        self.quarantined: dict[str, str] = {}
        self.tasks: set[asyncio.Task] = set()
        self.pool = WorkerPool(
            self._send,
            self._spawn,
            num_workers=len(workers),
            deadlines=Deadlines(ready_s=ready_s, stall_s=stall_s, answer_s=answer_s),
            quarantine=Quarantine(self.quarantined, self._record),
            restart=self._restart,
            life=life,
            max_bytes=max_bytes,
        )
        for index in workers:
            self.ready(index)

    async def _send(self, worker: str, message) -> None:
        self.sent.append((worker, message))

    def _spawn(self, coroutine) -> asyncio.Task:
        task = asyncio.create_task(coroutine)
        self.tasks.add(task)
        return task

    def _restart(self, name: str, why: str, /, *, is_planned: bool = False) -> None:
        self.restarts.append((name, why))
        self.planned.append(is_planned)

    def _record(self, event: TaskQuarantined) -> None:
        self.quarantined[event.task] = event.reason

    def ready(self, index: int, life: int = 0, sources: Sequence[str] = ()) -> None:
        self.pool.handle(f"env-{index}", WorkerReady(index=index, pid=0, life=life, sources=list(sources)))

    def die(self, index: int, life: int = 0) -> None:
        self.pool.worker_ended(f"env-{index}", "killed by SIGKILL", life)

    def play(self, task: str = "t", rollout_id: int = 7) -> asyncio.Task[RolloutRecord]:
        return asyncio.create_task(self.pool.play(order(task, rollout_id)))

    def end(self, worker: str, play: Play) -> None:
        self.pool.handle(worker, Ended(record=record(play.rollout_id, play.task)))

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    def last(self, kind: type, number: int = 1) -> list[tuple[str, object]]:
        return [(worker, message) for worker, message in self.sent if isinstance(message, kind)][-number:]


async def no_answer(call: Call) -> Reply:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


def order(task: str, rollout_id: int = 7) -> PlayOrder:
    asked = Task(prompt=task, key=task)
    sampling = Sampling(max_tokens=4)
    return PlayOrder(rollout_id=rollout_id, source="s", task=asked, sampling=sampling, seed=0, answer=no_answer)


def record(number: int, task: Task) -> RolloutRecord:
    return RolloutRecord(rollout_id=number, environment="s", task=task, ending=Ending.OK)


def call_of(play: Play) -> Call:
    return Call(rollout_id=play.rollout_id, call=0, token_ids=[1], sampling=play.sampling)


async def test_a_rollout_of_a_dead_worker_is_played_again_on_another_and_the_late_word_of_the_dead_is_ignored():
    bench = Bench(0, 1)
    playing = bench.play()
    await bench.settle()
    [(first, play)] = bench.last(Play)
    bench.die(int(first[-1]))
    await bench.settle()
    [(second, again)] = bench.last(Play)
    assert second != first
    assert again.rollout_id != play.rollout_id
    bench.end(first, play)
    await bench.settle()
    assert not playing.done()
    bench.end(second, again)
    assert (await playing).rollout_id == 7


async def test_a_worker_that_is_ready_again_has_forgotten_what_it_was_asked():
    bench = Bench(0)
    playing = bench.play()
    await bench.settle()
    bench.ready(0, life=1)  # before anybody said that its predecessor died
    await bench.settle()
    [(_, play), (_, again)] = bench.last(Play, 2)
    assert again.rollout_id != play.rollout_id
    bench.die(0, life=0)  # that word comes late: the successor lives
    bench.end("env-0", again)
    assert (await playing).ending == Ending.OK


async def test_nothing_that_was_said_to_another_orchestrator_is_taken_for_an_answer():
    numbers = set()
    for life in range(3):
        bench = Bench(0, life=life)
        playing = bench.play()
        await bench.settle()
        [(_, play)] = bench.last(Play)
        numbers.add(play.rollout_id)
        playing.cancel()
    assert len(numbers) == 3


async def test_what_a_dead_worker_was_asked_is_asked_again():
    bench = Bench(0, 1)
    listing = asyncio.create_task(bench.pool.list_tasks("s", 0, 0, 4))
    scoring = asyncio.create_task(bench.pool.score_group("s", [record(1, Task(prompt="g"))]))
    await bench.settle()
    bench.die(0)
    bench.die(1)
    await bench.settle()
    assert not listing.done()
    assert not scoring.done()
    bench.ready(0, life=1)
    await bench.settle()
    [(_, asked)], [(_, to_score)] = bench.last(ListTasks), bench.last(ScoreGroup)
    bench.pool.handle("env-0", Tasks(request_id=asked.request_id, tasks=[], exhausted=True))
    bench.pool.handle("env-0", GroupScored(request_id=to_score.request_id, records=to_score.records))
    assert (await listing).exhausted
    assert [scored.rollout_id for scored in await scoring] == [1]


async def test_group_rewards_are_asked_for_without_routes_and_come_back_with_them():
    bench = Bench(0)
    sample = Sample(token_ids=[1, 2], logprobs=[0.0, -1.0], sampled=[0, 1], spans=(), routes=Routes(b"\x03", 1, 1))
    routed = msgspec.structs.replace(record(1, Task(prompt="g")), seats=(Seat(samples=(sample,)),))
    scoring = asyncio.create_task(bench.pool.score_group("s", [routed]))
    await bench.settle()
    [(_, asked)] = bench.last(ScoreGroup)
    assert asked.records[0].seats[0].samples[0].routes == NO_ROUTES
    scored = msgspec.structs.replace(asked.records[0], reward=2.0)
    bench.pool.handle("env-0", GroupScored(request_id=asked.request_id, records=[scored]))
    assert await scoring == [msgspec.structs.replace(routed, reward=2.0)]


async def test_a_wait_for_a_worker_ends_in_words():
    bench = Bench(0, ready_s=0.05)
    bench.die(0)
    with pytest.raises(DeadlineError, match=r"an environment worker of s to be there; see logs/env-\*\.log"):
        await bench.play()


async def test_a_rollout_without_progress_is_invalid_once_its_worker_has_answered(monkeypatch):
    bench, clock = Bench(0, stall_s=0.05), LoopClock(monkeypatch)
    playing = bench.play()
    await bench.settle()
    await clock.pass_by(0.04)
    assert bench.last(Cancel) == []
    await clock.pass_by(0.02)
    assert not playing.done(), "the worker may be blocked by another rollout"
    [(_, cancel)] = bench.last(Cancel)
    bench.pool.handle("env-0", Cancelled(rollout_id=cancel.rollout_id))
    ended = await playing
    assert ended.ending == Ending.INVALID
    assert "env.stall_s" in ended.error
    assert bench.restarts == []


async def test_a_worker_that_does_not_answer_is_given_up_and_its_rollouts_go_elsewhere(monkeypatch):
    bench, clock = Bench(0, 1, stall_s=0.05, answer_s=0.05), LoopClock(monkeypatch)
    playing = [bench.play("a", 1), bench.play("b", 2)]
    await bench.settle()
    (other, fine), (blocked, _) = sorted(bench.last(Play, 2), key=lambda sent: sent[0] == "env-0")
    bench.end(other, fine)
    await clock.pass_by(0.06)
    assert bench.restarts == [], "it may answer yet"
    await clock.pass_by(0.06)
    [(name, why)] = bench.restarts
    assert name == blocked == "env-0"
    assert "env.answer_s" in why
    [(worker, again)] = bench.last(Play)
    assert worker == "env-1"
    bench.end(worker, again)
    assert {(await one).ending for one in playing} == {Ending.OK}


async def test_a_question_to_a_blocked_worker_is_asked_of_another_and_a_slow_answer_is_an_error(monkeypatch):
    bench, clock = Bench(0, 1, stall_s=0.05, answer_s=0.05), LoopClock(monkeypatch)
    listing = asyncio.create_task(bench.pool.list_tasks("s", 0, 0, 4))
    await bench.settle()
    await clock.pass_by(0.06)
    await clock.pass_by(0.06)
    assert [name for name, _ in bench.restarts] == ["env-0"]
    [(worker, asked)] = bench.last(ListTasks)
    assert worker == "env-1"
    bench.pool.handle(worker, Tasks(request_id=asked.request_id, tasks=[], exhausted=True))
    assert (await listing).exhausted

    slow = asyncio.create_task(bench.pool.list_tasks("s", 0, 0, 4))
    await bench.settle()
    await clock.pass_by(0.06)
    [(worker, cancel)] = bench.last(Cancel)
    assert worker == "env-1"
    bench.pool.handle(worker, Cancelled(rollout_id=cancel.rollout_id))
    with pytest.raises(DeadlineError, match=r"waited 0\.05 s for tasks of s from env-1"):
        await slow
    assert len(bench.restarts) == 1


# --- quarantine


def verdicts(*deaths: set[str]) -> list[str]:
    events: dict[str, str] = {}
    quarantine = Quarantine(events, lambda event: events.update({event.task: event.reason}))
    return [quarantine.worker_died(death, "exit code 1") for death in deaths]


def test_the_task_that_three_deaths_share_is_named():
    assert verdicts({"a", "b"}, {"a", "c"}, {"d"}, {"a", "b"}) == ["", "", "", "a"]


@pytest.mark.parametrize(
    "deaths",
    [
        [{"a", "b"}, {"a", "b"}, {"a", "b"}],  # which of them, nobody can tell
        [{"a"}, {"a"}],
        [{"a"}, {"b"}, {"c"}],
        [set(), set(), set()],  # workers that were doing nothing
    ],
)
def test_where_the_cause_cannot_be_told_no_task_is(deaths: list[set[str]]):
    assert verdicts(*deaths) == [""] * len(deaths)


async def test_a_rollout_that_waits_for_an_engine_is_not_suspected():
    bench = Bench(0)
    waiting, running = bench.play("waits", 1), bench.play("runs", 2)
    for life in range(3):
        await bench.settle()
        for worker, play in bench.last(Play, 2):
            if play.task.key == "waits":
                bench.pool.handle(worker, call_of(play))
        await bench.settle()
        bench.die(0, life)
        bench.ready(0, life + 1)
    ended = await running
    assert list(bench.quarantined) == ["s/runs"]
    assert ended.ending == Ending.INVALID
    assert "quarantined" in ended.error
    assert not waiting.done()
    waiting.cancel()


async def test_suspects_are_played_one_at_a_time():
    bench = Bench(0)
    playing = [bench.play(name, number) for number, name in enumerate("abc")]
    for life in range(2):
        await bench.settle()
        bench.die(0, life)
        bench.ready(0, life + 1)
    for _ in playing:
        await bench.settle()
        [(worker, play)] = bench.last(Play)
        assert sum(isinstance(message, Play) for _, message in bench.sent) == 6 + playing_done(playing) + 1
        bench.end(worker, play)
    await asyncio.gather(*playing)
    assert bench.quarantined == {}


async def test_what_waits_for_its_turn_when_its_task_is_quarantined_is_not_played():
    """The third death is the last that the task costs, however many of its rollouts and scorings wait."""
    bench, scored = Bench(0), [record(9, Task(prompt="t", key="t"))]
    playing = [bench.play("t", number) for number in range(3)]
    scoring = asyncio.create_task(bench.pool.score_group("s", scored))
    for life in range(3):
        await bench.settle()
        bench.die(0, life)
        bench.ready(0, life + 1)
    await bench.settle()
    assert list(bench.quarantined) == ["s/t"]
    assert [(await each).ending for each in playing] == [Ending.INVALID] * 3
    with pytest.raises(InfrastructureError, match="quarantined"):
        await scoring
    tried = [message for _, message in bench.sent if isinstance(message, Play | ScoreGroup)]
    assert len(tried) == 4 + 4 + 1  # all at once, twice; then one alone


async def test_rewards_of_a_suspects_group_wait_for_the_other_suspect():
    """The third death tells the two apart."""
    bench, scored = Bench(0), [record(1, Task(prompt="scored", key="scored"))]
    playing = bench.play("played")
    await bench.settle()
    scoring = asyncio.create_task(bench.pool.score_group("s", scored))
    for life in range(3):
        await bench.settle()
        bench.die(0, life)
        bench.ready(0, life + 1)
    assert list(bench.quarantined) == ["s/played"]
    assert (await playing).ending == Ending.INVALID
    await bench.settle()
    [(worker, question)] = bench.last(ScoreGroup)
    bench.pool.handle(worker, GroupScored(request_id=question.request_id, records=scored))
    assert await scoring == scored


async def test_a_worker_that_dies_of_an_answer_was_at_work_however_soon_it_is_told():
    """The death is heard while the answer is still being sent."""
    bench = Bench(0)
    sent = bench._send

    async def send_and_die(worker: str, message) -> None:
        await sent(worker, message)
        if isinstance(message, CallReply):
            bench.die(0, life)

    async def answer(call: Call) -> Reply:
        raise InfrastructureError("the engine is gone")

    bench.pool._send = send_and_die
    playing = asyncio.create_task(bench.pool.play(dataclasses.replace(order("dies"), answer=answer)))
    for life in range(3):
        await bench.settle()
        [(worker, play)] = bench.last(Play)
        bench.pool.handle(worker, call_of(play))
        await bench.settle()
        bench.ready(0, life + 1)
    assert list(bench.quarantined) == ["s/dies"]
    assert (await playing).ending == Ending.INVALID


def playing_done(playing: list[asyncio.Task]) -> int:
    return sum(one.done() for one in playing)


async def test_group_rewards_of_a_quarantined_task_are_not_asked_for():
    bench = Bench(0)
    bench.quarantined["s/g"] = "workers died of it"
    with pytest.raises(InfrastructureError, match="quarantined: workers died of it"):
        await bench.pool.score_group("s", [record(1, Task(prompt="g", key="g"))])
    assert (await bench.play("g")).ending == Ending.INVALID
    assert bench.sent == []


async def test_a_rollout_is_played_by_a_worker_that_has_its_environment():
    bench = Bench()
    bench.ready(0, sources=["other"])
    playing = bench.play()
    await asyncio.sleep(0.02)
    assert bench.sent == []
    bench.ready(1, sources=["s", "more"])
    await asyncio.sleep(0.02)
    assert [worker for worker, _ in bench.sent] == ["env-1"]
    playing.cancel()


async def test_a_worker_that_holds_too_much_is_started_again_and_loses_no_rollout():
    bench = Bench(0, max_bytes=2**30)
    playing = bench.play()
    await asyncio.sleep(0.02)
    entry = LedgerEntry(process="env-0", started_at=0.0, wall_s=1.0, parts_s={})
    bench.pool.watch_memory("env-0", LedgerClosed(entry=entry, resident_bytes=2**30))
    assert bench.restarts == []
    bench.pool.watch_memory("env-0", LedgerClosed(entry=entry, resident_bytes=2**30 + 1))
    assert bench.planned == [False]  # it has ended no rollout
    [(worker, why)] = bench.restarts
    assert worker == "env-0"
    assert "max_worker_gib=1" in why
    bench.ready(0, life=1)
    await asyncio.sleep(0.02)
    assert [worker for worker, message in bench.sent if isinstance(message, Play)] == ["env-0", "env-0"]
    playing.cancel()


async def test_a_worker_that_leaks_while_it_works_ends_by_plan_and_no_task_is_suspected():
    bench, entry = Bench(0, max_bytes=1), LedgerEntry(process="env-0", started_at=0.0, wall_s=1.0, parts_s={})
    leaking = bench.play("leaks", 1)
    for life in range(5):
        other = bench.play("other", 2)
        await bench.settle()
        [play] = [play for _, play in bench.last(Play, 2) if play.task.key == "other"]
        bench.end("env-0", play)
        await other
        bench.pool.watch_memory("env-0", LedgerClosed(entry=entry, resident_bytes=2))
        bench.die(0, life)
        bench.ready(0, life + 1)
    assert bench.planned == [True] * 5
    assert bench.quarantined == {}
    assert not bench.pool.quarantine.is_suspect("s", Task(prompt="leaks", key="leaks"))
    leaking.cancel()
