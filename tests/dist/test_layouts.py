"""Every layout computes what one process computes: log-probabilities, gradients, and the weights after three steps."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist.layouts import (
    ADAPTED,
    DTYPES,
    FAMILIES,
    FAULTS,
    LAYOUTS,
    Layout,
    faults_of,
    is_split,
    kind_of,
    make_policy,
    measure,
)
from tests.dist.processes import run
from tests.one_rank import ranks_of_one
from tests.unit.model import tiny

TOLERANCE = {"float64": 1e-8, "float32": 1e-4, ADAPTED: 1e-8}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3700)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tiny.shake(tiny.build(directory, family))
    return directory


@pytest.fixture(scope="module")
def found(models, tmp_path_factory) -> Path:
    """What the first of four ranks found, a file for each family, layout and precision."""
    out = tmp_path_factory.mktemp("layouts")
    run("layouts_worker", models, out, timeout_s=3600, num_ranks=4)
    return out


@pytest.fixture(scope="module")
def alone(models):
    """What this process finds, with nothing sharded."""
    ranks = ranks_of_one()

    @cache
    def found(family: str, kind: str, optimizer: str, is_given: bool = True) -> dict[str, Any]:
        policy = make_policy(models / family, DTYPES[kind], None, adapted=kind == ADAPTED, is_given=is_given)
        return measure(policy, None, ranks, optimizer)

    return found


def cases() -> list[Any]:
    return [
        pytest.param(family, layout, kind, id=f"{family}-{layout.name}-{kind}")
        for family in FAMILIES
        for layout in LAYOUTS
        for kind in layout.kinds(family)
    ]


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of a tensor over its norm, and which one it is of."""
    assert ours.keys() == theirs.keys()
    gaps = [
        (float((ours[name] - value).norm() / value.norm().clamp_min(1e-12)), name) for name, value in theirs.items()
    ]
    return max(gaps)


@pytest.mark.parametrize(("family", "layout", "kind"), cases())
def test_a_layout_equals_one_process(family, layout: Layout, kind, alone, found, record_layout):
    reference = alone(family, kind, layout.optimizer, layout.is_given)
    ours = torch.load(found / f"{family}-{layout.name}-{kind}.pt")
    assert (ours["graphs"] > 0) is layout.activations.compile
    assert bool(ours["fallbacks"]) is not layout.is_known
    gaps = {
        "gradient": worst(ours["gradients"], reference["gradients"]),
        "weight": worst(ours["weights"], reference["weights"]),
        "loss": worst(
            *({"loss": torch.tensor([m[LOSS] for m in f["metrics"]], dtype=torch.float64)} for f in (ours, reference))
        ),
    }
    for ours_of_step, theirs in zip(ours["metrics"], reference["metrics"], strict=True):
        experts = {name: value for name, value in theirs.items() if name.startswith("train/experts/")}
        assert bool(experts) == is_split(family)
        assert {name: ours_of_step[name] for name in experts} == pytest.approx(experts, rel=1e-4, abs=1e-9)
    record_layout(family, layout.name, kind, {what: gap for what, (gap, _) in gaps.items()})
    for what, (gap, name) in gaps.items():
        assert gap <= TOLERANCE[kind], f"{what} of {name} differs by {gap:.2e}"


LOSS = "train/rl/loss"
NORM, EXPERTS = "model.norm.weight", "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("family", "layout", "lies", "lies_not"),
    [
        (
            "Qwen3ForCausalLM",
            "replicate2-shard2",
            "model.layers.1.self_attn.q_proj.weight",
            "model.embed_tokens.weight",
        ),
        ("Glm4MoeForCausalLM", "ep4", NORM, "model.layers.1.mlp.experts.0.up_proj.weight"),
        ("Glm4MoeForCausalLM", "tp2-fsdp2", NORM, "model.layers.1.self_attn.q_proj.weight"),
        ("GptOssForCausalLM", "ep4", EXPERTS, "model.embed_tokens.weight"),
        ("GptOssForCausalLM", "ep2-ring2-fsdp2", NORM, EXPERTS),
    ],
)
def test_a_rank_can_send_what_it_holds_of_a_checkpoint(family, layout, lies, lies_not, found):
    """In every layout of four ranks: they have compared it (`layouts.in_parts`)."""
    names = torch.load(found / f"{family}-{layout}-float64.pt")["in_parts"]
    assert lies in names
    assert lies_not not in names


@pytest.mark.parametrize(("family", "fault"), [(family, fault) for family in FAMILIES for fault in faults_of(family)])
def test_a_planted_fault_is_seen(family, fault, alone, found):
    ours = torch.load(found / f"{family}-{fault}.pt")
    where, what = FAULTS[fault]
    layout = next(layout for layout in LAYOUTS if layout.name == where)
    assert worst(ours[what], alone(family, kind_of(fault), layout.optimizer)[what])[0] > 1e-3
