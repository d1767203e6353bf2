"""Saved on one layout, resumed on another: the next step is the same, biases of routers included."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from palestra.wire.weights.files import ADAPTER_TENSORS
from tests.dist.processes import run
from tests.dist.test_layouts import worst
from tests.unit.model import tiny

TOLERANCE = 1e-4  # of float32, where sums are taken in another order
BIAS = "e_score_correction_bias"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Path:
    """By the layout that saved: what it went on to without a break, and where others came to from its checkpoint."""
    model = tiny.build(tmp_path_factory.mktemp("models"), "Glm4MoeForCausalLM")
    out = tmp_path_factory.mktemp("checkpoints")
    run("checkpoints_worker", model, out, timeout_s=900, num_ranks=4)
    return out


def read(found: Path, saver: str, name: str) -> dict[str, Tensor]:
    return torch.load(found / saver / f"{name}.pt")


@pytest.mark.parametrize("layout", ["fsdp4", "ep2-ring2-fsdp2", "tp2-fsdp2"])
def test_on_the_same_layout_the_next_step_is_the_same_to_the_bit(found, layout):
    straight, resumed = read(found, layout, "straight-3"), read(found, layout, f"{layout}-3")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], weight) for name, weight in straight.items())


@pytest.mark.parametrize(
    ("saver", "reader", "version"),
    [
        ("fsdp4", "fsdp2", 3),
        ("fsdp4", "fsdp2-1", 4),  # four ranks, then two, then one
        ("replicate2-shard2", "fsdp2", 3),
        ("ep2-ring2-fsdp2", "1", 3),
        ("tp2-fsdp2", "1", 3),
        ("adapted", "tp2-fsdp2", 3),
        ("adapted", "1", 3),
    ],
)
def test_on_another_layout_the_next_step_is_the_same(found, saver, reader, version):
    straight = read(found, saver, f"straight-{version}")
    gap, name = worst(read(found, saver, f"{reader}-{version}"), straight)
    assert gap < TOLERANCE, name
    biases = [value for name, value in straight.items() if name.endswith(BIAS)]
    assert len(biases) == 2
    assert all(bias.any() == (saver != "adapted") for bias in biases)


def test_an_adapter_is_published_whole_from_wherever_it_lies(found):
    noted = read(found, "adapted", "straight-4")
    staged = load_file(found / "adapted/staged/v000004" / ADAPTER_TENSORS)
    assert staged.keys() == {name for name in noted if "lora_" in name}
    assert all(torch.equal(staged[name], noted[name]) for name in staged)
    assert all(tensor.any() for tensor in staged.values())
    saved = FileSystemReader(found / "adapted/run/checkpoints/000002/trainer").read_metadata().state_dict_metadata
    kept = [name for name in saved if name.startswith("policy.")]
    assert any("experts" in name for name in kept)
    assert all("lora_" in name or name.endswith(BIAS) for name in kept)  # no frozen weight is in it


def test_what_leaves_a_tensor_axis_is_what_leaves_any_layout(found):
    """As it is published, and exported: in a checkpoint's layout."""
    gap, name = worst(read(found, "tp2-fsdp2", "straight-3"), read(found, "fsdp4", "straight-3"))
    assert gap < TOLERANCE, name


def test_biases_that_were_not_in_the_checkpoint_would_be_seen(found):
    """The negative control."""
    gap, _ = worst(read(found, "fsdp4", "forgetful-3"), read(found, "fsdp4", "straight-3"))
    assert gap > 10 * TOLERANCE
