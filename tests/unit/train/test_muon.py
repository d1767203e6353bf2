"""Muon on one rank: what a step does to a matrix. tests/dist compares ranks."""

import pytest
import torch
from torch import nn

from palestra.config.schema import Train
from palestra.train.muon import Muon, _deal, _rows_of, newton_schulz
from palestra.train.optimizer import keep_on_host, make_optimizers, set_lr
from tests.unit.model import tiny


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step_of(weight: torch.Tensor, grad: torch.Tensor, lr: float = 1.0, times: int = 1, **group) -> torch.Tensor:
    parameter = nn.Parameter(weight.clone())
    optimizer = Muon([{"params": [parameter], **group}], weight_decay=0.1)
    set_lr([optimizer], lr)
    for number in range(times):
        parameter.grad = grad * (1 + number)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
def test_singular_values_come_near_one(shape):
    """Five steps of the quintic bring all but the smallest into a band around 1 (Jordan: 0.7 to 1.2)."""
    values = torch.linalg.svdvals(newton_schulz(random(*shape), 5))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_it_is_torchs_own_but_for_the_precision():
    weight, grad = random(16, 24).float(), random(16, 24, seed=1).float()
    theirs = nn.Parameter(weight.clone())
    optimizer = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for number in range(3):
        theirs.grad = grad * (1 + number)
        optimizer.step()
    ours = step_of(weight, grad, lr=0.01, times=3)
    moved = (theirs - weight).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # torch orthogonalises in bfloat16
    assert (step_of(weight, grad.T.reshape(16, 24), lr=0.01, times=3) - theirs).norm() > 0.5 * moved  # the control


def test_experts_in_one_parameter_are_as_many_matrices():
    weight, grad = random(3, 8, 5), random(3, 8, 5, seed=1)
    fused = step_of(weight, grad)
    for expert in range(3):
        torch.testing.assert_close(fused[expert], step_of(weight[expert], grad[expert]))


@pytest.mark.parametrize("dim", [-2, -1])
def test_gates_and_ups_that_share_a_parameter_are_two(dim):
    weight, grad = random(3, 8, 6), random(3, 8, 6, seed=1)
    fused = step_of(weight, grad, parts=2, parts_dim=dim)
    apart = [step_of(w, g) for w, g in zip(weight.chunk(2, dim), grad.chunk(2, dim), strict=True)]
    torch.testing.assert_close(fused, torch.cat(apart, dim))
    assert (fused - step_of(weight, grad)).norm() > 0.1 * (fused - weight).norm()  # the control: as one matrix


def test_a_gradient_of_zeros_decays_only():
    weight = random(4, 4)
    torch.testing.assert_close(step_of(weight, torch.zeros_like(weight)), weight * 0.9)


def test_owners_have_equal_work_and_every_matrix_has_one():
    shapes = [(8, 8)] * 6 + [(4, 4)] * 8
    owned = _deal(shapes, 4)
    assert sorted(i for each in owned for i in each) == list(range(14))
    work = [sum(shapes[i][0] ** 3 for i in each) for each in owned]
    assert sorted(work) == [768, 768, 1024, 1024]


@pytest.mark.parametrize(("rows", "num"), [(10, 4), (3, 4), (8, 4), (1, 2)])
def test_rows_are_dealt_as_fsdp_deals_them(rows, num):
    chunks = torch.arange(rows).chunk(num)
    expected = [len(chunk) for chunk in chunks] + [0] * (num - len(chunks))
    assert [_rows_of(rank, rows, num) for rank in range(num)] == expected


def test_which_parameters_are_matrices(tmp_path):
    path = str(tiny.build(tmp_path, "Glm4MoeForCausalLM"))
    policy = tiny.unsharded(path)
    muon, adamw = make_optimizers(policy, Train(optimizer="muon"))
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    matrices = {names[id(p)]: group["parts"] for group in muon.param_groups for p in group["params"]}
    others = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert matrices.keys() | others == set(names.values())
    assert not matrices.keys() & others
    assert {name for name in others if "norm" not in name} == {
        "model.model.embed_tokens.weight",
        "model.lm_head.weight",
    }
    assert {name for name, parts in matrices.items() if parts == 2} == {
        f"model.model.layers.{layer}.mlp.experts.gate_up_proj" for layer in (1, 2)
    }


def test_state_on_the_host_is_the_same_state():
    """On a CPU nothing moves; that it is fetched before and put away after each step is what there is to see."""
    results = []
    for offload in (False, True):
        parameter = nn.Parameter(random(4, 3).float())
        optimizer = torch.optim.AdamW([parameter], lr=0.1)
        if offload:
            keep_on_host(optimizer)
        for number in range(3):
            parameter.grad = random(4, 3, seed=number).float()
            optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)
