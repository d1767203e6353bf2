"""`train.float8` of a model that is sharded: two ranks round as one process does. Emulated."""

from pathlib import Path

import pytest
import torch

from tests.dist.float8_worker import WAYS, gradients_in_float8
from tests.dist.processes import run
from tests.dist.test_layouts import worst
from tests.one_rank import ranks_of_one
from tests.unit.model import tiny

FAMILIES = ("Qwen3ForCausalLM", "Glm4MoeForCausalLM")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tiny.build(directory, family)
    return directory


@pytest.fixture(scope="module")
def found(models, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("float8")
    run("float8_worker", models, out, timeout_s=900, num_ranks=2)
    return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_round_as_one(models, found, family, way):
    """A shard is gathered before it is rounded, by rows that are whole then: packs have the gradients that they have on
    one rank, to the last bit, and are summed in float32. Control: without float8 every one of them is another."""
    ours = torch.load(found / f"{family}-{way}.pt")
    alone, exact = (
        gradients_in_float8(models / family, way, ranks_of_one().meshes, is_rounded=is_rounded)
        for is_rounded in (True, False)
    )
    assert worst(ours, alone)[0] < 1e-6
    assert min(float((ours[name] - value).norm() / value.norm()) for name, value in exact.items()) > 1e-2
