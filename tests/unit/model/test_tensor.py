"""What transformers' plan splits of a family, and what the graph of its gradients says of it."""

import pytest
import torch
from torch import Tensor, nn

from palestra.config.schema import Build, Model
from palestra.core.errors import UserError
from palestra.model import tensor_check, tensor_plan
from palestra.model.build import new_config
from palestra.model.dissect import dissect
from palestra.model.tensor import Axis, Pretended, Seen
from palestra.model.tensor_plan import require_heads, split_of
from tests.unit.model import tiny


def config_of(architecture: str, **more):
    fields = {**tiny.FAMILIES[architecture], **more}
    return new_config(Build(architecture=architecture, alphabet=tiny.ALPHABET, config=fields))


@pytest.mark.parametrize(
    ("family", "heads", "shared"),
    [
        ("LlamaForCausalLM", 2, {}),
        ("Qwen3ForCausalLM", 2, {"k_norm": {"weight": False}, "q_norm": {"weight": False}}),  # the plan names them
        ("Glm4MoeForCausalLM", 2, {"k_norm": {"weight": False}, "q_norm": {"weight": False}}),  # the plan does not
        ("GraniteSWAForCausalLM", 2, {"self_attn": {"sinks": True}}),
        ("DeepseekV3ForCausalLM", 4, {}),  # attention is whole
        ("MiniMaxM2ForCausalLM", 4, {}),  # attention is whole, between projections that are split
    ],
)
def test_what_each_ranks_heads_share_is_found(family, heads, shared):
    split = split_of(config_of(family), 2)
    assert split.heads == heads
    assert {name.rpartition(".")[2]: parameters for name, parameters in split.shared.items()} == shared
    assert {name.split(".")[1] for name in split.shared} in (set(), {"0", "1"}, {"0", "1", "2"})


@pytest.mark.parametrize(
    ("family", "more", "size", "says"),
    [
        ("GptOssForCausalLM", {}, 2, "transformers has no plan for .* GptOssForCausalLM; set it to 1"),
        ("LlamaForCausalLM", {}, 3, "does not divide the model's 4 attention heads; set it to 2$"),
        ("LlamaForCausalLM", {}, 4, "the model's 2 key and value heads; set it to 2$"),
        ("LlamaForCausalLM", {"intermediate_size": 63}, 2, r"63 outputs of layers.\*.mlp.gate_proj; set it to 1$"),
    ],
)
def test_what_does_not_divide_is_refused(family, more, size, says):
    with pytest.raises(UserError, match=says):
        split_of(config_of(family, **more), size)


def test_heads_of_a_rank_must_be_dealt_out():
    split = split_of(config_of("LlamaForCausalLM"), 2)
    require_heads(split, 2)
    with pytest.raises(UserError, match=r"the 2 attention heads that train.tensor_parallel leaves .* set it to 2"):
        require_heads(split, 4)


@pytest.mark.parametrize(
    ("family", "lacks", "says"),
    [
        ("DeepseekV3ForCausalLM", "mlp.up_proj", "cannot be split"),  # shapes do not fit
        ("LlamaForCausalLM", "o_proj", "cannot be split"),
        ("DeepseekV2ForCausalLM", "kv_a_proj_with_mqa", "hidden states reach each rank's own heads past the plan"),
    ],
)
def test_a_plan_that_forgets_a_layer_is_refused(family, lacks, says, monkeypatch):
    """The last one has the right shapes, and would have a wrong gradient."""
    whole = tensor_plan.styles_of
    monkeypatch.setattr(
        tensor_plan,
        "styles_of",
        lambda model: {name: style for name, style in whole(model).items() if not name.endswith(lacks)},
    )
    monkeypatch.setitem(tiny.FAMILIES, "DeepseekV2ForCausalLM", tiny.FAMILIES["DeepseekV3ForCausalLM"])
    with pytest.raises(UserError, match=says):
        split_of(config_of(family), 2)


@pytest.mark.parametrize(("total", "size"), [(8, 2), (7, 2), (5, 4), (1, 4)])
def test_parts_are_those_of_chunk_and_make_up_the_whole(total, size):
    x = torch.arange(total * 3.0).view(total, 3)
    parts = [Axis(rank, size).cut(x, 0) for rank in range(size)]
    assert torch.equal(torch.cat(parts), x)
    assert [len(part) for part in parts if len(part)] == [len(part) for part in x.chunk(size)]
    assert Pretended(0, size).join(parts[0], total, 0).shape == x.shape


def test_a_module_is_seen_with_other_parameters():
    linear = nn.Linear(2, 2, bias=False)
    x = torch.ones(1, 2)

    def double(weight: Tensor) -> Tensor:
        return 2 * weight

    assert torch.equal(Seen(linear, {"weight": double}).run(x), 2 * linear(x))


def test_what_an_axis_divides_of_a_layer_is_counted():
    anatomy = dissect(config_of("LlamaForCausalLM"), torch.float32)
    layer = anatomy.layers[0]
    assert anatomy.tensor_divisor == 2
    assert anatomy.are_heads_split
    rows = 4 * 8 + 2 * 2 * 8 + 2 * 64  # of q, of k and v, of gate and up
    assert layer.split == rows * 33 + 32 * (4 * 8 + 64)  # with biases; o and down without
    assert layer.whole == 2 * 32 + 2 * 32  # norms, and biases that are added once
    assert layer.sums == 2
    assert 0 < layer.split_saved_bytes < layer.saved_bytes
    split_products = 4 * rows + 4 * (8 * 4 + 4)  # outputs, and those of attention with a sum for each head
    assert layer.split_product_bytes == pytest.approx(split_products)
    assert layer.product_bytes == pytest.approx(split_products + 4 * 2 * 32)


def test_nothing_is_divided_of_a_family_without_a_plan():
    anatomy = dissect(config_of("GptOssForCausalLM"), torch.float32)
    assert anatomy.tensor_divisor == 1
    assert not anatomy.layers[0].split


def test_the_program_is_silent_where_all_is_well(capsys):
    model = Model(build=Build(architecture="LlamaForCausalLM", alphabet="ab", config=tiny.FAMILIES["LlamaForCausalLM"]))
    assert tensor_check.main(model.model_dump_json(), "2", "1") == 0
    assert not capsys.readouterr().out
