"""A step with the experts that engines chose: its metrics, and that the trainer's own choices change nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from palestra.config.schema import RunConfig
from palestra.core.errors import UserError
from palestra.core.ledger import Ledger
from palestra.core.metrics import values
from palestra.train.packs import plan_step
from palestra.train.trainer import Trainer
from palestra.wire.batches import Batch
from tests.unit.model import tiny
from tests.unit.orchestrate.scripted import Life, make_config, reward_by_seed
from tests.unit.train.batches import make_batch

LENGTHS = [9, 4, 17, 5]
FAMILY = "Glm4MoeForCausalLM"  # its first layer has no experts


@pytest.fixture
def make(ranks, tmp_path):
    def make(family: str = FAMILY, **train: Any) -> Trainer:
        path = tmp_path / family if (tmp_path / family).exists() else tiny.build(tmp_path, family)
        tree = {
            "log": {"name": "run", "outputs": tmp_path},
            "model": {"path": str(path), "dtype": "float32"},
            "env": {"mix": [{"id": "a"}]},
            "train": {"lr": 1e-2, **train},
        }
        return Trainer(RunConfig.model_validate(tree), ranks, Ledger("test"))

    return make


def trained(trainer: Trainer, batch: Batch) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    metrics = values(trainer.train(batch, Ledger("test")))
    kept = {name: value for name, value in metrics.items() if not name.endswith(("_s", "_per_s"))}
    parameters: Any = trainer.policy.model.named_parameters()
    return kept, {name: parameter.full_tensor().clone() for name, parameter in parameters}


def own_choices(trainer: Trainer, batch: Batch) -> Batch:
    """The batch with the experts that the trainer would choose, but for each sample's last token."""
    found: list[torch.Tensor] = []
    for pack in plan_step(batch, rank=0, num_ranks=1).packs:
        routes = torch.zeros(len(pack.token_ids), 3, 2, dtype=torch.uint8)

        def hear(router: Any, inputs: Any, outputs: Any, routes: torch.Tensor = routes) -> None:
            layers = enumerate(trainer.policy.decoder_layers)
            routes[:, next(index for index, layer in layers if router in set(layer.modules()))] = outputs[2]

        hooks = [router.register_forward_hook(hear) for _, router in trainer.policy.routers.replay.routers]
        with torch.no_grad():
            trainer.policy(pack.token_ids, pack.documents, pack.scored, pack.temperature)
        trainer.policy.reshard()  # type: ignore[operator]
        for hook in hooks:
            hook.remove()
        found += [rows[:-1] for rows in routes.split([*pack.documents.lengths])]
    return replace(batch, routes=torch.cat(found).numpy(), num_routed=batch.lengths - 1)


def test_own_choices_train_the_same_and_others_do_not(make):
    batch = make_batch(LENGTHS, packs=[0, 0, 1, 1])
    plain_metrics, plain = trained(make(), batch)
    trainer = make(router_replay=True)
    recorded = own_choices(trainer, batch)
    metrics, weights = trained(trainer, recorded)
    num = sum(LENGTHS)
    assert metrics.pop("train/experts/replayed") == pytest.approx((num - len(LENGTHS)) / num)
    assert metrics.pop("train/experts/rerouted") == 0
    assert metrics == plain_metrics
    assert all(torch.equal(weights[name], weight) for name, weight in plain.items())

    moved = replace(recorded, routes=3 - recorded.routes)  # 0 is 3, 1 is 2: another set, unless it is {0, 3} or {1, 2}
    metrics, weights = trained(make(router_replay=True), moved)
    assert 0.2 < metrics["train/experts/rerouted"] < 1
    assert not torch.equal(weights["lm_head.weight"], plain["lm_head.weight"])
    ignored, weights = trained(make(), moved)
    assert ignored == plain_metrics, "without router_replay"


def test_a_batch_without_routes_is_trained_as_ever(make):
    batch = make_batch(LENGTHS, packs=[0, 0, 1, 1])
    plain_metrics, _ = trained(make(), batch)
    metrics, _ = trained(make(router_replay=True), batch)
    assert metrics.pop("train/experts/replayed") == 0
    assert metrics == plain_metrics


async def test_what_an_orchestrator_ships_is_what_routers_choose(make, tmp_path):
    """Its scripted engine chooses by a token's id; the batch is the file that a trainer reads."""
    life = Life(make_config(tmp_path / "loop", train={"router_replay": True, "steps": 1}), reward=reward_by_seed)
    await life.play()
    batch = life.run.batches.read(0, attempt=1)
    tiny.build(tmp_path, "Qwen3MoeForCausalLM", num_experts=32, num_experts_per_tok=1)
    trainer = make("Qwen3MoeForCausalLM", router_replay=True)
    _, (second, router) = trainer.policy.routers.replay.routers
    chosen: list[int] = []
    router.register_forward_hook(lambda router, inputs, outputs: chosen.extend(outputs[2].flatten().tolist()))
    metrics, _ = trained(trainer, batch)
    assert metrics["train/experts/replayed"] == pytest.approx(1 - batch.num_samples / batch.num_tokens)
    assert metrics["train/experts/rerouted"] > 0.5  # by chance one of 32 is the same
    tokens = [token for pack in plan_step(batch, rank=0, num_ranks=1).packs for token in pack.token_ids.tolist()]
    known = [
        rows for pack in plan_step(batch, rank=0, num_ranks=1).packs for rows in pack.routes[:, second, 0].tolist()
    ]
    assert len(chosen) == len(tokens)
    of_tokens = list(zip(chosen, tokens, known, strict=True))
    assert sum(route < 0 for *_, route in of_tokens) == batch.num_samples
    assert all(expert == token + 1 for expert, token, route in of_tokens if route >= 0)


def test_a_model_without_experts_is_refused(make):
    with pytest.raises(UserError, match=r"train\.router_replay: experts cannot be given to a model without experts"):
        make("Qwen3ForCausalLM", router_replay=True)
