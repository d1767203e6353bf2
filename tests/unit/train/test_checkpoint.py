"""A resumed trainer goes on to the bit; what cannot be read is never taken for a checkpoint."""

import json
import resource
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from palestra.config.schema import Log, Lora, Model, RunConfig, Train
from palestra.core.errors import InfrastructureError, UserError
from palestra.core.ledger import Ledger
from palestra.train.trainer import Trainer
from tests.unit.train.batches import make_batch

pytestmark = pytest.mark.slow

LENGTHS = [9, 4, 17, 5, 12, 6, 4, 8]


@pytest.fixture
def make_trainer(qwen, ranks, tmp_path):
    def make(lora=None, **train):
        settings = {"steps": 6, "lr": 1e-2, "schedule": "cosine", "lr_warmup_steps": 2, "weight_decay": 0.1, **train}
        config = RunConfig(
            log=Log(name="run", outputs=tmp_path),
            model=Model(path=str(qwen), dtype="float32", lora=lora),
            train=Train(**settings),
        )
        return Trainer(config, ranks, Ledger("test"))

    return make


def _train(trainer, steps) -> list[float]:
    return [
        trainer.train(make_batch(LENGTHS, packs=[0, 0, 0, 0, 1, 1, 1, 1], step=s, seed=s), Ledger("t"))[
            "train/grad_norm"
        ].value
        for s in steps
    ]


def _save(trainer, data=None) -> Path:
    trainer.save(Ledger("test"), data)
    written = trainer.finish_save(Ledger("test"))
    assert written.version == trainer.version
    return written.directory


def _weights(trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.full_tensor().clone() for name, parameter in trainer.policy.named_parameters()}


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": "muon"}, {"optimizer": "muon", "offload_optimizer": True}])
def test_resumed_equals_uninterrupted_to_the_bit(make_trainer, optimizer):
    straight = make_trainer(**optimizer)
    norms = _train(straight, range(3))
    _save(straight, {"num_drawn": 17})
    norms += _train(straight, range(3, 6))
    resumed = make_trainer(**optimizer)
    assert resumed.resume(3, Ledger("test")) == {"num_drawn": 17}
    assert resumed.version == 3
    assert _train(resumed, range(3, 6)) == norms[3:]
    expected = _weights(straight)
    assert all(torch.equal(weight, expected[name]) for name, weight in _weights(resumed).items())


def test_an_adapter_goes_on_to_the_bit_from_a_checkpoint_without_the_frozen_weights(make_trainer):
    lora = Lora(rank=2)
    straight = make_trainer(lora)
    norms = _train(straight, range(3))
    directory = _save(straight)
    norms += _train(straight, range(3, 6))
    resumed = make_trainer(lora)
    resumed.resume(3, Ledger("test"))
    assert _train(resumed, range(3, 6)) == norms[3:]
    expected = _weights(straight)
    assert all(torch.equal(weight, expected[name]) for name, weight in _weights(resumed).items())
    fresh = _weights(make_trainer(lora))
    moved = {name for name, weight in _weights(resumed).items() if not torch.equal(weight, fresh[name])}
    assert moved == {name for name in fresh if "lora_" in name}
    kept = FileSystemReader(directory).read_metadata().state_dict_metadata
    weights = {name for name in kept if name.startswith("policy.")}
    assert {name.removeprefix("policy.") for name in weights} == moved


@pytest.mark.parametrize(("before", "after"), [(None, Lora(rank=2)), (Lora(rank=2), None)], ids=["full", "adapter"])
def test_a_checkpoint_of_the_other_kind_is_refused(make_trainer, before, after):
    """`palestra run --resume` refuses it by the config already."""
    trainer = make_trainer(before)
    _train(trainer, range(1))
    _save(trainer)
    with pytest.raises(InfrastructureError, match="cannot be loaded"):
        make_trainer(after).resume(1, Ledger("test"))


def test_without_the_optimizers_state_it_would_not(make_trainer):
    """The negative control: the moments matter."""
    straight = make_trainer()
    _train(straight, range(3))
    _save(straight)
    resumed = make_trainer()
    resumed.resume(3, Ledger("test"))
    resumed._optimizer.state.clear()
    _train(straight, range(3, 4))
    _train(resumed, range(3, 4))
    expected = _weights(straight)
    assert not all(torch.equal(weight, expected[name]) for name, weight in _weights(resumed).items())


def test_saving_changes_nothing(make_trainer):
    one, other = make_trainer(), make_trainer()
    for step in range(3):
        _train(one, [step])
        _save(one)
    _train(other, range(3))
    expected = _weights(other)
    assert all(torch.equal(weight, expected[name]) for name, weight in _weights(one).items())


def test_saved_before_the_first_step_it_resumes_as_a_new_one(make_trainer):
    new, straight = make_trainer(), make_trainer()
    _save(straight)
    resumed = make_trainer()
    resumed.resume(0, Ledger("test"))
    for trainer in (new, straight, resumed):
        _train(trainer, range(1))
    expected = _weights(new)
    for trainer in (straight, resumed):
        assert all(torch.equal(weight, expected[name]) for name, weight in _weights(trainer).items())


def test_a_batch_of_another_step_is_refused(make_trainer):
    with pytest.raises(InfrastructureError, match="batch of step 2, but the trainer holds version 0"):
        make_trainer().train(make_batch(LENGTHS, step=2), Ledger("test"))


@pytest.mark.parametrize("torn", ["state.json", "__0_0.distcp", ".metadata"])
def test_a_torn_checkpoint_is_an_error_that_says_what_to_do(make_trainer, torn):
    trainer = make_trainer()
    _train(trainer, range(1))
    directory = _save(trainer)
    (directory / torn).unlink()
    with pytest.raises(InfrastructureError, match="resume from the one before"):
        make_trainer().resume(1, Ledger("test"))


def test_state_is_readable(make_trainer):
    directory = _save(make_trainer(), {"num_drawn": 5})
    assert json.loads((directory / "state.json").read_text()) == {"version": 0, "data": {"num_drawn": 5}}


def test_a_directory_that_cannot_be_written_is_an_error(make_trainer, tmp_path):
    trainer = make_trainer()
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(InfrastructureError, match="could not write the checkpoint"):
        _save(trainer)


def test_a_full_disk_is_an_error_and_no_checkpoint(make_trainer):
    """The limit on file sizes stands in for the disk: the writes fail in the same way."""
    trainer = make_trainer()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InfrastructureError, match=r"could not write the checkpoint .*; free space and resume"):
            _save(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(InfrastructureError, match="cannot be loaded"):
        trainer.resume(0, Ledger("test"))


def test_an_unknown_option_of_the_loss_is_the_users_error(qwen, ranks, tmp_path):
    config = RunConfig.model_validate(
        {
            "log": {"name": "run", "outputs": tmp_path},
            "model": {"path": str(qwen), "dtype": "float32"},
            "algo": {"loss": "mis", "loss_args": {"hihg": 3.0}},
        }
    )
    with pytest.raises(UserError, match="hihg"):
        Trainer(config, ranks, Ledger("test"))
