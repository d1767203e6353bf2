"""On a CUDA device: what is saved is what the weights were when the save began, copied through pinned memory."""

import pytest
import torch
import torch.distributed as dist

from palestra.config.schema import Log, Model, RunConfig, Train
from palestra.core.ledger import Ledger
from palestra.model.mesh import make_meshes
from palestra.train.ranks import Ranks
from palestra.train.trainer import Trainer
from tests.unit.model import tiny
from tests.unit.train.batches import make_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("offload", [False, True])
def test_a_save_that_steps_go_over_is_resumed_to_the_bit(tmp_path, offload):
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    ranks = Ranks(rank=0, num=1, device=torch.device("cuda", 0), meshes=make_meshes("cuda"))
    config = RunConfig(
        log=Log(name="run", outputs=tmp_path),
        model=Model(path=str(tiny.build(tmp_path)), dtype="float32"),
        train=Train(steps=6, lr=1e-2, offload_optimizer=offload),
    )
    straight = Trainer(config, ranks, Ledger("test"))
    _train(straight, 2)
    straight.save(Ledger("test"))
    saved = _weights(straight)
    _train(straight, 4)
    straight.finish_save(Ledger("test"))
    assert any((weight != saved[name]).any() for name, weight in _weights(straight).items())
    resumed = Trainer(config, ranks, Ledger("test"))
    resumed.resume(2, Ledger("test"))
    assert all(torch.equal(weight, saved[name]) for name, weight in _weights(resumed).items())
    _train(resumed, 3)
    straight.resume(2, Ledger("test"))
    _train(straight, 3)
    after = _weights(straight)
    for name, weight in _weights(resumed).items():
        torch.testing.assert_close(weight, after[name], msg=name)


def _train(trainer: Trainer, version: int) -> None:
    while (step := trainer.version) < version:
        trainer.train(make_batch([9, 4, 17], packs=[0, 0, 0], step=step, seed=step), Ledger("test"))


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.full_tensor().clone() for name, parameter in trainer.policy.named_parameters()}  # type: ignore[attr-defined]
