"""Several ranks are one rank: gradients, metrics and trained weights on every mesh, and checkpoints across them."""

from pathlib import Path

import pytest
import torch

from palestra.train.ranks import Ranks
from tests.dist.processes import run
from tests.dist.steps_worker import ADAPTED, SAVED_AT, measure
from tests.one_rank import ranks_of_one
from tests.unit.model import tiny

FAMILIES = ("Qwen3ForCausalLM", "Glm4MoeForCausalLM")
ARCHITECTURES = (*FAMILIES, f"Glm4MoeForCausalLM{ADAPTED}")
MESHES = ("1x2", "2x1")  # replicate x shard
TIMES = ("train/step_s", "train/tokens_per_s")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for architecture in FAMILIES:
        tiny.build(directory, architecture)
    (directory / f"Glm4MoeForCausalLM{ADAPTED}").symlink_to(directory / "Glm4MoeForCausalLM")
    return directory


@pytest.fixture(scope="module")
def two_ranks(models, tmp_path_factory) -> Path:
    """Where one run of torchrun left what it found for every model and mesh, and its checkpoints."""
    out = tmp_path_factory.mktemp("two")
    run("steps_worker", models, out, timeout_s=900, num_ranks=2)
    return out


@pytest.fixture(scope="module")
def one_rank() -> Ranks:
    return ranks_of_one()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def alone(architecture, models, one_rank, tmp_path_factory) -> dict:
    return measure(models / architecture, tmp_path_factory.mktemp("one"), one_rank)


@pytest.mark.parametrize("mesh", MESHES)
def test_two_ranks_equal_one(architecture, mesh, alone, two_ranks):
    two = torch.load(two_ranks / f"{architecture}-{mesh}.pt")["straight"]
    assert two["gradients"].keys() == alone["gradients"].keys()
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(two["gradients"][name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    for ours, theirs in zip(two["metrics"], alone["metrics"], strict=True):
        for name in theirs.keys() - TIMES:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, atol=2e-4, rtol=1e-3, msg=name)


def test_a_gradient_divided_by_the_number_of_ranks_would_be_seen(architecture, alone, two_ranks):
    """The negative control: an average over ranks where a sum belongs."""
    halved = {name: gradient / 2 for name, gradient in alone["gradients"].items()}
    two = torch.load(two_ranks / f"{architecture}-1x2.pt")["straight"]["gradients"]
    assert not any(
        torch.allclose(two[name], halved[name], atol=1e-6, rtol=1e-4) for name in halved if halved[name].any()
    )


@pytest.mark.parametrize("mesh", MESHES)
def test_resumed_equals_uninterrupted_to_the_bit(architecture, mesh, two_ranks):
    found = torch.load(two_ranks / f"{architecture}-{mesh}.pt")
    assert found["resumed"]["weights"].keys() == found["straight"]["weights"].keys()
    for name, weight in found["straight"]["weights"].items():
        assert torch.equal(found["resumed"]["weights"][name], weight), name


def test_a_checkpoint_of_two_ranks_is_continued_by_one(architecture, models, one_rank, two_ranks):
    resumed = measure(models / architecture, two_ranks / f"{architecture}-1x2", one_rank, resume_from=SAVED_AT)
    straight = torch.load(two_ranks / f"{architecture}-1x2.pt")["straight"]
    for name, weight in straight["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], weight, atol=2e-4, rtol=1e-3, msg=name)


SENT = [
    (family, mesh)
    for family in FAMILIES
    for mesh in ("1x2", "2x1", "ep2", "tensor2")
    if mesh != "ep2" or family == "Glm4MoeForCausalLM"
]


@pytest.mark.parametrize(("family", "mesh"), SENT)
def test_what_several_ranks_send_is_what_they_have(family, mesh, two_ranks):
    """One tensor after the other; and a send that fails on the first rank leaves the others in step with it."""
    found = torch.load(two_ranks / f"{family}-{mesh}-sent.pt", weights_only=False)["whole"]
    assert found["received"].keys() == found["expected"].keys()
    assert all(torch.equal(found["received"][name], tensor) for name, tensor in found["expected"].items())
    assert found["bytes"].sent_bytes == sum(tensor.nbytes for tensor in found["expected"].values())
    (first, again), *others = found["errors"]
    assert ("nobody came" in first, again, others) == (True, "", [("", "")])
    assert max(found["most"]) <= 4, "of all that a rank is handed, no more is there at once than the experts of a layer"


@pytest.mark.parametrize(("family", "mesh"), SENT)
def test_changes_that_several_ranks_find_make_what_was_into_what_is(family, mesh, two_ranks):
    """Each keeps about half of what was."""
    found = torch.load(two_ranks / f"{family}-{mesh}-sent.pt", weights_only=False)["changes"]
    assert all(torch.equal(found["patched"][name], tensor) for name, tensor in found["expected"].items())
    assert (found["offer"].base, 0 < found["offer"].sent_bytes < 0.2 * found["offer"].full_bytes) == ("1.0.1", True)
    assert sum(found["kept"]) == found["offer"].full_bytes
    assert max(found["kept"]) < 0.6 * found["offer"].full_bytes


@pytest.mark.parametrize(("family", "mesh"), SENT)
def test_what_several_ranks_send_from_where_it_lies_is_what_they_have(family, mesh, two_ranks):
    """Parts where they are a checkpoint's, in an even number of rows: not the vocabulary of 31, nor experts that have
    names of their own."""
    found = torch.load(two_ranks / f"{family}-{mesh}-sent.pt", weights_only=False)["shards"]
    assert found["received"].keys() == found["expected"].keys()
    assert all(torch.equal(found["received"][name], tensor) for name, tensor in found["expected"].items())
    sizes = {name: tensor.nbytes for name, tensor in found["expected"].items()}
    odd = {name for name in sizes if "embed" in name or "lm_head" in name} if mesh != "2x1" else set()
    buffers = {name for name in sizes if name.endswith("e_score_correction_bias")}
    gathered = odd | buffers | {name for name in sizes if ".experts." in name}
    if mesh != "tensor2":
        assert found["in_parts"] == sizes.keys() - gathered
        assert found["loaded"][0] == {
            name for name in sizes if not name.endswith(("o_proj.weight", "down_proj.weight"))
        } | {name for name in sizes if ".experts." in name}
    assert found["offer"].shard_bytes == sum(sizes[name] for name in found["in_parts"])
    assert found["offer"].full_bytes == found["offer"].sent_bytes == sum(sizes.values())
    parts = 1 if mesh == "2x1" else 2
    assert found["moved"] == {(parts, 2), (parts, 1), (1, 1)}
    assert len(found["errors"]) == 2
    assert all("waited 0.5 s for engines to receive" in error for error in found["errors"]), "of dead ones, in between"
    assert found["beyond"].shard_bytes == (found["offer"].shard_bytes if mesh == "2x1" else 0), "too many parts"
