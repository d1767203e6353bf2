"""Budgets of a model whose numbers are small enough to be added by hand."""

import msgspec
import pytest

from palestra.config.schema import Train
from palestra.launch.budget import (
    Work,
    budget_of,
    changes,
    difference_bytes,
    longest_pack,
    published_bytes,
    step_flops,
)
from palestra.launch.hardware import HARDWARE, Hardware
from palestra.model.anatomy import Anatomy, Attention, Layer

LAYER = Layer(
    parameters=1000,
    experts=800,
    matrices=900,
    met=400,
    products=300,
    attention=Attention(heads=2, qk_width=4, v_width=4),
    input_bytes=20.0,
    saved_bytes=200.0,
    product_bytes=80.0,
    routed_bytes=40.0,
    orthogonal_flops=700,
)
MODEL = Anatomy(
    architecture="HandMade",
    layers=(LAYER, LAYER, LAYER, LAYER),
    root=600,
    head=300,
    vocab_size=30,
    width=10,
    num_experts=8,
    num_experts_per_token=2,
    is_tied=False,
    itemsize=2,
)
DEVICE = Hardware(
    name="slate",
    memory_bytes=100_000,
    host_bytes=50_000,
    reserved_bytes=50,
    flops=1e6,
    memory_bytes_s=1e6,
    link_bytes_s=1e5,
    network_bytes_s=1e4,
    host_link_bytes_s=1e5,
    mfu=0.5,
)
WORK = Work(tokens=400, document_tokens=50)


def train(**settings) -> Train:
    return Train.model_validate({"max_pack_tokens": 100, "head_chunk_tokens": 10, **settings})


def parts(device=DEVICE, **settings) -> dict[str, int]:
    return dict(budget_of(train(**settings), MODEL, device, WORK).parts)


def test_every_part_by_hand():
    layer = 1000 * (2 + 4) + 200 * 100 * 0.5  # its gradient in both precisions; half of what it keeps
    head = 3 * 4 * 10 * 30 + 2 * 4 * 300
    assert layer > head
    assert parts() == {
        "runtime": 50,
        "weights (float32)": 4 * 4600,
        "gradients (float32)": 4 * 4600,
        "optimizer": 8 * 4600,
        "weights in use": 2 * (600 + 2 * 1000),
        "activations": 4 * 200 * 100 + 2 * 10 * 100 * 2,
        "at work": layer,
    }


def test_gradients_of_a_single_pack_come_as_its_activations_go():
    alone = dict(budget_of(train(max_pack_tokens=400), MODEL, DEVICE, WORK).parts)
    assert alone["gradients (float32)"] == 0 < 4 * 4600 < alone["activations"]
    few = dict(budget_of(train(), MODEL, DEVICE, Work(tokens=100, document_tokens=50)).parts)
    assert few["gradients (float32)"] == max(4 * 4600 - few["activations"], 0)


def test_ranks_share_weights_and_packs():
    whole, shared = parts(), parts(shard=2, context_parallel=2)  # two packs for each, and still more than one
    for name in ("weights (float32)", "gradients (float32)", "optimizer"):
        assert shared[name] * 4 == whole[name]
    assert shared["activations"] * 2 == whole["activations"]
    assert parts(replicate=4)["optimizer"] == whole["optimizer"]


def test_weights_that_are_kept_gathered_take_room_and_spare_gathering():
    assert parts(shard=2)["weights in use"] == 2 * (600 + 2 * 1000)
    for kept in ("backward", "step"):
        assert parts(shard=2, reshard_after=kept)["weights in use"] == 2 * (600 + 4 * 1000)
        assert parts(shard=2, reshard_after=kept, expert_parallel=2)["weights in use"] == 2 * (600 + 4 * (200 + 400))
    told = {
        when: budget_of(train(shard=2, reshard_after=when), MODEL, DEVICE, WORK, node_ranks=2)
        for when in ("forward", "backward", "step")
    }
    gathering = {when: budget.seconds.communication - 2 * 4 * 4600 / 2 / 1e5 for when, budget in told.items()}
    assert told["step"].packs == 2
    once = 2 * 4600 / 2 / 1e5  # seconds
    assert gathering == pytest.approx({"forward": 2 * (once + 2 * 4000 / 2 / 1e5), "backward": 2 * once, "step": once})


def test_muon_keeps_one_moment_of_matrices():
    assert parts()["optimizer"] - parts(optimizer="muon")["optimizer"] == 4 * 4 * 900


def test_experts_that_others_own_are_not_gathered():
    assert parts(shard=4)["weights in use"] - parts(shard=4, expert_parallel=4)["weights in use"] == 2 * 2 * 600


def test_recomputing_keeps_less_and_works_more():
    kept = {how: parts(recompute=how)["activations"] for how in ("none", "selective", "full")}
    hidden = 2 * 10 * 100 * 2
    assert kept == {
        "none": 4 * 200 * 100 + hidden,
        "selective": 4 * (20 + 80) * 100 + hidden,
        "full": 4 * 20 * 100 + hidden,
    }
    assert parts(recompute="full")["at work"] - parts()["at work"] == 200 * 100


def test_what_is_offloaded_is_in_the_host():
    kept = budget_of(train(offload_activations=True), MODEL, DEVICE, WORK)
    assert (dict(kept.parts)["activations"], kept.host_bytes) == (2 * 200 * 100 + 4000, 2 * 200 * 100)
    moments = budget_of(train(offload_optimizer=True), MODEL, DEVICE, WORK)
    assert (dict(moments.parts)["optimizer"], moments.host_bytes) == (0, 8 * 4600)


def test_it_fits_or_not_on_the_device_and_in_the_host():
    needed = budget_of(train(), MODEL, DEVICE, WORK).device_bytes
    assert budget_of(train(), MODEL, sized(memory_bytes=needed), WORK).fits
    assert not budget_of(train(), MODEL, sized(memory_bytes=needed - 1), WORK).fits
    moved = train(offload_optimizer=True)
    assert budget_of(moved, MODEL, sized(memory_bytes=needed, host_bytes=8 * 4600), WORK).fits
    assert not budget_of(moved, MODEL, sized(memory_bytes=needed, host_bytes=8 * 4600 - 1), WORK).fits


def sized(**settings) -> Hardware:
    return Hardware(**{**{name: getattr(DEVICE, name) for name in DEVICE.__dataclass_fields__}, **settings})


def test_what_is_published():
    assert published_bytes(MODEL) == 2 * 4600
    assert difference_bytes(MODEL) == (184, 368)  # 46 and 92 weights of two bytes, each with a place of two
    assert difference_bytes(MODEL, is_sent=True) == (276, 552)  # a place of four


def test_what_was_published_last_is_kept_by_all_ranks_together():
    for layout in ({"shard": 2}, {"replicate": 2}):
        kept = budget_of(train(**layout), MODEL, DEVICE, WORK, keeps_published=True)
        assert kept.host_bytes == 2 * 4600 / 2
    [doubled, *_] = [
        change
        for change in changes(train(), MODEL, DEVICE, WORK, node_ranks=8, keeps_published=True)
        if change.num_ranks == 2
    ]
    assert doubled.budget.host_bytes == 4600


def test_copies_for_engines_on_the_same_gpu_are_on_it():
    copies = 2 * published_bytes(MODEL)
    assert copies == 18_400
    told = budget_of(train(), MODEL, DEVICE, WORK, copies_bytes=copies)
    assert dict(told.parts) == {**parts(), "copies for engines": 18_400}
    assert told.host_bytes == 0
    needed = told.device_bytes
    assert budget_of(train(), MODEL, sized(memory_bytes=needed), WORK, copies_bytes=copies).fits
    assert not budget_of(train(), MODEL, sized(memory_bytes=needed - 1), WORK, copies_bytes=copies).fits
    found = changes(train(), MODEL, DEVICE, WORK, node_ranks=8, copies_bytes=copies)
    assert {change.num_ranks for change in found} == {1}, "the engine reads those of one rank"
    assert all(dict(change.budget.parts)["copies for engines"] == 18_400 for change in found)


def test_the_longest_pack_leaves_room_for_copies():
    whole, half = (longest_pack(train(), MODEL, sized(memory_bytes=x), WORK, node_ranks=8) for x in (10**8, 10**8 // 2))
    assert 0 < half < whole
    assert longest_pack(train(), MODEL, sized(memory_bytes=10**8), WORK, node_ranks=8, copies_bytes=10**8 // 2) == half


def test_seconds_of_a_step():
    flops = 3 * (2 * 400 * (4 * 300 + 300) + 8 * 4 * 2 * 2 * 8 * (50 * 51 // 2))
    assert step_flops(MODEL, WORK) == pytest.approx(flops)
    plain = budget_of(train(shard=2), MODEL, DEVICE, WORK, node_ranks=2)
    assert plain.packs == 2
    assert plain.seconds.compute == pytest.approx(flops / 2 / 5e5)
    assert plain.seconds.communication == pytest.approx(2 * (2 * 600 + 2 * 2 * 4000 + 4 * 4600) / 2 / 1e5)
    assert plain.seconds.optimizer == pytest.approx(28 * 4600 / 2 / 1e6)
    assert plain.seconds.to_experts == 0
    muon = budget_of(train(shard=2, optimizer="muon"), MODEL, DEVICE, WORK, node_ranks=2).seconds.optimizer
    assert muon == pytest.approx(plain.seconds.optimizer + 5 * 4 * 700 / 2 / 5e5)
    across = budget_of(train(shard=2), MODEL, DEVICE, WORK, node_ranks=1)
    assert across.seconds.communication == pytest.approx(10 * plain.seconds.communication)
    again = budget_of(train(shard=2, recompute="full"), MODEL, DEVICE, WORK, node_ranks=2)
    assert again.seconds.compute == pytest.approx(4 / 3 * plain.seconds.compute)
    split = budget_of(train(shard=2, expert_parallel=2), MODEL, DEVICE, WORK, node_ranks=2)
    assert split.seconds.to_experts == pytest.approx(4 * 40 * 200 * 4 / 2 / 1e5)
    no_experts = 2 * (2 * 600 + 2 * 2 * 4 * 200 + 4 * (600 + 4 * 200)) / 2 / 1e5  # each rank has its own, whole
    assert split.seconds.communication == pytest.approx(no_experts)
    replicas = budget_of(train(replicate=2), MODEL, DEVICE, WORK, node_ranks=2)
    assert replicas.seconds.communication == pytest.approx(4 * 4600 / 1e5)  # half to another rank, half back, once


# --- adapters


ADAPTED = msgspec.structs.replace(MODEL, layers=(msgspec.structs.replace(LAYER, adapters=50, split_adapters=20),) * 4)


def test_every_part_with_adapters_by_hand():
    layer = 50 * (2 + 4) + 200 * 100 * 0.5  # gradients of adapters alone
    told = dict(budget_of(train(), ADAPTED, DEVICE, WORK).parts)
    assert told == {
        "runtime": 50,
        "frozen weights": 2 * 4600,
        "weights (float32)": 4 * 200,
        "gradients (float32)": 4 * 200,
        "optimizer": 8 * 200,
        "weights in use": 2 * (600 + 2 * 1050),
        "activations": 4 * 200 * 100 + 2 * 10 * 100 * 2,
        "at work": layer,
    }
    muon = dict(budget_of(train(optimizer="muon"), ADAPTED, DEVICE, WORK).parts)
    assert muon["optimizer"] == 4 * 200


def test_a_tensor_axis_has_the_whole_halves_of_adapters_twice():
    model = msgspec.structs.replace(ADAPTED, tensor_divisor=2)
    told = dict(budget_of(train(tensor_parallel=2), model, DEVICE, WORK).parts)
    assert told["optimizer"] == 8 * (200 + 4 * 30) / 2
    assert told["frozen weights"] == 2 * (4600 + 4 * 200) / 2
    assert told["weights in use"] == 2 * (600 + 2 * (200 + 800 + 30 + 20 / 2))


def test_adapters_of_experts_are_where_the_experts_are():
    layer = msgspec.structs.replace(LAYER, expert_adapters=80)
    model = msgspec.structs.replace(MODEL, layers=(layer,) * 4)
    told = dict(budget_of(train(shard=4, expert_parallel=4), model, DEVICE, WORK).parts)
    assert told["optimizer"] == 8 * 4 * 80 / 4
    assert told["weights in use"] == 2 * (600 + 2 * (200 + 800 / 4 + 80 / 4))
    met = 80 * 2 // 8  # a token meets two experts of eight
    assert step_flops(model, WORK) - 2 / 3 * step_flops(MODEL, WORK) == pytest.approx(
        3 * 2 * 400 * 4 * met + 8 * 4 * 2 * 2 * 8 * (50 * 51 // 2)
    )


def test_what_is_published_are_adapters():
    assert published_bytes(ADAPTED) == 2 * 200
    assert difference_bytes(ADAPTED) is None


def test_seconds_of_a_step_of_adapters():
    flops = 2 * 2 * 400 * (4 * 300 + 300) + 3 * (2 * 400 * 200 + 8 * 4 * 2 * 2 * 8 * (50 * 51 // 2))
    assert step_flops(ADAPTED, WORK) == pytest.approx(flops)
    assert step_flops(MODEL, WORK) + 3 * 2 * 400 * 200 - flops == 2 * 400 * 1500  # no gradients of frozen weights
    told = budget_of(train(shard=2), ADAPTED, DEVICE, WORK, node_ranks=2).seconds
    assert told.compute == pytest.approx(flops / 2 / 5e5)
    assert told.communication == pytest.approx(2 * (2 * 600 + 2 * 2 * 4200 + 4 * 200) / 2 / 1e5)
    assert told.optimizer == pytest.approx(28 * 200 / 2 / 1e6)


def test_changes_say_what_each_setting_frees():
    found = {
        tuple(change.settings.items()): change for change in changes(train(shard=4), MODEL, DEVICE, WORK, node_ranks=8)
    }
    now = budget_of(train(shard=4), MODEL, DEVICE, WORK).device_bytes
    full = found[(("recompute", "full"),)].budget
    assert now - full.device_bytes == 4 * 180 * 100 - 200 * 100
    assert found[(("context_parallel", 2), ("shard", 2))].num_ranks == 4
    assert found[(("shard", 8),)].num_ranks == 8
    assert (("recompute", "none"),) not in found  # what it is already


def test_no_change_is_one_that_the_recipe_may_not_have():
    dense = msgspec.structs.replace(MODEL, num_experts=0)
    for model, wanted in ((MODEL, True), (dense, False)):
        found = changes(train(shard=4), model, DEVICE, WORK, node_ranks=8)
        assert any("expert_parallel" in change.settings for change in found) is wanted
    unknown = changes(train(shard=4, expert_parallel=2), dense, DEVICE, WORK, node_ranks=8)  # FSDP shards its experts
    assert {"recompute": "full"} in [change.settings for change in unknown]
    assert not any("expert_parallel" in change.settings for change in unknown)
    assert all(change.settings.get("shard", 1) >= 1 for change in changes(train(), MODEL, DEVICE, WORK, node_ranks=8))


@pytest.mark.parametrize(("heads", "kind", "wanted"), [(2, "ulysses", True), (3, "ulysses", False), (3, "ring", True)])
def test_no_change_deals_heads_that_do_not_divide(heads, kind, wanted):
    layer = msgspec.structs.replace(LAYER, attention=Attention(heads=heads, qk_width=4, v_width=4))
    model = msgspec.structs.replace(MODEL, layers=(layer,))
    found = changes(train(shard=4, context_kind=kind), model, DEVICE, WORK, node_ranks=8)
    assert any("context_parallel" in change.settings for change in found) is wanted


def test_the_longest_pack_fits_and_a_longer_one_does_not():
    longest = longest_pack(train(), MODEL, HARDWARE["H100"], WORK, node_ranks=8)
    assert longest % 1024 == 0
    assert budget_of(train(max_pack_tokens=longest), MODEL, HARDWARE["H100"], WORK).fits
    assert (
        longest == 1 << 24 or not budget_of(train(max_pack_tokens=longest + 1024), MODEL, HARDWARE["H100"], WORK).fits
    )
    assert longest_pack(train(), MODEL, sized(memory_bytes=100), WORK, node_ranks=8) == 0
