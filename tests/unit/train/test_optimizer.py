import pytest
import torch
from torch import nn

from palestra.config.schema import Train, WarmUp
from palestra.train.optimizer import adamw, training_rate, warmup_rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
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
    optimizer = adamw(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(model.weight): 0.1, id(model.bias): 0.0}
    assert isinstance(optimizer, torch.optim.AdamW)
