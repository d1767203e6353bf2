"""kill -9 of every kind of process at every named point of a run, against an engine that replays the protocol."""

import dataclasses
from dataclasses import dataclass
from itertools import product

import pytest

from palestra.wire.rundir import RunDir, checkpoint_dir, read_manifests
from palestra.wire.runlog import read_restarts
from tests.fault.cases import DEADLINE_S, Case, Make, Maker
from tests.fault.doomed import Fault
from tests.fault.table import FILE
from tests.fault.whole_run import FaultyRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(DEADLINE_S)]

KINDS = ("engine-0", "env-0", "orchestrator", "trainer", "supervisor")
TOGETHER = (("engine-0", "trainer"), ("orchestrator", "env-0"), ("trainer", "orchestrator"))


@dataclass(frozen=True)
class Point:
    """The `nth` call of a function of one process."""

    process: str
    at: str
    nth: int
    when: str = "enter"
    life: int | None = None
    attempt: int | None = None

    def kills(self, *victims: str, **more) -> Fault:
        return Fault(**dataclasses.asdict(self), victims=victims, **more)


POINTS = {
    "generating": Point("orchestrator", "palestra.orchestrate.gateway:Gateway.call", 30),
    "scoring": Point("env-0", "palestra.env.play:_scored", 12),
    "packing": Point("orchestrator", "palestra.orchestrate.batcher:make_batch", 3),
    "shipping": Point("orchestrator", "palestra.wire.batches:BatchFiles.write", 3, "leave"),
    "training": Point("trainer", "tests.fault.table_trainer:TableTrainer.train", 3),
    "checkpointing": Point("orchestrator", "palestra.wire.rundir:write_manifest", 2),
    "publishing": Point("engine-0", "tests.fault.replaying_engine:Engine.update", 3, "leave"),
}
BEGINNINGS = {
    "engine-0": Point("engine-0", "tests.fault.replaying_engine:Engine.start_update", 1, life=1),
    "env-0": Point("env-0", "palestra.env.worker:Worker._say_ready", 1, "leave", life=1),
    "orchestrator": Point("orchestrator", "palestra.orchestrate.journal:recover", 1, "leave", life=1),
    "trainer": Point("trainer", "tests.fault.table_trainer:TableTrainer.resume", 1, life=1),
    "supervisor": Point("orchestrator", "palestra.orchestrate.journal:recover", 1, "leave", attempt=2),
}


def killed(victim: str, point: str) -> Case:
    def play(make: Make) -> FaultyRun:
        run = make(POINTS[point].kills(victim))
        run.play(resumes=1 if victim == "supervisor" else 0)
        return run

    return Case(f"{victim} killed while {point}", play)


def killed_while_resuming(victim: str) -> Case:
    """First as soon as there is a checkpoint to resume from."""
    first = dataclasses.replace(POINTS["checkpointing"], nth=1, when="leave", attempt=1)

    def play(make: Make) -> FaultyRun:
        run = make(first.kills(victim), BEGINNINGS[victim].kills(victim))
        run.play(resumes=2 if victim == "supervisor" else 0)
        return run

    return Case(f"{victim} killed, and again while resuming", play, fired=2)


def killed_together(victims: tuple[str, str]) -> Case:
    def play(make: Make) -> FaultyRun:
        run = make(POINTS["training"].kills(*victims))
        run.play()
        return run

    return Case(f"{' and '.join(victims)} killed in one moment", play)


def killed_in_a_publish(make: Make) -> FaultyRun:
    """What the publish to the dead one still reports is no reason to end the one that took its place."""
    scores = Point("engine-0", "tests.fault.replaying_engine:Engine.scored", 3)
    run = make(scores.kills("engine-0"), engine={"replicas": 2}, step_s=0.3)
    run.play()
    assert [(restarted.process, restarted.life) for restarted in read_restarts(run.run)] == [("engine-0", 1)]
    return run


def killed_while_files_are_written(make: Make) -> FaultyRun:
    """Half of the second checkpoint is there, and the steps go on: it does not exist, and the one before does."""
    writes = Point("trainer", "tests.fault.table_trainer:TableTrainer.go_on_writing", 2)
    first = checkpoint_dir(RunDir(make.directory / "outputs" / "run"), 2) / "manifest.json"
    run = make(writes.kills("supervisor", "trainer", after=str(first)))
    assert first.is_relative_to(run.run.path)
    run.break_off()
    (whole,) = read_manifests(run.run)
    (torn,) = (path for path in run.run.checkpoints.iterdir() if int(path.name) > whole.version)
    assert [path.name for path in (torn / "trainer").iterdir()] == [FILE]
    run.resume()
    return run


CASES = [
    *(killed(victim, point) for victim, point in product(KINDS, POINTS)),
    *map(killed_while_resuming, KINDS),
    *map(killed_together, TOGETHER),
    Case("the trainer killed while files of a checkpoint are written", killed_while_files_are_written),
    Case("one engine of two killed while its publish is proved", killed_in_a_publish),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_nothing_is_lost_when(case: Case, make: Maker, judge):
    judge(case.play(make), name=case.name, fired=case.fired)
