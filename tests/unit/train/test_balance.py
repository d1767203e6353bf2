"""Keeping experts evenly used, in a whole step: the auxiliary loss, the biases, and models that have neither."""

import pytest
import torch

from palestra.config.schema import Balance, Log, Model, RunConfig, Train
from palestra.core.errors import UserError
from palestra.core.ledger import Ledger
from palestra.core.metrics import values
from palestra.train.trainer import Trainer
from tests.unit.model import tiny
from tests.unit.train.batches import make_batch

LENGTHS = [9, 4, 17, 5]


@pytest.fixture
def train(ranks, tmp_path):
    def train(family: str, **balance) -> tuple[Trainer, dict[str, float]]:
        config = RunConfig(
            log=Log(name="run", outputs=tmp_path),
            model=Model(path=str(tiny.build(tmp_path, family)), dtype="float32"),
            train=Train(lr=1e-2, balance=Balance(**balance)),
        )
        trainer = Trainer(config, ranks, Ledger("test"))
        return trainer, values(trainer.train(make_batch(LENGTHS, packs=[0, 0, 1, 1]), Ledger("test")))

    return train


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.full_tensor().clone() for name, p in trainer.policy.model.named_parameters()}


def test_a_step_tells_how_the_experts_were_used(train):
    _, metrics = train("Glm4MoeForCausalLM")
    assert 0 <= metrics["train/experts/max_violation"] <= metrics["train/experts/max_violation_worst"] <= 1
    assert 0 <= metrics["train/experts/dead_share"] <= 0.5
    assert 0 < metrics["train/experts/weight_entropy"] <= 0.694  # two experts each: at most log 2


def test_the_auxiliary_loss_moves_the_routers(train):
    plain, _ = train("Qwen3MoeForCausalLM")
    balanced, _ = train("Qwen3MoeForCausalLM", aux_loss=10.0)
    expected = weights(plain)
    moved = {name for name, weight in weights(balanced).items() if not torch.equal(weight, expected[name])}
    assert {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)} <= moved


def test_the_biases_move_by_the_rate(train):
    trainer, _ = train("Glm4MoeForCausalLM", bias_rate=0.25)
    for bias in trainer.policy.routers.biases:
        assert set(bias.abs().tolist()) <= {0.0, 0.25}
        assert bias.any()


@pytest.mark.parametrize(
    ("family", "balance", "says"),
    [
        ("Qwen3ForCausalLM", {"aux_loss": 0.1}, "Qwen3ForCausalLM has no routers"),
        ("Qwen3MoeForCausalLM", {"bias_rate": 0.1}, "routers of Qwen3MoeForCausalLM have no bias"),
    ],
)
def test_what_there_is_nothing_to_balance_by_is_refused(train, family, balance, says):
    with pytest.raises(UserError, match=says):
        train(family, **balance)
