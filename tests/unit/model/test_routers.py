"""Which experts routers choose, counted by hand; and that the biases even them out."""

import pytest
import torch
import torch.distributed as dist

from palestra.core.errors import UserError
from palestra.model.documents import documents_of
from palestra.model.policy import Policy, check_against_own_forward, check_replay
from palestra.model.routers import Routers, max_violation
from tests.unit.model import tiny

MIXTURES = [name for name in tiny.FAMILIES if "Moe" in name or name.startswith(("GptOss", "Deepseek", "MiniMax"))]
LENGTHS = [12, 3, 30, 7]


def forward(policy: Policy, seed: int = 0) -> None:
    ids = torch.randint(4, 30, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        policy(ids, documents_of(LENGTHS), torch.tensor([1]), torch.ones(1))


@pytest.fixture
def group(meshes):
    return dist.group.WORLD


def test_violation_by_hand():
    assert max_violation(torch.tensor([[4.0, 0, 0, 0], [1, 1, 1, 1], [1, 2, 3, 2]])).tolist() == [3.0, 0.0, 0.5]


@pytest.mark.parametrize("family", MIXTURES)
def test_every_choice_of_every_layer_is_counted_once(tmp_path, group, family):
    policy = tiny.unsharded(tiny.build(tmp_path, family))
    forward(policy)
    forward(policy, seed=1)
    num_layers, chosen = len(policy.routers), policy.model.config.num_experts_per_tok
    load_LE = policy.routers.load(group)
    assert load_LE.shape == (num_layers, 4)
    assert load_LE.sum(1).tolist() == [2 * sum(LENGTHS) * chosen] * num_layers
    total, count = policy.routers.weight_entropy(group)
    assert count == 2 * sum(LENGTHS) * num_layers
    assert 0 < total / count <= torch.tensor(chosen).log()
    policy.routers.forget()
    forward(policy)
    assert policy.routers.load(group).sum() == load_LE.sum() / 2


def test_a_router_with_its_logits_at_the_end_is_understood(tmp_path, group, monkeypatch):
    """Families do not agree on what comes first; transformers says where the logits are."""
    config = {**tiny.GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(tiny.FAMILIES, "GraniteMoeForCausalLM", config)
    policy = tiny.unsharded(tiny.build(tmp_path, "GraniteMoeForCausalLM"))
    policy.routers.forget(for_loss=True)
    forward(policy)
    for (logits, weights, index), load in zip(policy.routers._heard, policy.routers.load(group), strict=True):
        best = logits.topk(2)
        assert (index.sort().values == best.indices.sort().values).all()
        assert torch.allclose(weights, best.values.softmax(-1).to(weights))
        assert load.tolist() == index.flatten().bincount(minlength=4).tolist()


@pytest.mark.parametrize(
    "returned",
    [
        pytest.param(lambda logits, weights, index: logits, id="logits alone"),
        pytest.param(lambda logits, weights, index: (logits, weights), id="no experts"),
        pytest.param(lambda logits, weights, index: (logits, weights, None), id="None"),
        pytest.param(lambda logits, weights, index: (logits, weights, weights.clone()), id="three of floats"),
        pytest.param(lambda logits, weights, index: (logits[None], weights, index), id="a batch"),
    ],
)
def test_routers_that_return_something_else_are_said_once_and_not_heard(tmp_path, returned):
    """As of a family to come. All else is as it was."""
    path = tiny.build(tmp_path, "Glm4MoeForCausalLM")
    heard, unheard = tiny.unsharded(path), tiny.unsharded(path)
    in_order = unheard.routers.in_order
    unheard.routers.in_order = lambda outputs: in_order(returned(*outputs))  # type: ignore[method-assign]
    unheard.routers.forget(for_loss=True)
    check_against_own_forward(unheard)
    forward(unheard)
    (said,) = unheard.routers.not_heard
    assert "no metrics of routers" in said
    assert "TopkRouter does not return logits [T, E], weights [T, K] and chosen experts" in said
    assert len(unheard.routers) == 0
    assert unheard.routers.biases == []
    with pytest.raises(UserError, match=r"train\.router_replay: there are no metrics .*; set it to false"):
        check_replay(unheard)
    forward(heard)
    assert len(heard.routers) == 2
    assert heard.routers.not_heard == ()


def test_loading_says_what_is_not_heard(tmp_path, load, monkeypatch):
    """Among what does not hold for a family."""
    path, in_order = tiny.build(tmp_path, "Glm4MoeForCausalLM"), Routers.in_order
    assert load(path).fallbacks == ()
    monkeypatch.setattr(Routers, "in_order", lambda routers, outputs: in_order(routers, outputs[:2]))
    policy = load(path)
    assert policy.fallbacks == policy.routers.not_heard
    assert len(policy.fallbacks) == 1


def test_a_bias_that_is_a_parameter_is_not_ours_to_move(tmp_path):
    """The optimizer's, and sharded as all parameters are."""
    policy = tiny.unsharded(tiny.build(tmp_path, "Glm4MoeForCausalLM"))
    assert len(policy.routers.biases) == 2
    for layer in policy.decoder_layers[1:]:
        for module in layer.modules():
            if "e_score_correction_bias" in dict(module.named_buffers(recurse=False)):
                bias = module.e_score_correction_bias
                del module.e_score_correction_bias
                module.e_score_correction_bias = torch.nn.Parameter(bias, requires_grad=False)
    assert Routers(policy.model).biases == []


def test_a_dense_model_has_none(tmp_path):
    assert len(tiny.unsharded(tiny.build(tmp_path)).routers) == 0


def test_the_loss_is_one_for_each_token_if_all_are_used_alike(tmp_path):
    """With logits of zeros every expert has probability 1/4, whatever is chosen; with one expert in front of all, its
    share is 1/2 (the other choice is another) and its probability 1: 4 x 1/2."""
    policy = tiny.unsharded(tiny.build(tmp_path, "Qwen3MoeForCausalLM"))
    for name, parameter in policy.model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data.zero_()
    policy.routers.forget(for_loss=True)
    forward(policy)
    assert float(policy.routers.balance_loss()) / sum(LENGTHS) == pytest.approx(1.0)
    logits, weights, _ = policy.routers._heard[0]
    sure = torch.full_like(logits, -50.0)
    sure[:, 2] = 50.0
    policy.routers._heard = [(sure, weights, sure.topk(2).indices)]
    assert float(policy.routers.balance_loss()) / sum(LENGTHS) == pytest.approx(2.0)


@pytest.mark.parametrize("family", ["Glm4MoeForCausalLM", "DeepseekV3ForCausalLM", "MiniMaxM2ForCausalLM"])
def test_biases_even_the_load_out(tmp_path, group, family):
    policy = tiny.unsharded(tiny.build(tmp_path, family))
    assert policy.routers.biases
    for bias in policy.routers.biases:
        bias += torch.tensor([0.5, 0.0, 0.0, -0.5])
    violations = []
    for _ in range(40):
        policy.routers.forget()
        forward(policy)
        load_LE = policy.routers.load(group)
        violations.append(float(max_violation(load_LE).mean()))
        policy.routers.update_biases(load_LE, 0.02)
    assert violations[0] > 0.7  # of 1, where one expert is chosen for every token
    assert min(violations[-5:]) < 0.5 * violations[0]
    names = [name for name, _ in policy.model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert len(names) == len(policy.routers)
    assert all(name in policy.model.state_dict() for name in names)  # published and saved with the weights
