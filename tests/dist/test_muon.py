"""Muon on four ranks is Muon on one, whatever the layout; one optimizer for parameters of several meshes."""

from pathlib import Path

import pytest
import torch

from tests.dist import muon_worker
from tests.dist.layouts import make_policy, measure
from tests.dist.muon_worker import CASES, MAX_NORM, SAVED_AT, STEPS, Model, train
from tests.dist.processes import run
from tests.dist.test_layouts import worst
from tests.one_rank import join_alone, ranks_of_one
from tests.unit.model import tiny

NAMES = ["split.experts", "split.tensor", *(f"cases.{name}" for name in CASES)]

SHOWN_BY_ORDER = ("rows", "uneven", "columns", "replicas", "rectangles", "strided", "cut_experts")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("muon")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    """Of whose matrices two tensor ranks have an odd number of rows, and whose rows four shards do not divide."""
    odd = {"hidden_size": 34, "intermediate_size": 70, "moe_intermediate_size": 18}
    return tiny.build(tmp_path_factory.mktemp("models"), "Glm4MoeForCausalLM", **odd)


@pytest.fixture(scope="module")
def four_ranks(out, model_path) -> dict:
    run("muon_worker", out, model_path, timeout_s=600)
    return torch.load(out / "found.pt")


@pytest.fixture(scope="module")
def one_rank() -> dict[str, torch.Tensor]:
    model = Model()
    return train(model, model.optimizer(), range(STEPS))


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", NAMES)
def test_four_ranks_equal_one(name, four_ranks, one_rank):
    assert _distance(four_ranks["straight"][name], one_rank[name]) < 1e-8


def test_every_kind_of_layout_was_compared(four_ranks):
    placements = " ".join(four_ranks["placements"].values())
    assert all(kind in placements for kind in ("Shard(dim=0)", "Shard(dim=1)", "Replicate", "_StridedShard"))
    assert all("_StridedShard" in four_ranks["placements"][f"split.{name}"] for name in ("experts", "tensor"))


def test_eight_ranks_with_a_tensor_axis_equal_one(four_ranks, out, model_path):
    """A policy on shard 2 x context 2 x tensor 2, experts over 4 of them, with shards that are not alike."""
    eight = torch.load(out / "eight.pt")
    one, by_adamw = (
        measure(make_policy(model_path, torch.float64, None), None, ranks_of_one(), optimizer)
        for optimizer in ("muon", "adamw")
    )
    for what in ("gradients", "weights"):
        assert worst(eight[what], one[what])[0] < 1e-8
    assert worst(eight["weights"], by_adamw["weights"])[0] > 1e-3  # the control


def test_a_matrix_orthogonalized_in_pieces_would_be_seen(four_ranks):
    model = Model()
    in_pieces = train(model, model.optimizer(in_pieces=True), range(STEPS))
    assert _distance(four_ranks["straight"]["cases.rows"], in_pieces["cases.rows"]) > 1e-3


def test_shards_put_together_in_the_wrong_order_would_be_seen(four_ranks, one_rank):
    for name in ("split.tensor", *(f"cases.{name}" for name in SHOWN_BY_ORDER)):
        assert _distance(four_ranks["faulty"][name], one_rank[name]) > 1e-3, name


def test_replicas_have_the_same_bits(four_ranks):
    assert four_ranks["replicas_agree"] == dict.fromkeys(four_ranks["replicas_agree"], True)


@pytest.mark.parametrize("way", ["resumed", "offloaded"])
def test_to_the_bit(way, four_ranks):
    """Resumed from a checkpoint as uninterrupted; with moments in host memory as without."""
    for name, weight in four_ranks["straight"].items():
        assert torch.equal(four_ranks[way][name], weight), name


def test_a_checkpoint_of_four_ranks_is_continued_by_one(out, four_ranks):
    join_alone()
    model = Model()
    optimizer = model.optimizer()
    muon_worker.resume(model, optimizer, out / "checkpoint")
    continued = train(model, optimizer, range(SAVED_AT, STEPS))
    for name in NAMES:
        assert _distance(continued[name], four_ranks["straight"][name]) < 1e-8, name


def test_clipping_is_by_the_norm_over_all_meshes(four_ranks):
    model = Model()
    model.set_gradients(0)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    assert four_ranks["norm"] == pytest.approx(float(norm), rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(four_ranks["clipped"][name], gradient * (MAX_NORM / (norm + 1e-6)))


def test_a_norm_that_counts_replicas_twice_is_another():
    """The negative control: what the test above tells apart."""
    model = Model()
    model.set_gradients(0)
    squares = {name: float(p.grad.square().sum()) for name, p in model.named_parameters()}
    twice = sum(squares.values()) + squares["cases.replicas"]
    assert twice**0.5 != pytest.approx(sum(squares.values()) ** 0.5, rel=1e-3)
