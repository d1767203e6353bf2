"""Versions that are sent, whole (`sync.kind = "nccl"`) or as what changed (`"sparse_nccl"`): who serves is sent, who
joins reads files, whoever dies when.

The messages and the order of calls are those of a run on GPUs; what is sent lies in a directory.
"""

import pytest

from palestra.wire.runlog import read_metrics, read_restarts
from tests.fault.cases import DEADLINE_S
from tests.fault.test_kills import Point
from tests.fault.test_turns import wrong_labels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(DEADLINE_S)]

SYNC, ENGINES = {"kind": "nccl"}, {"replicas": 2}
SENDING = Point("trainer", "tests.fault.table_trainer:TableSender.send", 2)
OFFERING = Point("trainer", "tests.fault.table_trainer:TablePublisher.stage", 3, "leave")
RECEIVING = Point("engine-0", "tests.fault.replaying_engine:Engine.update", 3)
BEGINNING = Point("orchestrator", "palestra.orchestrate.trainer:TrainerLink.send_weights", 2)
GENERATING = Point("engine-0", "tests.fault.replaying_engine:Engine.step", 60)

KILLS = {
    "the trainer as it sends": SENDING.kills("trainer"),
    "the trainer when it offers": OFFERING.kills("trainer"),
    "an engine as it receives": RECEIVING.kills("engine-0"),
    "both engines as one receives": RECEIVING.kills("engine-0", "engine-1"),
    "an engine between two versions": GENERATING.kills("engine-0"),
    "the orchestrator as it lets send": BEGINNING.kills("orchestrator"),
    "the orchestrator and an engine": BEGINNING.kills("orchestrator", "engine-1"),
}


def test_every_version_but_the_first_is_sent(make, judge):
    run = make(sync=SYNC, engine=ENGINES)
    run.play()
    judge(run, name="sends", fired=0)
    assert wrong_labels(run) == []
    rows = [row for row in read_metrics(run.run) if "publish/send_s" in row]
    assert len(rows) >= run.config.train.steps - 2, "of the last one no row tells"


@pytest.mark.parametrize("name", KILLS)
def test_whoever_misses_a_version_gets_it_as_files(make, judge, name):
    run = make(KILLS[name], sync=SYNC, engine=ENGINES)
    run.play()
    judge(run, name=f"sends: killed {name}", fired=1)
    assert wrong_labels(run) == []


CHANGES = {**SYNC, "kind": "sparse_nccl"}


@pytest.mark.parametrize(
    ("name", "victim"),
    [
        ("the trainer when it offers", "trainer"),
        ("the orchestrator as it lets send", "orchestrator"),
    ],
)
def test_whoever_does_not_hold_it_gets_the_whole_version(make, judge, name, victim):
    """A trainer that is started again has another past than engines, and a new orchestrator knows nothing of theirs:
    nothing else is started again, as nothing is sent that would be refused. The others get changes."""
    run = make(KILLS[name], sync=CHANGES, engine=ENGINES)
    run.play()
    judge(run, name=f"changes: killed {name}", fired=1)
    assert wrong_labels(run) == []
    assert {restart.process for restart in read_restarts(run.run)} == {victim}
    assert sum("publish/send_s" in row for row in read_metrics(run.run)) >= 2
