"""The supervisor with real processes that are scripted: every way a run can end, and what is left of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from palestra.launch.ports import holder_of
from palestra.wire.rundir import Attempt, Manifest, RunDir, checkpoint_dir, write_manifest
from palestra.wire.runlog import read_ledger, read_restarts
from palestra.wire.status import State, locked, read_status

SCRIPT = Path(__file__).parent / "scripted" / "run.py"
SOURCES = Path(__file__).parents[2] / "src"
DEADLINE_S = 180


class Scripted:
    """A scripted run in a directory of its own."""

    def __init__(self, outputs: Path):
        self.outputs = outputs
        self.run = RunDir(outputs / "scripted")

    def start(
        self, *entries: str, start_s: dict[str, float] | None = None, stop_s: float = 60, **sections
    ) -> subprocess.Popen:
        """`start_s` of those that have less than the others."""
        overrides = {**sections, "launch": {"stop_s": stop_s, **sections.get("launch", {})}}
        env = {**os.environ, "START_S": json.dumps(start_s or {}), "PYTHONPATH": str(SOURCES)}
        argv = [sys.executable, str(SCRIPT), str(self.outputs), json.dumps(overrides), *entries]
        return subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True)

    def ends(self, *entries: str, **options) -> tuple[int, str]:
        """Exit code, and what was said on stderr."""
        process = self.start(*entries, **options)
        _, said = process.communicate(timeout=DEADLINE_S)
        return process.returncode, said

    def wait_for(self, name: str) -> int:
        """The pid that a scripted process noted."""
        path = self.run.path / f"{name}.pid"
        deadline = time.monotonic() + DEADLINE_S
        while not (path.exists() and path.read_text()):
            assert time.monotonic() < deadline, f"{path} did not appear"
            time.sleep(0.02)
        return int(path.read_text())

    def wait_for_life(self, name: str, number: int) -> int:
        """The pid of a later life."""
        path = self.run.path / f"{name}.lives"
        wait_until(lambda: path.exists() and path.read_text().count("\n") > number, f"life {number} of {name}")
        return int(path.read_text().splitlines()[number].split()[1])

    def wait_for_restarts(self, number: int) -> None:
        wait_until(lambda: len(read_restarts(self.run)) == number, f"{number} restarts")

    def num_lives(self, name: str) -> int:
        return (self.run.path / f"{name}.lives").read_text().count("\n")

    def heard(self, life: int) -> list[str]:
        """What a life of the leader was told."""
        path = self.run.path / f"orchestrator.heard-{life}"
        return path.read_text().splitlines() if path.exists() else []

    def ask(self, text: str) -> None:
        """The leader asks for a restart: `NAME LIFE [planned]`."""
        beside = self.run.path / ".ask"
        beside.write_text(text)
        beside.replace(self.run.path / "ask")

    def let_go(self) -> None:
        """The leader may end."""
        (self.run.path / "go").touch()

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in self.run.path.glob("*.pid")]

    @property
    def attempt(self) -> Attempt:
        return self.run.read_attempt()

    def leftovers(self) -> list[Path]:
        """Directories outside the run that should be gone."""
        sockets = Path(self.attempt.supervisor.removeprefix("ipc://")).parent
        return [path for path in (sockets, Path(self.attempt.staging)) if path.exists()]


@pytest.fixture
def scripted(tmp_path: Path) -> Scripted:
    return Scripted(tmp_path)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """A zombie that nobody has buried yet is dead."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int], directories: list[Path]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while any(map(is_alive, pids)) or any(path.exists() for path in directories):
        assert time.monotonic() < deadline, f"alive: {[pid for pid in pids if is_alive(pid)]}; left: {directories}"
        time.sleep(0.02)


def test_a_run_that_ends_well(scripted: Scripted):
    code, said = scripted.ends("engine-0:member:serve", "orchestrator:lead:done", "trainer:member:quit_early")
    assert code == 0, said
    assert "training 2/2" in said
    assert "reward 0.500" in said
    status = read_status(scripted.run)
    assert status is not None
    assert (status.state, status.attempt, status.error) == (State.FINISHED, 1, "")
    assert scripted.run.log("engine-0").exists()
    assert scripted.leftovers() == []
    (entry,) = read_ledger(scripted.run)
    assert entry.process == "supervisor"
    assert entry.closure < 0.01
    assert entry.parts_s["idle"] > 0


def test_a_crash_ends_the_run_with_the_name_and_the_end_of_its_log(scripted: Scripted):
    code, said = scripted.ends("orchestrator:lead:wait_for_file", "trainer:member:crash_late", "env-0:member:hang")
    assert code == 1
    assert "trainer ended the run (exit code 1)" in said
    assert "RuntimeError: planted fault" in said
    assert "about to crash" in said
    assert "bug of palestra" not in said  # the log has the traceback that counts
    assert not any(map(is_alive, scripted.pids()))
    status = read_status(scripted.run)
    assert status is not None
    assert status.state is State.FAILED
    assert "planted fault" in status.error


def test_the_log_of_an_earlier_attempt_is_not_shown(scripted: Scripted):
    scripted.run.log("orchestrator").parent.mkdir(parents=True)
    scripted.run.log("orchestrator").write_text("an old story\n")
    _, said = scripted.ends("orchestrator:lead:crash")
    assert "planted fault" in said
    assert "an old story" not in said
    assert scripted.run.log("orchestrator").read_text().startswith("an old story\n")


@pytest.mark.parametrize("behaviour", ["user_error", "refuse"])
def test_a_users_mistake_is_a_message_and_code_2(scripted: Scripted, behaviour: str):
    code, said = scripted.ends(f"orchestrator:lead:{behaviour}")
    assert code == 2
    assert ("give a file" if behaviour == "user_error" else "'Nope' is unknown") in said
    assert "Traceback" not in said


def test_a_preparation_that_fails_starts_nothing_else(scripted: Scripted):
    code, said = scripted.ends("model:prepare:refuse", "orchestrator:lead:done")
    assert code == 2
    assert "'Nope' is unknown" in said
    assert not scripted.run.log("orchestrator").exists()


def test_last_words_of_a_failed_process_are_shown(scripted: Scripted):
    code, said = scripted.ends("trainer:lead:failed")
    assert code == 1
    assert "disk is full" in said


def test_an_engine_that_never_becomes_healthy(scripted: Scripted):
    code, said = scripted.ends("engine-0:member:hang", "orchestrator:lead:wait_for_file", start_s={"engine-0": 1.5})
    assert code == 1
    assert "waited 1.5 s for engine-0 to answer at http://127.0.0.1:" in said
    assert str(scripted.run.log("engine-0")) in said
    assert not any(map(is_alive, scripted.pids()))


def test_a_leader_that_says_nothing(scripted: Scripted):
    code, said = scripted.ends("orchestrator:lead:hang", start_s={"orchestrator": 1})
    assert code == 1
    assert "for the first word of orchestrator" in said


def test_a_leader_that_is_done_but_does_not_exit(scripted: Scripted):
    code, said = scripted.ends("orchestrator:lead:lingers", stop_s=0.5)
    assert code == 1
    assert "for orchestrator to exit after it was done" in said


def test_an_end_with_0_is_no_success_without_done(scripted: Scripted):
    code, said = scripted.ends("orchestrator:lead:quit_early")
    assert code == 1
    assert "without saying that it was done" in said


def test_a_member_may_not_leave_while_the_leader_goes_on(scripted: Scripted):
    code, said = scripted.ends("orchestrator:lead:wait_for_file", "env-0:member:quit_early", stop_s=1)
    assert code == 1
    assert "env-0 ended the run" in said


@pytest.fixture
def running(scripted: Scripted) -> Iterator[subprocess.Popen]:
    """A run in its middle; one of its processes and a child of that one ignore SIGTERM."""
    process = scripted.start(
        "orchestrator:lead:wait_for_file", "engine-0:member:serve", "env-0:member:deaf", "trainer:member:hang", stop_s=6
    )
    for name in ("orchestrator", "env-0", "env-0-child", "trainer"):
        scripted.wait_for(name)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_everything(scripted: Scripted, running: subprocess.Popen, number: signal.Signals):
    pids = scripted.pids()
    assert len([pid for pid in pids if is_alive(pid)]) == 4
    running.send_signal(number)
    _, said = running.communicate(timeout=DEADLINE_S)
    assert running.returncode == 130
    assert "killing env-0" in said  # it had its time, the others needed none
    wait_until_gone(pids, [])
    assert scripted.leftovers() == []
    status = read_status(scripted.run)
    assert status is not None
    assert status.state is State.INTERRUPTED


def test_a_second_interrupt_does_not_wait(scripted: Scripted):
    process = scripted.start("orchestrator:lead:wait_for_file", "env-0:member:deaf", stop_s=600)
    for name in ("orchestrator", "env-0", "env-0-child"):
        scripted.wait_for(name)
    process.send_signal(signal.SIGINT)
    wait_until_gone([scripted.wait_for("orchestrator")], [])
    assert process.poll() is None
    assert is_alive(scripted.wait_for("env-0"))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    wait_until_gone(scripted.pids(), [])


def test_nothing_outlives_a_killed_supervisor(scripted: Scripted, running: subprocess.Popen):
    pids, directories = scripted.pids(), scripted.leftovers()
    assert all(map(is_alive, pids))
    assert len(directories) == 2
    running.kill()
    wait_until_gone(pids, directories)
    status = read_status(scripted.run)
    assert status is not None
    assert status.state is State.KILLED


def test_a_port_in_use_names_its_holder_and_starts_nothing(scripted: Scripted):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        code, said = scripted.ends("engine-0:member:serve", "orchestrator:lead:done", launch={"engine_port": port})
    assert code == 2
    assert f"port {port} of launch.engine_port on 127.0.0.1 is in use by process {os.getpid()}" in said
    assert not (scripted.run.path / "logs").exists()
    assert not scripted.run.config.exists()


def test_a_run_is_not_overwritten(scripted: Scripted):
    assert scripted.ends("orchestrator:lead:done")[0] == 0
    code, said = scripted.ends("orchestrator:lead:done")
    assert code == 2
    assert "--resume" in said
    assert "log.name=" in said


def test_two_supervisors_never_share_a_run(scripted: Scripted):
    with locked(scripted.run):
        code, said = scripted.ends("orchestrator:lead:done")
    assert code == 2
    assert "is running already" in said


def test_resume_starts_a_new_attempt_at_the_newest_whole_checkpoint(scripted: Scripted):
    assert scripted.ends("orchestrator:lead:crash")[0] == 1
    assert scripted.ends("orchestrator:lead:crash", "--resume")[0] == 1
    assert (scripted.attempt.number, scripted.attempt.resumed_from) == (2, None)
    for version in (5, 20, 9):
        checkpoint_dir(scripted.run, version).mkdir(parents=True)
        write_manifest(scripted.run, Manifest(version=version, attempt=1, trainer="trainer", orchestrator="o"))
    scripted.run.summary.write_text('{"steps": 9}')  # it had ended, and was given more steps
    half_written = checkpoint_dir(scripted.run, 30)
    half_written.mkdir()
    (half_written / ".manifest.json.4711").write_text('{"version":30')
    code, said = scripted.ends("orchestrator:lead:done", "--resume")
    assert code == 0, said
    assert (scripted.attempt.number, scripted.attempt.resumed_from) == (3, 20)
    assert not scripted.run.summary.exists(), "this end is not the one before"


def test_resume_refuses_another_config(scripted: Scripted):
    assert scripted.ends("orchestrator:lead:crash", train={"steps": 10})[0] == 1
    code, said = scripted.ends("orchestrator:lead:done", "--resume", train={"steps": 5, "lr": 1e-3})
    assert code == 2
    assert "train.lr: 1e-06 in the run, 0.001 now" in said
    assert "train.steps: 10 in the run, 5 now" in said
    code, said = scripted.ends("orchestrator:lead:done", "--resume", train={"steps": 20})
    assert code == 0, said


def test_nothing_to_resume(scripted: Scripted):
    code, said = scripted.ends("orchestrator:lead:done", "--resume")
    assert code == 2
    assert "no run to resume" in said


# --- restarts


def wait_until_said(process: subprocess.Popen, words: str) -> None:
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")  # they end with the run, at the latest after START_S
    assert any(words in line for line in lines), f"the run ended without {words!r}"


def wait_for_first_word(process: subprocess.Popen) -> None:
    """Until the supervisor has heard the leader: what ends before that is told twice, or with its successor only."""
    wait_until_said(process, "orchestrator: training")


def go_on(scripted: Scripted, process: subprocess.Popen) -> str:
    """Let the leader end well; what was said."""
    scripted.let_go()
    _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, said
    assert not any(map(is_alive, scripted.pids()))
    return said


def test_a_killed_member_is_started_again_and_everybody_hears_of_it(scripted: Scripted):
    process = scripted.start("orchestrator:lead:listen", "env-0:member:work_with_child")
    for name in ("orchestrator", "env-0", "env-0-child"):
        scripted.wait_for(name)
    wait_for_first_word(process)
    first, child = scripted.wait_for("env-0"), scripted.wait_for("env-0-child")
    os.kill(first, signal.SIGKILL)
    second = scripted.wait_for_life("env-0", 1)
    assert not is_alive(child), "what the first life left behind is ended before the second begins"
    scripted.wait_for_restarts(1)
    wait_until(lambda: len(scripted.heard(life=0)) == 2, "the leader to hear of it")
    said = go_on(scripted, process)
    assert second != first
    assert "env-0 died (killed by SIGKILL); it is started again in 0.5 s" in said
    assert "env-0 is back after" in said
    assert scripted.heard(life=0) == [
        "ProcessEnded(process='env-0', why='killed by SIGKILL', life=0)",
        "ProcessStarted(process='env-0', life=1)",
    ]
    [restarted] = read_restarts(scripted.run)
    assert (restarted.process, restarted.life, restarted.why) == ("env-0", 1, "killed by SIGKILL")
    assert restarted.gone_s is not None
    assert 0.5 < restarted.gone_s < 30
    [entry] = [entry for entry in read_ledger(scripted.run) if entry.process == "env-0"]
    assert 0.5 < entry.parts_s["restart"] <= restarted.gone_s
    assert entry.closure < 0.01


def test_where_no_restart_is_allowed_the_same_kill_ends_the_run(scripted: Scripted):
    """Control of the test above."""
    process = scripted.start("orchestrator:lead:listen", "env-0:member:work", launch={"max_restarts": 0})
    scripted.wait_for("orchestrator")
    os.kill(scripted.wait_for("env-0"), signal.SIGKILL)
    _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "env-0 ended the run (killed by SIGKILL)" in said
    assert read_restarts(scripted.run) == []


def test_a_killed_leader_is_started_again_and_hears_how_things_stand(scripted: Scripted):
    process = scripted.start("orchestrator:lead:listen", "env-0:member:work", "trainer:member:do_all")
    for name in ("orchestrator", "env-0", "trainer"):
        scripted.wait_for(name)
    os.kill(scripted.wait_for("env-0"), signal.SIGKILL)
    scripted.wait_for_restarts(1)
    wait_for_first_word(process)
    os.kill(scripted.wait_for("orchestrator"), signal.SIGKILL)
    scripted.wait_for_restarts(2)
    scripted.wait_for_life("trainer", 1)  # it was done, but for an orchestrator that is gone
    wait_until(lambda: len(scripted.heard(life=1)) >= 2, "the successor to hear of its peers")
    go_on(scripted, process)
    assert scripted.heard(life=1) == [
        "ProcessStarted(process='env-0', life=1)",
        "ProcessStarted(process='trainer', life=1)",
    ]
    assert scripted.num_lives("env-0") == 2, "it went on beside its leaders"


def test_what_ended_before_the_first_leader_speaks_is_not_started_again(scripted: Scripted):
    process = scripted.start("orchestrator:lead:listen_late", "trainer:member:do_all")
    wait_for_first_word(process)
    time.sleep(0.5)  # whatever the word woke has begun, and is told of
    go_on(scripted, process)
    assert scripted.heard(life=0) == []
    assert scripted.num_lives("trainer") == 1


def test_what_ends_after_the_successor_spoke_but_was_done_before_is_needed_again(scripted: Scripted):
    process = scripted.start("orchestrator:lead:listen", "trainer:member:do_all_and_linger")
    wait_for_first_word(process)
    scripted.wait_for("trainer")
    time.sleep(0.5)  # its words
    os.kill(scripted.wait_for("orchestrator"), signal.SIGKILL)
    scripted.wait_for_restarts(1)
    assert scripted.num_lives("trainer") == 1
    (scripted.run.path / "leave").touch()
    scripted.wait_for_life("trainer", 1)
    go_on(scripted, process)


def test_a_storm_ends_the_run_with_its_cause_and_how_often(scripted: Scripted):
    code, said = scripted.ends("orchestrator:lead:listen", "env-0:member:work_shortly", launch={"max_restarts": 2})
    assert code == 1
    assert "env-0 ended the run (exit code 1; 3 ends within 600 s, launch.max_restarts=2)" in said
    assert scripted.num_lives("env-0") == 3
    assert [restarted.life for restarted in read_restarts(scripted.run)] == [1, 2]


def test_a_process_that_is_never_ready_again_ends_the_run_with_the_end_of_its_log(scripted: Scripted):
    process = scripted.start("orchestrator:lead:listen", "env-0:member:work_once")
    os.kill(scripted.wait_for("env-0"), signal.SIGKILL)
    _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "env-0 ended the run (exit code 1; 2 starts in a row failed)" in said
    assert "planted fault" in said


def test_the_same_error_again_and_again_ends_the_run(scripted: Scripted):
    code, said = scripted.ends("orchestrator:lead:listen", "trainer:member:same_words")
    assert code == 1
    assert "the same error 4 times in a row" in said
    assert "the batch is torn" in said
    assert scripted.num_lives("trainer") == 4


@pytest.mark.parametrize(("behaviour", "code"), [("final", 1), ("user_error_later", 2)])
def test_what_cannot_go_on_is_not_started_again(scripted: Scripted, behaviour: str, code: int):
    if behaviour == "final":
        ended, said = scripted.ends("orchestrator:lead:final")
        assert "no engine is left" in said
    else:
        process = scripted.start("orchestrator:lead:listen", "env-0:member:user_error_later")
        os.kill(scripted.wait_for("env-0"), signal.SIGKILL)
        _, said = process.communicate(timeout=DEADLINE_S)
        ended = process.returncode
        assert "give a file" in said
    assert ended == code


def test_the_orchestrator_may_ask_for_a_restart_of_the_life_it_knows(scripted: Scripted):
    process = scripted.start("orchestrator:lead:listen", "env-0:member:work")
    for name in ("orchestrator", "env-0"):
        scripted.wait_for(name)
    scripted.ask("env-0 7")  # control: not this life
    wait_until(lambda: not (scripted.run.path / "ask").exists(), "the leader to ask")
    scripted.ask("env-0 0")
    scripted.wait_for_restarts(1)
    go_on(scripted, process)
    [restarted] = read_restarts(scripted.run)
    assert restarted.why == "the orchestrator gave it up: it is planted"
    assert scripted.num_lives("env-0") == 2


def test_restarts_that_are_planned_are_no_storm(scripted: Scripted):
    entries = ("orchestrator:lead:listen", "env-0:member:work")
    process = scripted.start(*entries, launch={"max_restarts": 1})
    for life in range(3):
        scripted.wait_for_life("env-0", life)
        scripted.ask(f"env-0 {life} planned")
        scripted.wait_for_restarts(life + 1)
    for life in (3, 4):  # control
        scripted.wait_for_life("env-0", life)
        scripted.ask(f"env-0 {life}")
    _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "2 ends within 600 s, launch.max_restarts=1" in said


def port_of(scripted: Scripted) -> int:
    return int(scripted.attempt.engines[0].rpartition(":")[2])


def test_an_engine_comes_back_at_its_port(scripted: Scripted):
    process = scripted.start("orchestrator:lead:listen", "engine-0:member:serve_noted")
    scripted.wait_for("orchestrator")
    pid = scripted.wait_for("engine-0")
    wait_until(lambda: bool(holder_of("127.0.0.1", port_of(scripted))), "the engine to listen")
    wait_until_said(process, "engine-0 is ready")
    os.kill(pid, signal.SIGKILL)
    scripted.wait_for_restarts(1)
    assert f"process {scripted.wait_for_life('engine-0', 1)} " in holder_of("127.0.0.1", port_of(scripted))
    go_on(scripted, process)
    assert not [
        entry for entry in read_ledger(scripted.run) if entry.process == "engine-0"
    ]  # the orchestrator's affair


def test_a_port_that_somebody_took_meanwhile_is_named(scripted: Scripted):
    process = scripted.start("orchestrator:lead:listen", "engine-0:member:serve_noted")
    scripted.wait_for("orchestrator")
    pid = scripted.wait_for("engine-0")
    wait_until(lambda: bool(holder_of("127.0.0.1", port_of(scripted))), "the engine to listen")
    wait_until_said(process, "engine-0 is ready")
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        process.send_signal(signal.SIGSTOP)  # the thief is there before a second life can be
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not holder_of("127.0.0.1", port_of(scripted)), "the port to be free")
        thief.bind(("127.0.0.1", port_of(scripted)))
        thief.listen()
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert f"its port {port_of(scripted)} on 127.0.0.1 is in use by process {os.getpid()}" in said
    assert "2 starts in a row failed" in said


def test_a_supervised_run_goes_on_after_its_trainer_was_killed(scripted: Scripted):
    process = scripted.start("trainer:lead:train")
    os.kill(scripted.wait_for("trainer"), signal.SIGKILL)
    _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, said
    assert scripted.num_lives("trainer") == 2
