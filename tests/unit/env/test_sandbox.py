"""Programs of rollouts: what they give back and what ends with them, what a failure means, what a recipe says."""

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest

from palestra.config import RunConfig
from palestra.config.schema import SandboxConfig
from palestra.core.errors import UserError
from palestra.core.records import Ending, Task
from palestra.env import Environment, Result, Sandbox, reward, run_code
from palestra.env import sandbox as sandbox_module
from palestra.env.play import play, score
from palestra.env.rescore import rescore
from palestra.env.sandbox import Sandboxes, require_backend
from palestra.env.voice import ScriptVoice
from palestra.env.worker import set_stages
from palestra.sandbox import IsolationError, Limits
from palestra.sandbox.host import host_of
from palestra.sandbox.records import MOST_OUTPUT, Isolation

pytestmark = pytest.mark.slow

# --- programs, without walls


@pytest.fixture
async def box():
    async with Sandboxes("unsafe") as boxes, boxes.opened(Task()) as [box]:
        yield box


def told(ended: Result) -> tuple[int | None, str, str]:
    return ended.exit_code, ended.stdout, ended.stderr


async def test_a_program_has_streams_an_exit_code_and_a_directory_of_its_own(box):
    assert told(await box.exec("cat; echo err >&2; exit 3", stdin="in")) == (3, "in", "err\n")
    await box.write("deep/file.txt", "content")
    assert (await box.exec(["cat", "deep/file.txt"])).stdout == "content"
    await box.exec("printf '\\377' > out")
    assert await box.read("out") == b"\xff"
    assert (await box.exec("cat out")).stdout == "\ufffd"
    with pytest.raises(FileNotFoundError):
        await box.read("nothing")
    assert (await box.exec(["no-such-program"])).exit_code == 127


async def test_what_takes_too_long_is_killed_with_all_that_it_started(box):
    began = time.monotonic()
    late = await box.exec("sh -c 'sleep 61.25; touch late' & setsid sleep 61.25 & sleep 61.25", timeout_s=0.3)
    assert (late.status, late.exit_code) == ("timed_out", None)
    assert time.monotonic() - began < 30
    assert (await box.exec("sleep 60 & sleep 0.2")).status == "ok"
    assert time.monotonic() - began < 30, "what it leaves behind is not waited for"


async def test_what_parted_from_its_program_ends_with_the_sandbox_and_so_does_its_directory():
    async with Sandboxes("unsafe") as boxes:
        async with boxes.opened(Task()) as [box]:
            leaving = "setsid sh -c 'echo $$; exec sleep 60' > pid & until [ -s pid ]; do sleep 0.01; done; cat pid"
            pid = int((await box.exec(leaving)).stdout)
            handle, home = os.pidfd_open(pid), Path((await box.exec("pwd")).stdout.strip())
            assert home.is_dir()
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(handle, ended.set)
        await asyncio.wait_for(ended.wait(), 20)
        asyncio.get_running_loop().remove_reader(handle)
        os.close(handle)
    assert not home.exists()


@pytest.mark.parametrize("backend", ["unsafe", None])
async def test_time_in_which_other_code_holds_the_event_loop_is_not_the_programs(backend):
    """The planted fault: a limit by the clock on the wall calls a program of 0.2 s too slow that was given 2.5."""
    async with Sandboxes(backend) as boxes, boxes.opened(Task()) as [box]:
        await run_code("")
        running = [
            asyncio.ensure_future(box.exec("sleep 0.2; echo hi", timeout_s=2.5)),
            asyncio.ensure_future(run_code("import time; time.sleep(0.2); print('hi')", timeout_s=2.5)),
        ]
        await asyncio.sleep(0.1)
        time.sleep(2.8)  # noqa: ASYNC251 - another rollout's scorer
        assert [told(ended) for ended in await asyncio.gather(*running)] == [(0, "hi\n", "")] * 2
        assert (await run_code("import time; time.sleep(9)", timeout_s=0.5)).status == "timed_out"


async def test_a_flood_is_read_to_its_end_and_kept_in_part(box):
    flood = await box.exec("head -c 3000000 /dev/zero | tr '\\0' x; echo end >&2")
    assert (flood.exit_code, len(flood.stdout), flood.stderr, flood.truncated) == (0, MOST_OUTPUT, "end\n", True)
    endless = await box.exec("yes", timeout_s=3)
    assert (endless.status, len(endless.stdout)) == ("timed_out", MOST_OUTPUT)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["python3", "-c", "x" * 10**7], 126),
        (["python3", "-c", "x" * 200_000], 126),
        ("a\0b", 126),
        (["echo", "\ud800"], 126),
        (["./no-mode"], 126),
        ([""], 127),
        (["nowhere"], 127),
    ],
)
async def test_what_no_program_can_be_made_of_is_an_answer(box, command, code):
    await box.write("no-mode", "echo hi")
    assert (await box.exec(command)).exit_code == code
    assert (await run_code("'\ud800'")).exit_code == 1


async def test_only_regular_files_are_written_and_read(box):
    await box.exec("mkfifo pipe; mkdir place; ln -s /dev/null null; ln -s /dev/zero zeros; ln -s nowhere dangling")
    for name in ("pipe", "place", "null"):
        with pytest.raises(OSError, match=r"no regular file|No such device|Is a directory"):
            await asyncio.wait_for(box.write(name, "x"), 20)
    for name in ("pipe", "place", "zeros"):
        with pytest.raises(OSError, match=r"no regular file"):
            await asyncio.wait_for(box.read(name), 20)
    for name in ("file", "dangling"):
        await box.write(name, "after")
        assert await box.read(name) == b"after"


async def test_a_program_that_does_not_read_its_input_is_no_failure(box):
    assert (await box.exec("exit 0", stdin="x" * 10_000_000)).exit_code == 0


@pytest.mark.parametrize("path", ["/etc/x", "../x", "a/../../x"])
async def test_no_file_of_a_program_lies_outside_its_directory(path):
    async with Sandboxes("unsafe"):
        with pytest.raises(ValueError, match="leads out of"):
            await run_code("", files={path: "x"})


# --- rollouts


class Coder(Environment):
    """Runs what the agent says; its sum is right, or not."""

    max_turns = 1
    egress = ("pypi.org",)
    timeout_s: float = 20
    places: ClassVar[list[str]] = []
    left: ClassVar[list[asyncio.Future]] = []

    async def run(self, task, agent, box: Sandbox):
        self.places.append((await box.exec("pwd")).stdout.strip())
        self.left.append(asyncio.ensure_future(box.exec("sleep 60")))
        await asyncio.sleep(0.05)
        ended = await box.exec(["python3", "-c", await agent(task.prompt)], timeout_s=self.timeout_s)
        agent.rewards["right"] = float(ended.stdout.strip() == "5")
        await agent("once more")


class Alone(Coder):
    """Nothing but its program."""

    egress = ()

    async def run(self, task, agent, box: Sandbox):
        ended = await box.exec(["python3", "-c", await agent(task.prompt)], timeout_s=self.timeout_s)
        agent.rewards["right"] = float(ended.stdout.strip() == "5")


class Scorer(Environment):
    """Runs what the agent says as it scores it."""

    max_turns = 1
    timeout_s: float = 20

    @reward
    async def right(self, task, rollout):
        return (await run_code(rollout.reply, timeout_s=self.timeout_s)).stdout == "5\n"


class OfGroup(Environment):
    """Runs what the agents say when all have."""

    max_turns = 1

    @reward(group=True)
    async def right(self, task, rollouts):
        return [(await run_code(rollout.reply)).stdout == "5\n" for rollout in rollouts]


async def test_a_rollouts_sandbox_ends_with_it_also_at_a_limit(monkeypatch):
    monkeypatch.setattr(Coder, "egress", ())
    environment, voice = Coder(), ScriptVoice(["print(2 + 3)", "never said"])
    async with Sandboxes("unsafe"):
        record = await play(environment, Task(prompt="?"), lambda seat: voice)
        assert (record.ending, record.reward) == (Ending.TRUNCATED, 1.0), record.error
        [left] = environment.left
        with pytest.raises(Exception, match="it was deleted"):
            await left
    assert not Path(environment.places[0]).exists()


@pytest.mark.parametrize("environment", [Alone, Scorer])
async def test_who_chooses_no_sandbox_has_the_best_that_works_here(environment):
    async with Sandboxes() as boxes:
        assert (await score(environment(), Task(prompt="?"), ["print(2 + 3)"])).reward == 1
        assert (await host_of(boxes._options)).backend.isolation >= Isolation.NAMESPACES
        readable = "import os; print(5 if os.path.exists('/etc/hostname') or os.getuid() == 0 else 4)"
        assert (await score(environment(), Task(prompt="?"), [readable])).reward == 0, "it sees this machine"
    async with Sandboxes("unsafe"):
        assert (await score(environment(), Task(prompt="?"), [readable])).reward == 1, "the control sees it"


ANSWERS = {
    "fails": "raise SystemExit(3)",
    "is too slow": "import time; time.sleep(60)",
    "is killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "takes too much memory": "import time; x = b'x' * 250_000_000; time.sleep(0.1); print(len(x) // 50_000_000)",
    "is none": "a\0b",
}


@pytest.mark.parametrize("environment", [Alone, Scorer])
@pytest.mark.parametrize("said", ANSWERS.values(), ids=ANSWERS.keys())
async def test_a_program_that_goes_wrong_is_an_answer(environment, said):
    async with Sandboxes(None, SandboxConfig(memory_mb=64, disk_mb=16)):
        timeout_s = 2 if said == ANSWERS["is too slow"] else 20
        record = await score(environment(timeout_s=timeout_s), Task(prompt="?"), [said])
    assert (record.ending, record.reward, record.error) == (Ending.OK, 0.0, "")


@pytest.mark.parametrize("environment", [Alone, Scorer])
async def test_the_limits_are_the_recipes(environment):
    """The control of too much memory: with more, the same program is right."""
    async with Sandboxes(None, SandboxConfig(memory_mb=512, disk_mb=16)):
        record = await score(environment(), Task(prompt="?"), [ANSWERS["takes too much memory"]])
    assert (record.ending, record.reward) == (Ending.OK, 1.0)


_SEEN = "palestra-seen"  # how a program calls its process


def _is_seen() -> bool:
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if comm.read_text().strip() == _SEEN:
                return True
    return False


@pytest.mark.parametrize("environment", [Alone, Scorer])
async def test_a_sandbox_that_fails_makes_the_rollout_invalid_and_played_again_it_has_another(environment):
    async with Sandboxes("local") as boxes:
        host = await host_of(boxes._options)
        said = f"import ctypes, time; ctypes.CDLL(None).prctl(15, b'{_SEEN}'); time.sleep(60)"
        playing = asyncio.ensure_future(score(environment(timeout_s=60), Task(prompt="?"), [said]))
        async with asyncio.timeout(60):
            while not _is_seen():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        os.kill(host.backend._process.pid, signal.SIGKILL)
        record = await playing
        assert (record.ending, record.rewards) == (Ending.INVALID, {})
        assert "SandboxGoneError" in record.error
        tries = [await score(environment(), Task(prompt="?"), ["print(2 + 3)"]) for _ in range(3)]  # env.retries
        assert {(one.ending, one.reward) for one in tries} <= {(Ending.OK, 1.0), (Ending.INVALID, 0.0)}
        assert tries[-1].reward == 1


async def test_group_rewards_and_rewards_given_again_run_programs_there_too():
    environment = OfGroup()
    async with Sandboxes("unsafe"):
        played = [await score(environment, Task(prompt="?"), [said]) for said in ("print(5)", "print(4)")]
        assert [record.reward for record in await rescore(environment, played)] == [1.0, 0.0]


async def test_too_little_isolation_is_refused_and_a_name_needs_no_more_than_it_has():
    async with Sandboxes("process", SandboxConfig(min_isolation="namespaces")) as boxes:
        with pytest.raises(IsolationError, match="isolates by process, less than min_isolation=namespaces"):
            await boxes.open()
        record = await score(Alone(), Task(prompt="?"), ["print(5)"])
        assert (record.ending, "IsolationError" in record.error) == (Ending.INVALID, True)
    for name, least in (("process", "process"), ("process", None), ("unsafe", None)):
        async with Sandboxes(name, SandboxConfig(min_isolation=least)) as boxes:
            await boxes.open()


async def test_rollouts_wait_for_their_turn_where_there_may_be_no_more_sandboxes():
    async with Sandboxes("unsafe", SandboxConfig(most=2)) as boxes:
        now, peak = 0, 0

        async def one(count: int) -> None:
            nonlocal now, peak
            async with boxes.opened(Task(), count=count) as mine:
                now += len(mine)
                peak = max(peak, now)
                await asyncio.sleep(0.02)
                now -= len(mine)

        await asyncio.wait_for(asyncio.gather(*(one(count) for count in (2, 1, 2, 1, 2))), 20)
        assert (now, peak) == (0, 2)
        with pytest.raises(UserError, match=r"needs 3 sandboxes never gets them with sandbox\.most=2"):
            await one(3)


# --- what a recipe says


class Noting:
    """A host that makes nothing, and knows what it was asked for."""

    asked: ClassVar[list] = []

    def __init__(self, options):
        self.options = options

    async def create(self, **asked):
        self.asked.append((self.options, asked))
        raise UserError("noted")

    async def run_code(self, code, **asked):
        self.asked.append((self.options, asked))
        return Result(exit_code=0, stdout="5\n")


async def test_recipe_task_and_environment_say_what_a_sandbox_is_like(monkeypatch):
    async def noting(options):
        return Noting(options)

    monkeypatch.setattr(sandbox_module, "host_of", noting)
    monkeypatch.setattr(Noting, "asked", [])
    tree = {
        "log": {"name": "x"},
        "model": {"path": "m"},
        "env": {"sandbox": "local"},
        "sandbox": {"memory_mb": 100, "disk_mb": 10, "processes": 9, "cpus": 0.5, "timeout_s": 60, "image": "base"},
    }
    tree["sandbox"] |= {"min_isolation": "namespaces", "packages": ["numpy"]}
    config = RunConfig.model_validate(tree)
    limits = Limits(memory_mb=100, disk_mb=10, processes=9, cpus=0.5)
    async with Sandboxes(config.env.sandbox, config.sandbox):
        for task in (Task(prompt="?"), Task(prompt="?", image="own")):
            await score(Coder(), task, ["print(5)"])
        assert (await score(Scorer(), Task(prompt="?"), ["print(5)"])).reward == 1
        await run_code("", image="own", stdin="in")
    boxes = [(options.image, asked) for options, asked in Noting.asked[:2]]
    assert boxes == [(image, {"limits": limits, "timeout_s": 60, "egress": ("pypi.org",)}) for image in ("base", "own")]
    assert [(options.image, asked["limits"]) for options, asked in Noting.asked[2:]] == [
        ("base", limits),
        ("own", limits),
    ]
    assert {(o.backend, o.min_isolation, o.packages) for o, _ in Noting.asked} == {
        ("local", Isolation.NAMESPACES, ("numpy",))
    }


async def test_a_service_has_an_image_of_its_own(monkeypatch):
    monkeypatch.setenv("PALESTRA_SANDBOX_TOKEN", "token")
    async with Sandboxes("http://127.0.0.1:9") as boxes:
        with pytest.raises(UserError, match="image is chosen where the service is started"):
            async with boxes.opened(Task(image="own")):
                pass


@pytest.mark.parametrize("name", [None, "local", "unsafe", "http://127.0.0.1:8010", "https://sandboxes.example"])
def test_backends_and_services_are_known(name):
    require_backend(name)


@pytest.mark.parametrize("name", ["unsfe", "", "ftp://x"])
def test_another_name_is_refused_before_anything_starts(name):
    with pytest.raises(UserError, match=f"there is no sandbox '{name}'; there are local, "):
        require_backend(name)


def test_an_environment_that_runs_programs_needs_no_choice():
    tree = {"log": {"name": "x"}, "model": {"path": "m"}, "env": {"mix": [{"id": f"{__name__}:Coder"}]}}
    assert list(set_stages(RunConfig.model_validate(tree))) == [f"{__name__}:Coder"]


def test_limits_of_the_schema_are_those_of_sandboxes():
    """What a recipe may say, a sandbox takes; and by default both are the same."""
    default = SandboxConfig()
    for name in ("memory_mb", "disk_mb", "processes", "cpus"):
        assert getattr(default, name) == getattr(Limits(), name)
        least, most = (_bound(name, side) for side in ("ge", "le"))
        for value in (least, most):
            assert getattr(msgspec.structs.replace(Limits(), **{name: value}), name) == value
        for value in (least / 2, most * 2):
            with pytest.raises(UserError):
                Limits(**{name: value})


def _bound(name: str, side: str) -> float:
    return next(getattr(one, side) for one in SandboxConfig.model_fields[name].metadata if hasattr(one, side))
