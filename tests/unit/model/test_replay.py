"""Routers that are given experts use them, weigh them by their own scores, and say how often they would not have."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from palestra.core.errors import InfrastructureError, UserError
from palestra.model.documents import documents_of
from palestra.model.policy import Policy, check_replay
from palestra.model.recompute import PLAIN, Activations, keep_activations
from palestra.model.replay import NOT_KNOWN
from tests.unit.model import tiny

LENGTHS = [12, 3, 9]
NUM = sum(LENGTHS)
GROUPED = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}  # as many groups are chosen as experts
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": {"norm_topk_prob": True},
    "GptOssForCausalLM": {},
    "Glm4MoeForCausalLM": GROUPED,
    "DeepseekV3ForCausalLM": GROUPED,
    "MiniMaxM2ForCausalLM": {},
}
QWEN = "Qwen3MoeForCausalLM"


@pytest.fixture(scope="module")
def make(tmp_path_factory) -> Callable[..., Policy]:
    @cache
    def path(family: str) -> Path:
        built = tiny.build(tmp_path_factory.mktemp("models"), family, **FAMILIES[family])
        tiny.shake(built)
        return built

    def make(family: str = QWEN, *, accepts: bool = True, experts: str = "grouped_mm") -> Policy:
        policy = tiny.unsharded(path(family), experts)
        if accepts:
            policy.routers.accept_routes(policy.decoder_layers)
        return policy

    return make


def forward(policy: Policy, routes: Tensor = NOT_KNOWN) -> Tensor:
    ids = torch.randint(4, 30, (NUM,), generator=torch.Generator().manual_seed(1))
    documents = documents_of(LENGTHS)
    scored = torch.tensor([t for t in range(NUM) if t not in documents.ends.tolist()])
    return policy(ids, documents, scored, torch.ones(len(scored)), routes)[0]


def measured(policy: Policy, routes: Tensor = NOT_KNOWN) -> dict[str, Tensor]:
    policy.zero_grad()
    logp = forward(policy, routes)
    logp.sum().backward()
    found = {
        name: parameter.grad.clone() for name, parameter in policy.named_parameters() if parameter.grad is not None
    }
    return {"log-probability": logp.detach(), **found}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def routers_of(policy: Policy) -> list[tuple[int, Any]]:
    layers = enumerate(policy.decoder_layers)
    return [
        (index, module) for index, layer in layers for module in layer.modules() if module in policy.routers.modules
    ]


def recorded(policy: Policy, **more: Any) -> Tensor:
    """[T, L, K] that the routers of this model choose, as an engine records: zeros where a layer has none."""
    found = torch.zeros(NUM, len(policy.decoder_layers), 2, dtype=torch.int16)

    def hear(layer: int, router: nn.Module, inputs: Any, outputs: Any) -> None:
        found[:, layer] = outputs[2]

    hooks = [router.register_forward_hook(partial(hear, layer)) for layer, router in routers_of(policy)]
    with torch.no_grad():
        forward(policy, **more)
    for handle in hooks:
        handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_own_choices_change_nothing_to_the_bit(make, family):
    plain = measured(make(family, accepts=False))
    policy = make(family)
    own = recorded(policy)
    assert equal(measured(policy), plain)
    assert equal(measured(policy, own), plain)
    assert equal(measured(policy, own.flip(-1)), plain), "in another order they are the same"


def drawn(policy: Policy) -> Tensor:
    return policy.routers.replay.drawn(NUM)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_choices_are_used_with_the_weights_of_the_familys_formula(make, family):
    policy = make(family)
    routes, heard = drawn(policy), []
    for layer, router in routers_of(policy):
        router.register_forward_hook(lambda router, inputs, out, layer=layer: heard.append((layer, *out)))
    given = measured(policy, routes)
    assert not torch.equal(given["log-probability"], forward(policy).detach())
    for layer, logits, weights, index in heard[: len(policy.routers)]:
        assert torch.equal(index.sort(-1).values, routes[:, layer].long().sort(-1).values)
        at = logits.detach().gather(1, index)
        if family == QWEN:
            expected = logits.detach().softmax(-1).gather(1, index)
            expected = expected / expected.sum(-1, keepdim=True)
        elif family == "GptOssForCausalLM":
            expected = at.softmax(-1)
        else:
            expected = at.sigmoid() / at.sigmoid().sum(-1, keepdim=True)
            expected = expected * getattr(policy.model.config, "routed_scaling_factor", 1.0)
        assert torch.allclose(weights, expected, atol=1e-6)
    gates = [name for name in given if name.endswith(("gate.weight", "router.weight"))]
    assert len(gates) == len(policy.routers)
    assert all(given[name].abs().max() > 1e-6 for name in gates), "gradients reach the routers"
    check_replay(policy)


def test_a_router_that_returns_its_experts_first_is_understood(make, monkeypatch):
    config = {**tiny.GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(tiny.FAMILIES, "GraniteMoeForCausalLM", config)
    monkeypatch.setitem(FAMILIES, "GraniteMoeForCausalLM", {})
    policy = make("GraniteMoeForCausalLM")
    check_replay(policy)
    routes = drawn(policy)
    assert not torch.equal(measured(policy, routes)["log-probability"], forward(policy).detach())


def by_hand(policy: Policy, routes: Tensor) -> dict[str, Tensor]:
    """Log-probabilities and gradients with each mixture of Qwen3-MoE replaced by its formula, token by token."""

    def mixture(block: Any, layer: int) -> Callable[[Tensor], Tensor]:
        def compute(hidden_1TD: Tensor) -> Tensor:
            rows = []
            for x_D, chosen in zip(hidden_1TD[0], routes[:, layer].tolist(), strict=True):
                score = torch.stack([linear(x_D, block.gate.weight[expert]) for expert in chosen]).exp()
                outputs = []
                for expert in chosen:
                    gate, up = linear(x_D, block.experts.gate_up_proj[expert]).chunk(2)
                    outputs.append(linear(silu(gate) * up, block.experts.down_proj[expert]))
                rows.append(sum(s * out for s, out in zip(score / score.sum(), outputs, strict=True)))
            return torch.stack(rows)[None]

        return compute

    for layer, decoder_layer in enumerate(policy.decoder_layers):
        decoder_layer.mlp.forward = mixture(decoder_layer.mlp, layer)  # type: ignore[union-attr]
    return measured(policy)


def gap(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(float((ours[name] - value).norm() / value.norm()) for name, value in theirs.items())


def test_a_forward_by_hand_has_the_same_log_probabilities_and_gradients(make):
    """In float64, but for what the family computes in float32. Its controls: one token off, and layers swapped."""
    policy = make(experts="batched_mm").double()
    routes = drawn(policy)
    theirs = by_hand(make(accepts=False, experts="batched_mm").double(), routes)
    assert gap(measured(policy, routes), theirs) < 1e-5
    assert gap(measured(policy, routes.roll(1, 0)), theirs) > 1e-2
    assert gap(measured(policy, routes.flip(1)), theirs) > 1e-2


def test_unknown_tokens_are_chosen_for_by_the_router(make):
    policy = make()
    own, routes = recorded(policy), drawn(policy)
    routes[5:] = -1
    mixed = recorded(policy, routes=routes)
    assert torch.equal(mixed[:5].sort(-1).values, routes[:5].sort(-1).values)
    assert torch.equal(mixed[5:, 0], own[5:, 0]), "in the first layer nothing else has changed"


def test_what_was_given_and_what_was_other_is_counted(make, meshes):
    policy = make("Glm4MoeForCausalLM")  # its first layer has no experts, and an engine records zeros
    own = recorded(policy)
    assert not own[:, 0].any()
    routes = own.clone()
    first = policy.routers.replay.routers[0][0]
    routes[:4, first] = (own[:4, first] + 1) % 8  # both experts: another set than before
    routes[20:] = -1
    policy.routers.forget()
    forward(policy, routes).sum().backward()
    other, known, every = policy.routers.replay.counts(dist.group.WORLD)
    assert (known, every) == (20 * 2, NUM * 2)
    assert 4 <= other <= 4 + 20, "and what follows from it in the next layer"
    policy.routers.forget()
    forward(policy, own)
    assert policy.routers.replay.counts(dist.group.WORLD) == (0, NUM * 2, NUM * 2)
    policy.routers.forget()
    forward(policy)
    assert policy.routers.replay.counts(dist.group.WORLD) == (0, 0, NUM * 2)


@pytest.mark.parametrize("way", [Activations("full", offload=True), Activations("selective")], ids=str)
def test_layers_that_are_computed_again_have_the_same_choices(make, way):
    found = []
    for activations in (way, PLAIN):
        policy = make("GptOssForCausalLM")
        keep_activations(policy.decoder_layers, activations, torch.device("cpu"))
        found.append(measured(policy, drawn(policy)))
    assert equal(*found)


def test_an_engine_in_bfloat16_is_nearer_with_its_choices(make, meshes):
    """The same weights: what rounding leaves between both is smaller than what a router makes of it."""
    engine, trainer = make(experts="batched_mm", accepts=False).bfloat16(), make()
    with torch.no_grad():
        for (_, theirs), (_, ours) in zip(routers_of(engine), routers_of(trainer), strict=True):
            ours.weight.copy_(ours.weight[:1] + 0.05 * ours.weight)  # nearly the same: rounding decides
            theirs.weight.copy_(ours.weight)
        routes = recorded(engine)
        engine_logp = forward(engine).float()
        alone, given = forward(trainer), forward(trainer, routes)
        shifted = forward(trainer, routes.roll(1, 0))
    trainer.routers.forget()
    forward(trainer, routes)
    assert trainer.routers.replay.counts(dist.group.WORLD)[0] > 0
    gaps = [float((logp - engine_logp).abs().mean()) for logp in (given, alone, shifted)]
    assert gaps[0] < 0.25 * gaps[1] < 0.25 * gaps[2]


# --- what is refused


def test_another_models_choices(make):
    policy = make()
    with pytest.raises(
        InfrastructureError, match="2 experts in each of 3 layers, but the trainer's model has 2 layers"
    ):
        forward(policy, torch.zeros(NUM, 3, 2, dtype=torch.int16))
    with pytest.raises(InfrastructureError, match=r"recorded 3 experts .* chooses \[2\]"):
        forward(policy, torch.zeros(NUM, 2, 3, dtype=torch.int16))


def test_a_dense_model(tmp_path):
    policy = tiny.unsharded(tiny.build(tmp_path))
    with pytest.raises(UserError, match="experts cannot be given to a model without experts"):
        policy.routers.accept_routes(policy.decoder_layers)


def _sorts(router: Any, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits_TE = linear(hidden_TD, router.weight)
    value_TK, index_TK = (x[:, :2] for x in logits_TE.softmax(-1).sort(-1, descending=True))
    return logits_TE, value_TK, index_TK


def _weighs_its_own(router: Any, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits_TE = linear(hidden_TD, router.weight)
    own_TE = torch.zeros_like(logits_TE).scatter(1, logits_TE.argmax(-1, keepdim=True), 1.0)
    value_TK, index_TK = torch.topk(logits_TE.softmax(-1) * own_TE, 2)
    return logits_TE, value_TK, index_TK


@pytest.mark.parametrize(
    ("how", "why"), [(_sorts, "does not choose experts by one topk"), (_weighs_its_own, "does not weigh experts")]
)
def test_a_router_to_which_nothing_can_be_given(make, how, why):
    policy = make(accepts=False)
    for _, router in routers_of(policy):
        router.forward = lambda hidden, router=router: how(router, hidden)
    policy.routers.accept_routes(policy.decoder_layers)
    with pytest.raises(UserError, match=why):
        check_replay(policy)
