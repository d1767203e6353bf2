"""A real environment worker process against a scripted orchestrator."""

import asyncio
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from palestra.config import RunConfig, read_resolved
from palestra.core.ledger import LedgerEntry, total
from palestra.core.records import Ending, RolloutRecord, Sampling, Task
from palestra.env.chat import ChatTokenizer, load_tokenizer
from palestra.launch.machine import Machine
from palestra.launch.plan import make_plan
from palestra.wire.channel import Listener
from palestra.wire.messages import (
    Call,
    CallReply,
    Cancel,
    Cancelled,
    Ended,
    Failed,
    FromWorker,
    GroupScored,
    LedgerClosed,
    ListTasks,
    Play,
    ScoreGroup,
    Stop,
    Tasks,
    ToSupervisor,
    ToWorker,
    WorkerReady,
)
from palestra.wire.rundir import Attempt, RunDir
from tests.unit.env.tiny import answer, last_user_text, save_tokenizer

DEADLINE_S = 60
SAMPLING = Sampling(max_tokens=16)
FAULTY = '''
import asyncio

from palestra.env import Environment, Sandbox, Task, reward

class Faulty(Environment):
    """Some of its prompts are orders to misbehave."""
    fault: str = "none"

    def tasks(self):
        if self.fault == "tasks":
            raise RuntimeError("the data set is gone")
        yield from (Task(prompt=f"word {i}") for i in range(10))

    async def run(self, task, agent, box: Sandbox):
        if task.prompt == "exit":
            raise SystemExit(3)
        if task.prompt.startswith("/"):
            await box.exec(f"sleep 600 & echo $! $PWD > {task.prompt}; sleep 600", timeout_s=600)
        if task.prompt == "raise":
            raise KeyError("no such thing")
        await agent(task.prompt)

    @reward
    def length(self, task, rollout):
        return 1 / len(rollout.reply)

    @reward(group=True, weight=10.0)
    async def rank(self, task, rollouts):
        if any(rollout.reply == "hang" for rollout in rollouts):
            await asyncio.Event().wait()
        return [float(rollout.reply == max(r.reply for r in rollouts)) for rollout in rollouts]
'''

SLOW = """
import time

from palestra.env import Environment, Task, reward

time.sleep(4)

class Slow(Environment):
    def tasks(self):
        yield Task(prompt="word")

    @reward
    def nothing(self, task, rollout):
        return 0.0
"""


@dataclass
class Bench:
    """The orchestrator's end of one worker, and the process."""

    listener: Listener[FromWorker, ToWorker]
    process: asyncio.subprocess.Process
    tokenizer: ChatTokenizer
    name: str = "env-0"
    entries: list[LedgerEntry] = field(default_factory=list)  # of its ledger, in the order they came

    async def receive(self) -> FromWorker:
        async with asyncio.timeout(DEADLINE_S):
            message = (await self.listener.receive())[1]
        if isinstance(message, LedgerClosed):
            self.entries.append(message.entry)
        return message

    async def receive_a(self, kind: type) -> FromWorker:
        """The next message of this kind; ledger entries may come in between."""
        while not isinstance(message := await self.receive(), kind):
            assert isinstance(message, LedgerClosed), message
        return message

    async def send(self, message: ToWorker) -> None:
        await self.listener.send(self.name, message)

    async def reply(self, call: Call, text: str) -> None:
        reply = answer(self.tokenizer, text, call.sampling, version=3)
        await self.send(CallReply(rollout_id=call.rollout_id, call=call.call, reply=reply))

    async def play(self, task: Task, *replies: str, source: str = "faulty", rollout_id: int = 1) -> RolloutRecord:
        await self.send(Play(rollout_id=rollout_id, source=source, task=task, sampling=SAMPLING, seed=0))
        for text in replies:
            await self.reply(await self.receive_a(Call), text)
        return (await self.receive_a(Ended)).record

    def rss_modules(self) -> str:
        """What the running process has mapped."""
        return Path(f"/proc/{self.process.pid}/maps").read_text()


def prepare(directory: Path, mix: list[dict]) -> RunDir:
    model = save_tokenizer(directory / "tokenizer")
    run = RunDir(directory / "run")
    run.path.mkdir()
    config = RunConfig.model_validate(
        {
            "log": {"name": "run", "outputs": str(directory)},
            "model": {"path": str(model)},
            "sampling": {"max_tokens": 16},
            "engine": {"max_model_len": 64},
            "env": {"mix": mix, "sandbox": "unsafe"},
            "eval": {"sets": [{"id": "reverse-text", "name": "held-out"}]},
        }
    )
    run.config.write_text(config.model_dump_json())
    run.write_attempt(
        Attempt(
            number=2,
            resumed_from=None,
            supervisor=f"ipc://{directory}/supervisor",
            orchestrator=f"ipc://{directory}/orchestrator",
            engines=(),
            staging=str(directory),
            started_at=time.time(),
        )
    )
    return run


async def start(run: RunDir, index: int = 0) -> asyncio.subprocess.Process:
    """As the plan says."""
    plan = make_plan(read_resolved(run.config), Machine(cpus=2, memory_bytes=2**34))
    [program] = [program for program in plan.programs if program.name == f"env-{index}"]
    argv = (*program.argv[:-1], str(run.config))
    return await asyncio.create_subprocess_exec(*argv, env={**os.environ, **dict(program.env)})


@asynccontextmanager
async def bench(directory: Path, mix: list[dict] | None = None) -> AsyncIterator[Bench]:
    file = directory / "faulty.py"
    file.write_text(FAULTY)
    mix = mix or [
        {"id": "reverse-text"},
        {"id": f"{file}:Faulty", "name": "faulty"},
        {"id": f"{file}:Faulty", "name": "no-tasks", "args": {"fault": "tasks"}},
    ]
    run = prepare(directory, mix)
    listener: Listener[FromWorker, ToWorker] = Listener(run.read_attempt().orchestrator, attempt=2, receives=FromWorker)
    process = await start(run)
    made = Bench(listener, process, load_tokenizer(directory / "tokenizer"))
    try:
        ready = await made.receive()
        assert (ready.index, ready.pid, ready.life) == (0, process.pid, 0)
        assert ready.sources == [*(entry.get("name", entry["id"]) for entry in mix), "held-out"]
        yield made
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        listener.close()


async def test_plays_reverse_text_end_to_end(tmp_path):
    async with bench(tmp_path) as worker:
        await worker.send(ListTasks(request_id=7, source="reverse-text", epoch=0, offset=0, count=20))
        listed = await worker.receive_a(Tasks)
        assert (listed.request_id, len(listed.tasks), listed.exhausted, listed.error) == (7, 20, False, "")

        for i, task in enumerate(listed.tasks):
            await worker.send(Play(rollout_id=i, source="reverse-text", task=task, sampling=SAMPLING, seed=i))
        records: dict[int, RolloutRecord] = {}
        while len(records) < 20:
            message = await worker.receive()
            if isinstance(message, Call):
                word = last_user_text(worker.tokenizer.decode(message.token_ids))
                await worker.reply(message, word[::-1] if message.rollout_id % 2 else word)
            elif isinstance(message, Ended):
                records[message.record.rollout_id] = message.record
        assert {i: record.reward for i, record in records.items()} == {i: float(i % 2) for i in range(20)}
        assert all(0 < record.engine_s <= record.wall_s for record in records.values())
        one = records[1]
        assert (one.environment, one.ending, one.versions) == ("reverse-text", Ending.OK, (3,))
        assert one.num_sampled_tokens == len(one.task.prompt) + 1
        assert one.messages[-1] == {"role": "assistant", "content": one.task.prompt[::-1]}
        assert "libtorch" not in worker.rss_modules()

        await worker.send(Stop())
        while not (await worker.receive_a(LedgerClosed)).is_last:
            pass  # it closes its ledger now and then
        entry = total(worker.entries)
        assert {closed.process for closed in worker.entries} == {"env-0"}
        assert entry.closure < 0.01
        assert {"start", "work", "idle"} <= entry.parts_s.keys()
        assert await asyncio.wait_for(worker.process.wait(), DEADLINE_S) == 0
    spans = [json.loads(line) for line in (tmp_path / "run/spans/env-0.jsonl").read_text().splitlines()]
    assert len(spans) == len(worker.entries)
    assert sum(span["rollouts"] for span in spans) == 20
    assert all(0 < span["p99_s"] <= span["longest_s"] for span in spans)


async def test_what_a_worker_takes_to_start_is_no_lag_of_its_loop(tmp_path):
    """The environment takes four seconds to be imported, and none opens sandboxes, which would wait in between."""
    (file := tmp_path / "slow.py").write_text(SLOW)
    async with bench(tmp_path, [{"id": f"{file}:Slow", "name": "slow"}]) as worker:
        await worker.send(Stop())
        while not (await worker.receive_a(LedgerClosed)).is_last:
            pass
        await asyncio.wait_for(worker.process.wait(), DEADLINE_S)
    assert total(worker.entries).parts_s["start"] > 4.0
    spans = [json.loads(line) for line in (tmp_path / "run/spans/env-0.jsonl").read_text().splitlines()]
    assert all(span["longest_s"] < 4.0 for span in spans if "longest_s" in span)
    assert all(0 <= span["cpu_s"] < 4.0 for span in spans)


async def test_faults_of_an_environment_never_become_rewards_or_end_the_worker(tmp_path):
    async with bench(tmp_path) as worker:
        crashed = await worker.play(Task(prompt="raise"))
        assert crashed.ending == Ending.INVALID
        assert "KeyError" in crashed.error
        assert "no such thing" in crashed.error

        left = await worker.play(Task(prompt="exit"))
        assert (left.ending, left.rewards) == (Ending.INVALID, {})

        unscored = await worker.play(Task(prompt="hi"), "")  # 1 / 0 in its reward
        assert unscored.ending == Ending.INVALID
        assert "reward length raised ZeroDivisionError" in unscored.error
        assert (unscored.rewards, unscored.seats) == ({}, ())

        await worker.send(ListTasks(request_id=1, source="no-tasks", epoch=0, offset=0, count=5))
        assert "the data set is gone" in (await worker.receive_a(Tasks)).error

        fine = await worker.play(Task(prompt="hi"), "four")
        assert (fine.ending, fine.reward) == (Ending.OK, 0.25)


async def test_an_engine_that_fails_makes_the_rollout_invalid(tmp_path):
    async with bench(tmp_path) as worker:
        task = Task(prompt="abc", answer="cba")
        await worker.send(Play(rollout_id=5, source="held-out", task=task, sampling=SAMPLING, seed=0))
        call = await worker.receive_a(Call)
        await worker.send(CallReply(rollout_id=5, call=call.call, error="engine-0 is gone"))
        record = (await worker.receive_a(Ended)).record
        assert (record.ending, record.error, record.rewards) == (Ending.INVALID, "engine-0 is gone", {})


async def test_a_cancelled_rollout_is_silent_and_the_rest_goes_on(tmp_path):
    async with bench(tmp_path) as worker:
        for rollout_id in (1, 2):
            task = Task(prompt=f"{rollout_id}")
            await worker.send(Play(rollout_id=rollout_id, source="faulty", task=task, sampling=SAMPLING, seed=0))
        calls = {call.rollout_id: call for call in [await worker.receive_a(Call), await worker.receive_a(Call)]}
        await worker.send(Cancel(rollout_id=1))
        assert await worker.receive_a(Cancelled) == Cancelled(rollout_id=1)
        await worker.reply(calls[1], "late")
        await worker.reply(calls[2], "in")
        ended = await worker.receive_a(Ended)
        assert ended.record.rollout_id == 2
        await worker.send(Stop())
        assert isinstance(await worker.receive(), LedgerClosed)


async def test_group_rewards_are_added_to_the_records_in_order(tmp_path):
    async with bench(tmp_path) as worker:
        texts = ["a", "ccc", "bb"]
        records = [await worker.play(Task(prompt="g"), text, rollout_id=i) for i, text in enumerate(texts)]
        await worker.send(ScoreGroup(request_id=9, source="faulty", records=records))
        scored = await worker.receive_a(GroupScored)
        assert (scored.request_id, scored.error) == (9, "")
        assert [record.rollout_id for record in scored.records] == [0, 1, 2]
        assert [record.rewards["rank"] for record in scored.records] == [0.0, 1.0, 0.0]
        assert [record.reward for record in scored.records] == pytest.approx([1.0, 1 / 3 + 10.0, 0.5])


async def test_a_group_reward_that_hangs_is_cancelled_and_holds_up_no_end(tmp_path):
    async with bench(tmp_path) as worker:
        records = [await worker.play(Task(prompt="g"), "hang", rollout_id=0)]
        for request in (9, 10):  # the first is given up; the second still hangs when the worker is told to stop
            await worker.send(ScoreGroup(request_id=request, source="faulty", records=records))
        await worker.send(Cancel(rollout_id=9))
        assert (await worker.receive_a(Cancelled)).rollout_id == 9
        await worker.send(Stop())
        while not (await worker.receive_a(LedgerClosed)).is_last:
            pass
        assert await asyncio.wait_for(worker.process.wait(), DEADLINE_S) == 0


async def test_the_worker_dies_with_its_parent(tmp_path):
    run = prepare(tmp_path, [{"id": "reverse-text"}])
    listener: Listener[FromWorker, ToWorker] = Listener(run.read_attempt().orchestrator, attempt=2, receives=FromWorker)
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-m', 'palestra.env', {str(run.config)!r}])"
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    async with asyncio.timeout(DEADLINE_S):
        ready = (await listener.receive())[1]
    assert isinstance(ready, WorkerReady)
    parent.send_signal(signal.SIGKILL)
    await parent.wait()
    await asyncio.wait_for(asyncio.to_thread(_wait_gone, ready.pid), DEADLINE_S)
    listener.close()


def _wait_gone(pid: int) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    select.select([handle], [], [])
    os.close(handle)


@pytest.mark.parametrize("is_killed", [True, False])
async def test_what_programs_of_a_worker_started_ends_with_it_and_so_do_their_directories(tmp_path, is_killed):
    note = tmp_path / "note"
    os.mkfifo(note)
    async with bench(tmp_path) as worker:
        await worker.send(Play(rollout_id=1, source="faulty", task=Task(prompt=str(note)), sampling=SAMPLING, seed=0))
        pid, directory = (await asyncio.wait_for(asyncio.to_thread(note.read_text), DEADLINE_S)).split()
        assert Path(directory).is_dir()
        handle = os.pidfd_open(int(pid))
        if is_killed:
            worker.process.kill()
        else:
            await worker.send(Stop())
        await asyncio.wait_for(worker.process.wait(), DEADLINE_S)
        ended, _, _ = await asyncio.to_thread(select.select, [handle], [], [], DEADLINE_S)
        os.close(handle)
        assert ended
        await asyncio.to_thread(_wait_removed, Path(directory).parent)


ELSEWHERE = '''
import sys
from pathlib import Path

import only_there
from palestra.env import Environment, Task

class Elsewhere(Environment):
    """What the other Python says is right."""

    def tasks(self):
        yield Task(prompt="say it")

    async def run(self, task, agent):
        agent.rewards["right"] = float(await agent(Path(sys.prefix).name) == only_there.WORD)
'''


def make_python(directory: Path) -> Path:
    """Of an environment with what is installed here, and a module that is not."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True, timeout=DEADLINE_S)
    [packages] = directory.glob("lib/python*/site-packages")
    (packages / "only_there.py").write_text('WORD = "there"\n')
    (packages / "here.pth").write_text("\n".join(place for place in sys.path if place))
    return directory / "bin" / "python"


async def test_an_entry_with_a_python_of_its_own_is_played_with_what_only_that_has(tmp_path):
    assert importlib.util.find_spec("only_there") is None
    python = make_python(tmp_path / "other")
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    entry = {"id": f"{tmp_path / 'elsewhere.py'}:Elsewhere", "name": "elsewhere", "python": str(python)}
    run = prepare(tmp_path, [{"id": "reverse-text"}, entry])
    listener: Listener[FromWorker, ToWorker] = Listener(run.read_attempt().orchestrator, attempt=2, receives=FromWorker)
    ours, theirs = [await start(run, index) for index in (0, 1)]
    try:
        async with asyncio.timeout(DEADLINE_S):
            said = dict([await listener.receive() for _ in range(2)])
        assert {name: ready.sources for name, ready in said.items()} == {
            "env-0": ["reverse-text", "held-out"],
            "env-1": ["elsewhere"],
        }
        worker = Bench(listener, theirs, load_tokenizer(tmp_path / "tokenizer"), name="env-1")
        record = await worker.play(Task(prompt="say it"), "there", source="elsewhere")
        assert (record.ending, record.reward, record.num_sampled_tokens) == (Ending.OK, 1.0, 6), record.error
        assert record.messages[0]["content"] == "other"
    finally:
        for process in (ours, theirs):
            process.kill()
            await process.wait()
        listener.close()


def _wait_removed(directory: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while directory.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_a_missing_environment_is_the_users_mistake(tmp_path):
    run = prepare(tmp_path, [{"id": "reverse-txt"}])
    supervisor: Listener[ToSupervisor, None] = Listener(run.read_attempt().supervisor, attempt=2, receives=ToSupervisor)
    process = await start(run)
    async with asyncio.timeout(DEADLINE_S):
        _, failed = await supervisor.receive()
        assert await process.wait() == 2
    assert isinstance(failed, Failed)
    assert failed.is_user_error
    assert "did you mean 'reverse-text'?" in failed.error
    supervisor.close()
