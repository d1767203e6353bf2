"""What the trainer answers to what the orchestrator says, without processes."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from palestra.config.schema import RunConfig
from palestra.core.errors import DeadlineError, InfrastructureError, PalestraError
from palestra.core.ledger import Ledger
from palestra.train import checkpoint
from palestra.train import reinforce as module
from palestra.train.background import Background, Written
from palestra.train.publish import KEPT_VERSIONS
from palestra.train.ranks import Ranks
from palestra.train.reinforce import reinforce
from palestra.train.trainer import Trainer
from palestra.wire.channel import Reconnected, Woken
from palestra.wire.messages import (
    Finish,
    StillEvaluating,
    TrainBatch,
    TrainerReady,
    TrainerSaved,
    WeightsLoaded,
)
from palestra.wire.rundir import Attempt, Manifest, RunDir, write_manifest
from tests.unit.train.batches import make_batch

FILES = {"__0_0.distcp", ".metadata", "state.json"}


class ScriptedCaller:
    """Says what is written, and notes in one list what is said and heard. `Woken` is said when it happens."""

    script: Sequence[Any] = ()
    log: list[Any] = []
    at_finish: Callable[[], None] = staticmethod(lambda: None)
    torn: list[int] = []  # versions that were told to be saved before their files were whole

    def __init__(self, *_: Any, **__: Any):
        self._messages, self._is_woken = iter(self.script), threading.Event()

    def send(self, message: Any) -> None:
        self.log.append(message)
        if isinstance(message, TrainerSaved) and not {path.name for path in Path(message.directory).iterdir()} >= FILES:
            self.torn.append(message.version)

    def wake(self) -> None:
        self._is_woken.set()

    def receive(self, *, deadline_s: float, waiting_for: str) -> Any:
        message = next(self._messages, None)
        if message is None:
            raise DeadlineError(waiting_for, deadline_s)
        if isinstance(message, Woken):
            assert self._is_woken.wait(20)
            self._is_woken.clear()
        self.log.append(message)
        if isinstance(message, Finish):
            self.at_finish()
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
        monkeypatch.setattr(ScriptedCaller, "torn", [])
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

    play.directory = tmp_path / "run"  # type: ignore[attr-defined]
    return play


def _train(step: int, *, publish: bool = True, save: bool = False) -> TrainBatch:
    return TrainBatch(step=step, publish=publish, save=save)


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


def test_all_ranks_hear_whatever_makes_the_first_wait_anew(play, monkeypatch):
    """Else they would be out of patience before it is."""
    heard: list[str] = []
    monkeypatch.setattr(Ranks, "from_first", lambda _, thing: heard.append(type(thing).__name__) or thing)
    play(StillEvaluating(), Reconnected(), _train(0), Finish())
    orders = [name for name in heard if name in ("StillEvaluating", "Reconnected", "TrainBatch", "Finish")]
    assert orders == ["StillEvaluating", "Reconnected", "TrainBatch", "Finish"]


def test_a_successor_begins_at_the_newest_checkpoint(play, tmp_path, monkeypatch):
    play(TrainBatch(step=0, publish=False, save=True), Finish())
    write_manifest(RunDir(tmp_path / "run"), Manifest(version=1, attempt=1, trainer="trainer", orchestrator="o"))
    monkeypatch.setenv("PALESTRA_LIFE", "1")
    log = play(_train(1), Finish())
    assert log == ["WeightsStaged", "TrainerReady", "TrainBatch", "StepTrained", "WeightsStaged", "Finish", "Exported"]
    assert {path.name for path in tmp_path.glob("v0*")} == {"v000000", "v000001.1", "v000002.1"}


@pytest.fixture
def held(monkeypatch):
    """No checkpoint is whole before this is set: the disk takes its time."""
    may_end, finish = threading.Event(), checkpoint._Writer.finish

    def slow(self, **found: Any) -> None:
        assert may_end.wait(20)
        finish(self, **found)

    monkeypatch.setattr(checkpoint._Writer, "finish", slow)
    yield may_end
    may_end.set()


def _names(*groups: Sequence[str] | str) -> list[str]:
    return [name for group in groups for name in ([group] if isinstance(group, str) else group)]


STEP = ["TrainBatch", "StepTrained"]
START = ["WeightsStaged", "TrainerReady"]


def test_a_checkpoint_is_told_as_soon_as_its_files_are_whole(play):
    """Also while nothing else is said."""
    log = play(_train(0, publish=False, save=True), Woken(), _train(1, publish=False), Finish())
    assert log == _names(START, STEP, "Woken", "TrainerSaved", STEP, "Finish", "Exported")
    assert ScriptedCaller.torn == []
    metrics = [message.metrics for message in ScriptedCaller.log if type(message).__name__ == "StepTrained"]
    assert ["train/checkpoint/write_s" in of_step for of_step in metrics] == [False, True]


def test_steps_go_on_while_it_is_written_and_the_end_waits_for_it(play, held, monkeypatch):
    monkeypatch.setattr(ScriptedCaller, "at_finish", threading.Timer(0.1, held.set).start)
    steps = [_train(step, publish=False) for step in (1, 2)]
    log = play(_train(0, publish=False, save=True), *steps, Finish())
    assert log == _names(START, STEP, STEP, STEP, "Finish", "TrainerSaved", "Exported")
    assert ScriptedCaller.torn == []


def test_the_next_checkpoint_waits_for_the_one_before(play, held):
    threading.Timer(0.3, held.set).start()
    log = play(*(_train(step, publish=False, save=True) for step in (0, 1)), Finish())
    assert log == _names(START, STEP, STEP, "TrainerSaved", "Finish", "TrainerSaved", "Exported")
    assert ScriptedCaller.torn == []


def test_a_checkpoint_that_is_told_too_early_would_be_seen(play, held, monkeypatch):
    """The negative control: told when it is begun."""
    directory = RunDir(play.directory).checkpoints / "000001" / "trainer"

    def hasty(self: Background) -> Written | None:
        begun, self._written = self._written, None
        while begun is not None and not directory.exists():
            pass
        return None if begun is None else Written(1, directory, 0.0, 0.0)

    monkeypatch.setattr(Background, "finish", hasty)
    play(_train(0, publish=False, save=True), _train(1, publish=False), Finish())
    assert ScriptedCaller.torn == [1]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_the_next_word(play, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint._Writer, "finish", full)
    with pytest.raises(InfrastructureError, match=r"could not write .*No space left on device; free space and resume"):
        play(_train(0, publish=False, save=True), Woken(), _train(1), Finish())
    assert "TrainerSaved" not in [type(message).__name__ for message in ScriptedCaller.log]


def test_a_checkpoint_counts_also_if_the_step_after_it_fails(play, monkeypatch):
    train = Trainer.train

    def fails_later(self: Trainer, batch: Any, ledger: Ledger) -> Any:
        if batch.step == 1:
            raise PalestraError("the gradient's norm is nan")
        return train(self, batch, ledger)

    monkeypatch.setattr(Trainer, "train", fails_later)
    with pytest.raises(PalestraError, match="nan"):
        play(_train(0, publish=False, save=True), _train(1), Finish())
    assert isinstance(ScriptedCaller.log[-1], TrainerSaved)
    assert ScriptedCaller.torn == []


def test_what_is_being_saved_is_not_saved_again_for_an_orchestrator_that_took_anothers_place(play, held):
    threading.Timer(0.3, held.set).start()
    save = _train(0, publish=False, save=True)
    log = play(save, Reconnected(), save, Woken(), Finish())
    assert log == _names(
        START, STEP, "Reconnected", "TrainerReady", "TrainBatch", "Woken", "TrainerSaved", "Finish", "Exported"
    )
