"""kill -9 of every kind of process at every named point of a run, against an engine that replays the protocol."""

import dataclasses
from dataclasses import dataclass

import pytest

from palestra.wire.runlog import read_restarts
from tests.fault.doomed import Fault

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

KINDS = ("engine-0", "env-0", "orchestrator", "trainer", "supervisor")


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


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("victim", KINDS)
def test_killed(victim: str, point: str, faulty, judge):
    run = faulty(POINTS[point].kills(victim))
    run.play(resumes=1 if victim == "supervisor" else 0)
    judge(run, fired=1)


@pytest.mark.parametrize("victim", KINDS)
def test_killed_and_again_while_resuming(victim: str, faulty, judge):
    again = BEGINNINGS[victim].kills(victim)
    run = faulty(dataclasses.replace(POINTS["training"], nth=4, attempt=1).kills(victim), again)
    run.play(resumes=2 if victim == "supervisor" else 0)
    judge(run, fired=2)


@pytest.mark.parametrize("victims", [("engine-0", "trainer"), ("orchestrator", "env-0"), ("trainer", "orchestrator")])
def test_two_killed_in_one_moment(victims: tuple[str, str], faulty, judge):
    run = faulty(POINTS["training"].kills(*victims))
    run.play()
    judge(run, fired=1)


def test_an_engine_that_dies_in_a_publish_is_started_again_once(faulty, judge):
    """What the publish to the dead one still reports is no reason to end the one that took its place."""
    scores = Point("engine-0", "tests.fault.replaying_engine:Engine.scored", 3)
    run = faulty(scores.kills("engine-0"), engine={"replicas": 2}, step_s=0.5, train={"steps": 10})
    run.play()
    judge(run, fired=1)
    assert [(restarted.process, restarted.life) for restarted in read_restarts(run.run)] == [("engine-0", 1)]
