"""Engine and trainer take turns on one device: never both, whoever is killed when; and nothing is lost by it."""

from itertools import pairwise
from pathlib import Path

import pytest

from palestra.orchestrate.state import Replied
from palestra.wire.runlog import read_ledger
from tests.fault.cases import DEADLINE_S
from tests.fault.counts import read_events
from tests.fault.doomed import Fault
from tests.fault.table import FILE, Table
from tests.fault.test_kills import Point
from tests.fault.whole_run import STEPS, FaultyRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(DEADLINE_S)]

TURNS = {"turns": True, "stop_s": 5}
TRAINING = Point("trainer", "tests.fault.table_trainer:TableTrainer.train", 3)
GENERATING = Point("engine-0", "tests.fault.replaying_engine:Engine.step", 60)
WAKING = Point("engine-0", "tests.fault.replaying_engine:Engine.wake_up", 3, "leave")
LOADING = Point("engine-0", "tests.fault.replaying_engine:Engine.update", 3, "leave")
FALLING_ASLEEP = Point("engine-0", "tests.fault.replaying_engine:Engine.sleep", 3, "leave")
GIVING = Point("orchestrator", "palestra.orchestrate.turns:Turns.give", 4, "leave")
STAGING = Point("trainer", "tests.fault.table_trainer:TablePublisher.stage", 3, "leave")

KILLS = {
    "the trainer in its turn": TRAINING.kills("trainer"),
    "the trainer when it has staged": STAGING.kills("trainer"),
    "the engine in its turn": GENERATING.kills("engine-0"),
    "the engine asleep": TRAINING.kills("engine-0"),
    "the engine as it wakes": WAKING.kills("engine-0"),
    "the engine as it loads": LOADING.kills("engine-0"),
    "the engine as it falls asleep": FALLING_ASLEEP.kills("engine-0"),
    "the trainer in the engine's turn": GENERATING.kills("trainer"),
    "both in the trainer's turn": TRAINING.kills("engine-0", "trainer"),
    "the orchestrator in the trainer's turn": TRAINING.kills("orchestrator"),
    "the orchestrator in the engine's turn": GENERATING.kills("orchestrator"),
    "the orchestrator as it gives a turn": GIVING.kills("orchestrator"),
    "the orchestrator and the trainer in its turn": TRAINING.kills("orchestrator", "trainer"),
}


def turns_of(run: FaultyRun) -> list[str]:
    return [note["process"] for note in run.witness.read("entered")]


def overlaps(run: FaultyRun) -> list[str]:
    return [note["process"] for note in run.witness.read("entered") if not note["is_alone"]]


def wrong_labels(run: FaultyRun) -> list[str]:
    """Tokens whose log-probability is not that of the version they are labelled with. The first of a reply is left out:
    what comes before it is not in the event."""
    config, wrong = run.config, []
    tables = [Table.load(Path(config.model_dir) / FILE)]
    for step in run.run.batches.steps():
        tables.append(tables[-1].trained(run.run.batches.read(step, attempt=10**9), config.train.lr))
    replies = [event.reply.reply for event in read_events(run.run) if isinstance(event, Replied)]
    assert sum(len(reply.token_ids) for reply in replies) > 100
    for reply in replies:
        for span in reply.spans:
            logp = tables[span.version].logp(1.0)
            for at in range(max(span.start, 1), span.end):
                if abs(logp[reply.token_ids[at - 1], reply.token_ids[at]] - reply.logprobs[at]) > 1e-9:
                    wrong.append(f"token {at} labelled {span.version}: {reply}")
    return wrong


def test_turns_alternate_and_nothing_else_changes(make, judge):
    run = make(launch=TURNS)
    run.play()
    judge(run, name="turns", fired=0)
    turns = turns_of(run)
    assert all(one != two for one, two in pairwise(turns)), "the engine leaves, then the trainer enters, and so on"
    assert turns.count("trainer") == 1 + STEPS + 1, "the first version, a turn for each step, the export"
    assert (overlaps(run), wrong_labels(run)) == ([], [])
    causes = {entry.process: entry.parts_s.keys() for entry in read_ledger(run.run)}
    assert "asleep" in causes["engine-0"]
    assert "wait_for_turn" in causes["trainer"]
    run.config = run.config.model_copy(update={"train": run.config.train.model_copy(update={"lr": 3.0})})
    assert wrong_labels(run), "control: other weights under the same numbers"


@pytest.mark.parametrize("algo", [{"pace_age": 0.0, "max_age": 0}, {"pace_age": 2.0}], ids=["in step", "ahead"])
def test_turns_hold_for_any_pace(make, judge, algo):
    run = make(launch=TURNS, algo=algo)
    run.play()
    judge(run, name=f"turns, {algo}", fired=0)
    assert (overlaps(run), wrong_labels(run)) == ([], [])


def test_rollouts_end_before_the_engine_sleeps_where_the_recipe_wants_it(make, judge):
    run = make(launch=TURNS, sync={"wait": True})
    run.play()
    judge(run, name="turns, sync.wait", fired=0)
    replies = [event.reply.reply for event in read_events(run.run) if isinstance(event, Replied)]
    assert all(len(reply.spans) <= 1 for reply in replies)


@pytest.mark.parametrize("name", KILLS)
def test_a_turn_ends_with_its_process(make, judge, name):
    run = make(KILLS[name], launch=TURNS)
    run.play()
    judge(run, name=f"turns: killed {name}", fired=1)
    assert (overlaps(run), wrong_labels(run)) == ([], [])


def test_control_a_trainer_that_does_not_await_its_turn_is_caught(make):
    """What the device notes is worth something. Its steps are long: the engine enters within one."""
    hasty = Fault(process="trainer", at="palestra.train.reinforce:Orchestrator.take_turn", do="skip", nth=3)
    run = make(hasty, TRAINING.kills("supervisor"), launch=TURNS, step_s=3.0)
    run.break_off()
    assert overlaps(run)
