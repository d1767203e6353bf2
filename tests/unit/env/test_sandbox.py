"""Programs of a rollout, without walls: what they give back, what ends with it, and where there is no sandbox."""

import asyncio
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from palestra.config import RunConfig
from palestra.core.errors import InfrastructureError, UserError
from palestra.core.records import Ending, Task
from palestra.env import Environment, Sandbox, reward
from palestra.env import sandbox as sandbox_module
from palestra.env.play import play, score
from palestra.env.sandbox import MOST_OUTPUT, Ran, Unsafe
from palestra.env.voice import ScriptVoice
from palestra.env.worker import set_stages


@pytest.fixture
async def sandbox():
    made = await Unsafe.make(Task())
    yield made
    await made.close()


async def test_a_program_has_streams_an_exit_code_and_a_directory_of_its_own(sandbox):
    assert await sandbox.run("cat; echo err >&2; exit 3", stdin="in") == Ran(exit_code=3, stdout="in", stderr="err\n")
    await sandbox.write("deep/file.txt", "content")
    assert (await sandbox.run(["cat", "deep/file.txt"])).stdout == "content"
    await sandbox.run("printf '\\377' > out")
    assert await sandbox.read("out") == b"\xff"
    assert (await sandbox.run("cat out")).stdout == "\ufffd"
    with pytest.raises(FileNotFoundError):
        await sandbox.read("nothing")
    assert (await sandbox.run(["no-such-program"])).exit_code == 127


async def test_what_takes_too_long_is_killed_with_all_that_it_started(sandbox):
    began = time.monotonic()
    ran = await sandbox.run("sh -c 'sleep 60; touch late' & sleep 60", timeout_s=0.3)
    assert ran.is_too_slow
    assert time.monotonic() - began < 5
    assert "sleep" not in (await sandbox.run("ps -o args= -g $PPID 2>/dev/null; true")).stdout


async def test_time_in_which_other_code_blocked_the_event_loop_is_not_the_programs(sandbox):
    """The planted fault: a limit by the clock on the wall calls a program of 0.2 s too slow that was given 0.5."""
    running = asyncio.ensure_future(sandbox.run("sleep 0.2; echo hi", timeout_s=0.5))
    while not sandbox._running:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.01)
    time.sleep(0.9)  # noqa: ASYNC251 - another rollout's scorer
    assert await running == Ran(exit_code=0, stdout="hi\n", stderr="")


async def test_who_ended_unseen_just_before_its_time_ran_out_is_not_too_slow(sandbox, monkeypatch):
    process_wait, blocked = asyncio.subprocess.Process.wait, []

    async def blocking(process):
        if not blocked:
            blocked.append(True)
            time.sleep(0.4)  # noqa: ASYNC251
            await asyncio.Event().wait()  # the loop has not yet heard of the end when the time is over
        return await process_wait(process)

    monkeypatch.setattr(asyncio.subprocess.Process, "wait", blocking)
    assert await sandbox.run("echo hi; exit 3", timeout_s=0.1) == Ran(exit_code=3, stdout="hi\n", stderr="")


async def test_a_flood_is_read_to_its_end_and_kept_in_part(sandbox):
    ran = await sandbox.run("head -c 3000000 /dev/zero | tr '\\0' x; echo end >&2")
    assert (ran.exit_code, len(ran.stdout), ran.stderr) == (0, MOST_OUTPUT, "end\n")


async def test_a_flood_ends_at_a_bound_and_a_child_that_parted_holds_nothing_up(sandbox):
    began = time.monotonic()
    flood = await sandbox.run("yes", timeout_s=20)
    assert (len(flood.stdout), flood.exit_code) == (MOST_OUTPUT, 128 + signal.SIGXFSZ)
    assert (await sandbox.run("setsid sleep 30 & sleep 30", timeout_s=0.5)).is_too_slow
    assert time.monotonic() - began < 10


def _note(told: Path, line: str) -> None:
    with told.open("a") as file:
        file.write(f"{line}\n")


async def test_every_program_is_watched_before_it_begins_until_it_has_ended(monkeypatch, tmp_path):
    told = tmp_path / "told"
    guard = SimpleNamespace(
        watch=lambda group: _note(told, f"watch {group}"),
        ended=lambda group: _note(told, f"ended {group}"),
    )
    monkeypatch.setattr(sandbox_module, "_home", lambda: (guard, tmp_path))
    box = await Unsafe.make(Task())
    seen = await box.run(f"cat {told}; echo $$")
    watched, itself = seen.stdout.splitlines()
    assert watched == f"watch {itself}"
    for command in (["nowhere"], [""], "exit 1", "a\0b"):
        await box.run(command)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(box.run("sleep 60"), 0.2)
    lines = told.read_text().splitlines()
    watched = {line.removeprefix("watch ") for line in lines if line.startswith("watch")}
    assert len(watched) > 3
    assert watched | {"0"} == {line.removeprefix("ended ") for line in lines if line.startswith("ended")} | {"0"}
    await box.close()


@pytest.mark.parametrize(
    ("command", "code"),
    [(["python3", "-c", "x" * 10**7], 126), ("a\0b", 126), (["./no-mode"], 126), ([""], 126), (["nowhere"], 127)],
)
async def test_what_no_program_can_be_made_of_is_an_answer(sandbox, command, code):
    await sandbox.write("no-mode", "echo hi")
    assert (await sandbox.run(command)).exit_code in (code, 127)


async def test_only_regular_files_are_written(sandbox):
    await sandbox.run("mkfifo pipe; mkdir place; ln -s /dev/null null; echo before > file; ln -s nowhere dangling")
    for name in ("pipe", "place", "null"):
        with pytest.raises(OSError, match="no regular file"):
            await asyncio.wait_for(sandbox.write(name, "x"), 5)
    for name in ("file", "dangling"):
        await sandbox.write(name, "after")
        assert await sandbox.read(name) == b"after"


async def test_only_regular_files_are_read_and_only_in_part(sandbox):
    await sandbox.run("mkfifo pipe; mkdir place; ln -s /dev/zero zeros; head -c 3000000 /dev/zero > large")
    for name in ("pipe", "place", "zeros"):
        with pytest.raises(OSError, match="no regular file"):
            await sandbox.read(name)
    assert len(await sandbox.read("large")) == MOST_OUTPUT
    await sandbox.write("half", "\ud800")
    assert (await sandbox.run("cat half", stdin="\ud800")).stdout == "?"


async def test_a_program_that_does_not_read_its_input_is_no_failure(sandbox):
    assert (await sandbox.run("exit 0", stdin="x" * 10_000_000)).exit_code == 0


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x"])
async def test_no_file_outside_is_written_or_read(sandbox, path):
    with pytest.raises(ValueError, match="leads out of the sandbox"):
        await sandbox.read(path)
    with pytest.raises(ValueError, match="leads out of the sandbox"):
        await sandbox.write(path, "x")


async def test_images_need_a_backend_that_has_them():
    with pytest.raises(InfrastructureError, match="has no images"):
        await Unsafe.make(Task(image="python:3.11"))


class Coder(Environment):
    """Runs what the agent says."""

    async def run(self, task, agent, box: Sandbox):
        self.places.append((await box.run("pwd")).stdout.strip())
        self.left.append(asyncio.ensure_future(box.run("sleep 60")))
        await asyncio.sleep(0.05)
        ran = await box.run(["python3", "-c", await agent(task.prompt)])
        agent.rewards["right"] = float(ran.stdout.strip() == "5")
        await agent("once more")

    places: ClassVar[list[str]] = []
    left: ClassVar[list[asyncio.Future]] = []

    @reward
    def polite(self, task, rollout):
        return 0.0


async def test_a_rollouts_sandbox_ends_with_it_also_at_a_limit():
    environment, voice = Coder(max_turns=1), ScriptVoice(["print(2 + 3)", "never said"])
    record = await play(environment, Task(prompt="?"), lambda seat: voice, make_sandbox=Unsafe.make)
    assert (record.ending, record.reward) == (Ending.TRUNCATED, 1.0), record.error
    assert not Path(environment.places[0]).exists()


async def test_without_a_sandbox_the_rollout_is_invalid_and_a_run_does_not_start():
    record = await score(Coder(), Task(prompt="?"), ["print(5)"])
    assert record.ending == Ending.INVALID
    assert "env.sandbox" in record.error
    tree = {"log": {"name": "x"}, "model": {"path": "m"}, "env": {"mix": [{"id": f"{__name__}:Coder"}]}}
    with pytest.raises(UserError, match=r"say which by env\.sandbox"):
        set_stages(RunConfig.model_validate(tree))
    assert list(set_stages(RunConfig.model_validate(tree), plays=False)) == [f"{__name__}:Coder"]
    tree["env"]["sandbox"] = "unsafe"
    assert list(set_stages(RunConfig.model_validate(tree))) == [f"{__name__}:Coder"]
