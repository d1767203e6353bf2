"""What the trainer answers to what the orchestrator says, without processes."""

from collections.abc import Sequence
from typing import Any

import pytest

from palestra.config.schema import RunConfig
from palestra.core.errors import DeadlineError
from palestra.core.ledger import Ledger
from palestra.train import reinforce as module
from palestra.train.publish import KEPT_VERSIONS
from palestra.train.reinforce import reinforce
from palestra.wire.channel import Reconnected
from palestra.wire.messages import Finish, StillEvaluating, TrainBatch, TrainerReady, WeightsLoaded
from palestra.wire.rundir import Attempt, Manifest, RunDir, write_manifest
from tests.unit.train.batches import make_batch


class ScriptedCaller:
    """Says what is written, and notes in one list what is said and heard."""

    script: Sequence[Any] = ()
    log: list[Any] = []

    def __init__(self, *_: Any, **__: Any):
        self._messages = iter(self.script)

    def send(self, message: Any) -> None:
        self.log.append(message)

    def receive(self, *, deadline_s: float, waiting_for: str) -> Any:
        message = next(self._messages, None)
        if message is None:
            raise DeadlineError(waiting_for, deadline_s)
        self.log.append(message)
        return message


@pytest.fixture
def play(qwen, ranks, tmp_path, monkeypatch):
    def play(*script: Any, steps: int = 9) -> list[str]:
        config = RunConfig.model_validate(
            {
                "log": {"name": "run", "outputs": tmp_path},
                "model": {"path": str(qwen), "dtype": "float32"},
                "train": {"steps": steps, "lr": 1e-3},
                "env": {"mix": [{"id": "scripted"}]},
            }
        )
        run = RunDir(config.run_dir)
        for step in range(steps):
            run.batches.write(make_batch([6, 7], step=step, seed=step))
        monkeypatch.setattr(ScriptedCaller, "script", script)
        monkeypatch.setattr(ScriptedCaller, "log", [])
        monkeypatch.setattr(module, "BlockingCaller", ScriptedCaller)
        attempt = Attempt(
            number=1,
            resumed_from=None,
            supervisor="",
            orchestrator="",
            engines=(),
            staging=str(tmp_path),
            started_at=0.0,
        )
        reinforce(config, run, attempt, ranks, Ledger("trainer"), lambda ready: None)
        return [type(message).__name__ for message in ScriptedCaller.log]

    return play


def _train(step: int, *, publish: bool = True) -> TrainBatch:
    return TrainBatch(step=step, publish=publish, save=False)


def test_word_of_an_evaluation_is_heard_and_asks_for_nothing(play):
    log = play(StillEvaluating(), _train(0), StillEvaluating(), StillEvaluating(), Finish())
    heard = [name for name in log if name != "StillEvaluating"]
    assert heard == [
        *["WeightsStaged", "TrainerReady"],
        *["TrainBatch", "StepTrained", "WeightsStaged"],
        *["Finish", "Exported"],
    ]
    assert log.count("StillEvaluating") == 3


def test_stages_only_what_is_to_be_published(play):
    log = play(_train(0, publish=False), _train(1), Finish())
    assert log == [
        *["WeightsStaged", "TrainerReady"],
        *["TrainBatch", "StepTrained"],
        *["TrainBatch", "StepTrained", "WeightsStaged"],
        *["Finish", "Exported"],
    ]


def test_waits_for_the_engines_before_it_would_remove_what_they_load(play, tmp_path):
    """With three versions staged it trains on, but stages the fourth only when one of them is loaded."""
    script = [_train(step) for step in range(KEPT_VERSIONS)]
    log = play(*script, _train(KEPT_VERSIONS), WeightsLoaded(version=2), Finish())
    step = ["TrainBatch", "StepTrained", "WeightsStaged"]
    assert log == [
        *["WeightsStaged", "TrainerReady", *step, *step],
        *["TrainBatch", "StepTrained", "TrainBatch", "WeightsLoaded", "WeightsStaged"],
        *["StepTrained", "WeightsStaged", "Finish", "Exported"],
    ]
    assert sorted(path.name for path in tmp_path.glob("v0*")) == ["v000002", "v000003", "v000004"]


def test_silence_of_the_orchestrator_ends_at_the_deadline(play):
    with pytest.raises(DeadlineError, match="the batch of step 1 from the orchestrator"):
        play(_train(0))


def test_an_orchestrator_that_took_anothers_place_is_told_what_may_be_lost_and_nothing_is_trained_twice(play):
    """It asks again for what it does not know of: a step that is trained, and the publish of it."""
    before = [_train(0), _train(1, publish=False)]
    log = play(*before, Reconnected(), _train(0), _train(1), _train(1), WeightsLoaded(version=2), _train(2), Finish())
    known = [message for message in ScriptedCaller.log if isinstance(message, TrainerReady)]
    assert [(ready.version, ready.staged is None) for ready in known] == [(0, True), (2, False)]
    assert known[1].staged is not None
    assert known[1].staged.version == 1
    assert [step.step for step in known[1].steps] == [0, 1]
    after = log[log.index("Reconnected") + 1 :]
    assert after == [
        *["TrainerReady", "TrainBatch", "TrainBatch", "WeightsStaged", "TrainBatch"],  # version 2, once
        *["WeightsLoaded", "TrainBatch", "StepTrained", "WeightsStaged", "Finish", "Exported"],
    ]


def test_a_successor_begins_at_the_newest_checkpoint(play, tmp_path, monkeypatch):
    play(TrainBatch(step=0, publish=False, save=True), Finish())
    write_manifest(RunDir(tmp_path / "run"), Manifest(version=1, attempt=1, trainer="trainer", orchestrator="o"))
    monkeypatch.setenv("PALESTRA_LIFE", "1")
    log = play(_train(1), Finish())
    assert log == ["WeightsStaged", "TrainerReady", "TrainBatch", "StepTrained", "WeightsStaged", "Finish", "Exported"]
    assert {path.name for path in tmp_path.glob("v0*")} == {"v000000", "v000001.1", "v000002.1"}
