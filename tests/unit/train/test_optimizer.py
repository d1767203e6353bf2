import pytest
import torch
from torch import nn

from palestra.config.schema import Train, WarmUp
from palestra.train.optimizer import make_optimizer, set_lr, training_rate, warmup_rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.85355339, 0.5, 0.14644661]),
        ("wsd", [1 / 3, 2 / 3, 1, 1, 1, 0.5]),
    ],
)
def test_the_rate_of_every_step(schedule, expected):
    rate = training_rate(Train(steps=6, lr=2.0, schedule=schedule, lr_warmup_steps=2, lr_decay_steps=2))
    assert [rate.at(step) / 2 for step in range(6)] == pytest.approx(expected)


def test_a_short_warm_up_phase_still_has_a_rate():
    assert warmup_rate(WarmUp(steps=3, lr=1.0, lr_warmup_steps=10)).at(0) == 0.25


def test_decay_pulls_on_matrices_only():
    model = nn.Linear(2, 3)
    optimizer = make_optimizer(model, [], Train(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(model.weight): 0.1, id(model.bias): 0.0}


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[torch.Tensor]:
    inputs = torch.randn(11, 5, generator=torch.Generator().manual_seed(1))
    for step in range(steps):
        set_lr(optimizer, 0.01 * (step + 1))
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("offload", [False, True])
def test_adamw_is_that_of_torch_to_the_bit(offload, monkeypatch):
    monkeypatch.setattr("palestra.train.moments.BUCKET_BYTES", 100)  # several buckets
    ours, theirs = _model(), _model()
    optimizer = make_optimizer(ours, [], Train(weight_decay=0.1, offload_optimizer=offload))
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    for one, other in zip(_train(ours, optimizer), _train(theirs, reference), strict=True):
        assert torch.equal(one, other)


def test_muon_with_moments_in_host_memory_is_the_same_to_the_bit():
    plain, offloaded = _model(), _model()
    one = _train(plain, make_optimizer(plain, [plain], Train(optimizer="muon")))
    other = _train(offloaded, make_optimizer(offloaded, [offloaded], Train(optimizer="muon", offload_optimizer=True)))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


def test_moments_that_are_not_brought_home_would_be_seen(monkeypatch):
    """The negative control of the tests to the bit: the copies are what is stepped."""
    plain, offloaded = _model(), _model()
    one = _train(plain, make_optimizer(plain, [plain], Train(optimizer="muon")))
    optimizer = make_optimizer(offloaded, [offloaded], Train(optimizer="muon", offload_optimizer=True))
    for state in optimizer.state.values():
        state.update({name: _Forgetful(moment) for name, moment in state.items() if name != "step"})
    other = _train(offloaded, optimizer)
    assert not any(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


class _Forgetful(torch.Tensor):
    def copy_(self, *args, **kwargs):
        return self


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_state_dict_goes_into_the_moments_that_are_there(optimizer):
    first, second = _model(), _model()
    trained = make_optimizer(first, [first], Train(optimizer=optimizer, weight_decay=0.1))
    _train(first, trained)
    second.load_state_dict(first.state_dict())
    fresh = make_optimizer(second, [second], Train(optimizer=optimizer))
    moments = [id(moment) for state in fresh.state.values() for moment in state.values()]
    fresh.load_state_dict(trained.state_dict())
    assert [id(moment) for state in fresh.state.values() for moment in state.values()] == moments
    assert [group["weight_decay"] for group in fresh.param_groups] == [
        group["weight_decay"] for group in trained.param_groups
    ]
    for one, other in zip(_train(first, trained), _train(second, fresh), strict=True):
        assert torch.equal(one, other)


def test_a_parameter_without_a_gradient_stays_as_it_is():
    model = _model()
    optimizer = make_optimizer(model, [model], Train(optimizer="muon", weight_decay=0.1))
    set_lr(optimizer, 0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


def test_the_ratio_scales_the_rate_of_matrices_only():
    once, twice, plain = _model(), _model(), _model()
    settings = {"optimizer": "muon", "muon": {"scale": "spectral"}}
    start = [parameter.detach().clone() for parameter in plain.parameters()]
    one = _train(once, make_optimizer(once, [once], Train.model_validate(settings)), steps=1)
    settings["muon"] = {"scale": "spectral", "lr_ratio": 2.0}
    two = _train(twice, make_optimizer(twice, [twice], Train.model_validate(settings)), steps=1)
    for before, single, double in zip(start, one, two, strict=True):
        factor = 2 if before.dim() > 1 else 1
        torch.testing.assert_close(double - before, factor * (single - before), atol=1e-6, rtol=1e-4)
