"""Laws of Muon on one rank: what is orthogonal, what is a matrix, and that it is torch's where torch has one."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from palestra.model import attention  # noqa: F401  registers the attention that the models name
from palestra.train.muon import Stored, matrices_of, orthogonalize
from palestra.train.optimizer import Optimizer, set_lr
from tests.unit.model import tiny

SETTINGS = {"algorithm": "muon", "momentum": 0.9, "nesterov": True, "ns_steps": 5, "lr_ratio": 1.0}


def _muon(stored: dict[nn.Parameter, Stored], dtype: torch.dtype | None = None, **settings) -> Optimizer:
    group = {"params": list(stored), "scale": "match_adamw", "weight_decay": 0.0, **SETTINGS, **settings}
    optimizer = Optimizer([group], matrices=stored, muon_dtype=dtype)
    set_lr(optimizer, 0.1)
    return optimizer


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _step(optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in range(steps):
        for index, parameter in enumerate(parameters):
            parameter.grad = _random(*parameter.shape, seed=100 * step + index, dtype=parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("shape", [(3, 20, 20), (2, 8, 30), (2, 30, 8), (1, 2, 2)])
def test_singular_values_are_near_one_and_vectors_are_kept(shape):
    matrices = _random(*shape)
    orthogonal = orthogonalize(matrices, steps=5)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    found = left.mT @ orthogonal @ right.mT
    large = values / values.norm(dim=-1, keepdim=True) > 0.01  # tiny ones are still on their way up
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    assert (diagonal[large] > 0.65).all()
    assert (diagonal < 1.25).all()
    torch.testing.assert_close(found, torch.diag_embed(diagonal), atol=1e-9, rtol=0)


def test_fewer_steps_would_be_seen():
    """The negative control of the law above."""
    values = torch.linalg.svdvals(orthogonalize(_random(1, 20, 20), steps=1))
    assert values.min() < 0.3


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonalize(torch.zeros(1, 3, 4), steps=5), torch.zeros(1, 3, 4))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("scale", "name"), [("match_adamw", "match_rms_adamw"), ("spectral", "original")])
def test_it_is_torchs_muon(nesterov, scale, name):
    """torch's works in bfloat16 everywhere; so does ours here."""
    shapes = [(6, 6), (12, 5), (5, 12)]
    ours = [nn.Parameter(_random(*shape, seed=7, dtype=torch.float32)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    options = {"nesterov": nesterov, "weight_decay": 0.1}
    _step(_muon(dict.fromkeys(ours, Stored()), torch.bfloat16, scale=scale, **options))
    _step(torch.optim.Muon(theirs, lr=0.1, momentum=0.9, ns_steps=5, adjust_lr_fn=name, **options))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)  # one unit of bfloat16 in the update
    other_rule = [nn.Parameter(_random(*shape, seed=7, dtype=torch.float32)) for shape in shapes]
    wrong = "spectral" if scale == "match_adamw" else "match_adamw"
    _step(_muon(dict.fromkeys(other_rule, Stored()), torch.bfloat16, scale=wrong, **options))
    assert not any(torch.allclose(one, other, atol=2e-3) for one, other in zip(other_rule, theirs, strict=True))


def test_an_update_is_as_large_as_one_of_adamw():
    weight = nn.Parameter(torch.zeros(64, 48, dtype=torch.float64))
    _step(_muon({weight: Stored()}), steps=1)
    assert float(weight.detach().square().mean().sqrt() / 0.1) == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scale", ["match_adamw", "spectral"])
def test_fused_experts_step_as_unfused_ones(interleaved, transposed, scale):
    """Gate and up of two experts in one parameter, or in four: the same weights."""
    stored = Stored(num=2, interleaved=interleaved, transposed=transposed)

    def fuse(gate_up: torch.Tensor) -> torch.Tensor:
        """[E, 2, I, D] to what a model of that kind has."""
        order = gate_up.transpose(1, 2) if interleaved else gate_up
        flat = order.reshape(gate_up.shape[0], -1, gate_up.shape[-1])
        return (flat.mT if transposed else flat).clone(memory_format=torch.contiguous_format)

    whole = _random(2, 2, 10, 4)
    fused = nn.Parameter(fuse(whole))
    apart = {(e, part): nn.Parameter(whole[e, part].clone()) for e in range(2) for part in range(2)}
    ours = _muon({fused: stored}, weight_decay=0.1, scale=scale)
    theirs = _muon(dict.fromkeys(apart.values(), Stored()), weight_decay=0.1, scale=scale)
    together = nn.Parameter(fuse(whole))
    as_one = _muon({together: Stored(transposed=transposed)}, weight_decay=0.1, scale=scale)
    for step in range(3):
        gradient = _random(2, 2, 10, 4, seed=step + 1)
        fused.grad = together.grad = fuse(gradient)
        for (e, part), parameter in apart.items():
            parameter.grad = gradient[e, part].clone()
        for optimizer in (ours, theirs, as_one):
            optimizer.step()
    expected = fuse(torch.stack([torch.stack([apart[e, part].detach() for part in range(2)]) for e in range(2)]))
    torch.testing.assert_close(fused.detach(), expected, atol=1e-12, rtol=1e-12)
    assert not torch.allclose(together.detach(), expected, atol=1e-3)  # the control: gate and up as one matrix


def test_matrices_of_one_shape_and_two_scales_step_as_each_alone():
    """What is stepped at once shares a scale: [8, 4] as it lies is twice as tall as wide, transposed it is not."""
    stored = [Stored(), Stored(transposed=True), Stored()]
    together = [nn.Parameter(_random(8, 4, seed=seed)) for seed in range(3)]
    apart = [nn.Parameter(parameter.detach().clone()) for parameter in together]
    options = {"scale": "spectral", "weight_decay": 0.1}
    ours = _muon(dict(zip(together, stored, strict=True)), **options)
    others = [_muon({parameter: how}, **options) for parameter, how in zip(apart, stored, strict=True)]
    for index, (parameter, other) in enumerate(zip(together, apart, strict=True)):
        parameter.grad = _random(8, 4, seed=9 + index)
        other.grad = parameter.grad.clone()
    for optimizer in (ours, *others):
        optimizer.step()
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(together, apart, strict=True))
    wrong = nn.Parameter(_random(8, 4, seed=1))
    wrong.grad = together[1].grad
    _muon({wrong: Stored()}, **options).step()
    assert not torch.allclose(wrong, together[1], atol=1e-3)  # the control: the other scale


def _names(architecture: str, tmp_path) -> dict[str, Stored]:
    model = AutoModelForCausalLM.from_pretrained(tiny.build(tmp_path, architecture))
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: stored for parameter, stored in matrices_of(model.model.layers).items()}


def test_what_is_a_matrix_in_glm(tmp_path):
    found = _names("Glm4MoeForCausalLM", tmp_path)
    last = {name.removeprefix("model.layers.2."): how for name, how in found.items() if ".layers.2." in name}
    experts = "mlp.experts."
    assert last.pop(f"{experts}gate_up_proj") == Stored(num=2)
    assert last.pop(f"{experts}down_proj") == Stored()
    attention_names = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    shared = {f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert last.keys() == attention_names | shared | {"mlp.gate.weight"}
    assert set(last.values()) == {Stored()}
    assert not any(word in name for name in found for word in ("embed", "lm_head", "norm"))


def test_what_is_a_matrix_in_gpt_oss(tmp_path):
    """Experts are transposed and take turns; their biases have two dimensions and are none."""
    found = _names("GptOssForCausalLM", tmp_path)
    assert found["model.layers.0.mlp.experts.gate_up_proj"] == Stored(num=2, interleaved=True, transposed=True)
    assert found["model.layers.0.mlp.experts.down_proj"] == Stored(transposed=True)
    assert "model.layers.0.mlp.router.weight" in found
    assert not any(name.endswith("bias") or "sinks" in name for name in found)


def test_embeddings_convolutions_frozen_weights_and_single_rows_are_none():
    layer = nn.ModuleDict(
        {
            "a": nn.Embedding(4, 4),
            "b": nn.Conv1d(4, 4, 3),
            "c": nn.Linear(4, 1),
            "d": nn.Linear(4, 4),
            "e": nn.Linear(4, 4),
        }
    )
    layer["e"].requires_grad_(False)
    assert list(matrices_of([layer])) == [layer["d"].weight]


def test_scales():
    """By hand: 0.2 sqrt(16) = 0.8; sqrt(16 / 4) = 2; never less than 1."""
    pair = Stored(num=2)
    assert pair.scale((3, 32, 4), "match_adamw") == pytest.approx(0.8)
    assert pair.scale((3, 32, 4), "spectral") == pytest.approx(2.0)
    assert Stored(num=2, transposed=True).scale((3, 4, 32), "spectral") == pytest.approx(2.0)
    assert Stored().scale((4, 16), "spectral") == 1.0
