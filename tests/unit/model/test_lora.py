"""Adapters: version 0 is the model, what is trained is the adapter alone, and folding it in changes no probability."""

import json
import math

import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from palestra.config.schema import Lora
from palestra.core.errors import UserError
from palestra.model.documents import documents_of
from palestra.model.export import save_huggingface
from palestra.model.load import load_policy
from palestra.model.lora import iterate_adapter
from tests.unit.model import tiny

LORA = Lora(rank=4, alpha=8)
IDS = torch.arange(4, 24)
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def adapt(meshes):
    def adapt(path, lora=LORA, *, dtype=torch.float32, seed=0):
        return load_policy(
            str(path),
            dtype=dtype,
            experts="grouped_mm",
            head_chunk_tokens=7,
            meshes=meshes,
            device=torch.device("cpu"),
            lora=lora,
            seed=seed,
        )

    return adapt


def logprobs(policy, ids=IDS):
    num = len(ids)
    return policy(ids, documents_of([num]), torch.arange(1, num), torch.ones(num - 1))[0]


@torch.no_grad()
def move(policy, scale=0.3):
    """Adapters far from where they begin."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            local = parameter.to_local()
            local.copy_(scale * torch.randn(local.shape, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_version_0_is_the_model_to_the_bit(tmp_path, load, adapt, dtype):
    path = tiny.build(tmp_path)
    policy = adapt(path, dtype=dtype)
    base = load(path, dtype=dtype).score(IDS)
    assert torch.equal(policy.score(IDS), base)
    move(policy)
    assert (policy.score(IDS) - base).abs().max() > 0.1  # the control: an adapter that is used


def test_the_seed_begins_it_alike_everywhere(tmp_path, adapt):
    path = tiny.build(tmp_path)
    one, same, other = (dict(iterate_adapter(adapt(path, seed=seed).model, dtype=torch.float32)) for seed in (1, 1, 2))
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    assert one[name].abs().max() <= 1 / math.sqrt(one[name].shape[1])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Glm4MoeForCausalLM", "DeepseekV3ForCausalLM"])
@pytest.mark.parametrize("lora", [LORA, Lora(rank=4, alpha=3, use_rslora=True)], ids=["plain", "rslora"])
def test_the_export_is_the_adapted_model_in_both_layouts(tmp_path, adapt, architecture, lora):
    path, out = tiny.build(tmp_path, architecture), tmp_path / "out"
    policy = adapt(path, lora)
    move(policy)
    expected = policy.score(IDS)
    save_huggingface(policy, out, dtype=torch.float32, source=str(path))
    assert load_file(out / "model.safetensors").keys() == load_file(path / "model.safetensors").keys()
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    alone = own_logprobs(base)
    torch.testing.assert_close(own_logprobs(merged), expected, atol=1e-5, rtol=1e-5)
    if architecture == "Qwen3ForCausalLM":  # of families with experts peft takes `gate_proj` for that of the experts
        adapted = peft.PeftModel.from_pretrained(base, out / "adapter")
        torch.testing.assert_close(own_logprobs(adapted), expected, atol=1e-5, rtol=1e-5)
    assert (alone - expected).abs().max() > 0.1


DENSE_AND_EXPERTS = Lora(rank=8, alpha=12, targets=("q_proj", "down_proj", "experts"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "lora"),
    [
        ("Glm4MoeForCausalLM", DENSE_AND_EXPERTS),
        ("Qwen3MoeForCausalLM", Lora(rank=8, targets=("experts",))),
        ("MiniMaxM2ForCausalLM", Lora(rank=8, targets=("experts",))),
    ],
)
def test_adapters_of_experts(tmp_path, load, adapt, architecture, lora):
    """Version 0 is the model to a rounding; folded into the weights they compute what they compute beside them; and
    what is published has two matrices for each projection of each expert, under the names that the weights have."""
    path, out = tiny.build(tmp_path, architecture), tmp_path / "out"
    policy = adapt(path, lora)
    torch.testing.assert_close(policy.score(IDS), load(path).score(IDS), atol=1e-5, rtol=1e-5)
    move(policy)
    expected = policy.score(IDS)
    save_huggingface(policy, out, dtype=torch.float32, source=str(path))
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(own_logprobs(merged), expected, atol=1e-4, rtol=1e-4)
    base, folded = (load_file(where / "model.safetensors") for where in (path, out))
    published = load_file(out / "adapter/adapter_model.safetensors")
    names = [name for name in base if ".experts." in name]
    assert names
    for name in names:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (published.pop(f"{module}.lora_{which}.weight") for which in "AB")
        torch.testing.assert_close(folded[name] - base[name], policy.adapter.scale * b @ a, atol=1e-5, rtol=1e-5)
        assert (b @ a).abs().max() > 0.1
    assert not any(".experts." in name for name in published)


def test_gradients_of_adapters_of_experts_are_those_of_the_product(tmp_path, adapt):
    """By the chain rule from the gradients of weights that the adapters are folded into; frozen ones have none."""
    path, out = tiny.build(tmp_path, "Glm4MoeForCausalLM"), tmp_path / "out"
    policy = adapt(path, DENSE_AND_EXPERTS)
    move(policy)
    save_huggingface(policy, out, dtype=torch.float32, source=str(path))
    logprobs(policy).sum().backward()
    whole = tiny.unsharded(out)
    logprobs(whole).sum().backward()
    for layer in (1, 2):
        ours, theirs = (one.model.get_decoder().layers[layer].mlp.experts for one in (policy, whole))
        for name in ("gate_up_proj", "down_proj"):
            a, b, weight = (getattr(ours, f"{name}{end}") for end in ("_lora_A", "_lora_B", ""))
            product = policy.adapter.scale * getattr(theirs, name).grad
            for factor, expected in ((a, b.full_tensor().mT @ product), (b, product @ a.full_tensor().mT)):
                torch.testing.assert_close(factor.grad.full_tensor(), expected, atol=1e-3, rtol=1e-3)
            assert weight.grad is None


@torch.no_grad()
def own_logprobs(model):
    return model.eval()(input_ids=IDS[None]).logits[0, :-1].float().log_softmax(-1).gather(1, IDS[1:, None])[:, 0]


def test_gradients_are_those_of_peft_and_nothing_else_has_any(tmp_path, adapt):
    path, out = tiny.build(tmp_path), tmp_path / "out"
    policy = adapt(path)
    move(policy)
    save_huggingface(policy, out, dtype=torch.float32, source=str(path))
    logprobs(policy).sum().backward()
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    plain = peft.PeftModel.from_pretrained(base, out / "adapter", is_trainable=True).eval()
    plain(input_ids=IDS[None]).logits[0, :-1].log_softmax(-1).gather(1, IDS[1:, None]).sum().backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    found = {f"base_model.{name}": p.grad.full_tensor() for name, p in policy.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() != set()
    assert all("lora_" in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)


def test_frozen_weights_are_in_the_dtype_of_the_forward_pass_and_adapters_have_masters(tmp_path, adapt):
    policy = adapt(tiny.build(tmp_path), dtype=torch.bfloat16)
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
    logprobs(policy).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in policy.parameters() if p.requires_grad)


def test_the_layers_that_are_adapted(tmp_path, adapt):
    def leaves(policy):
        names = [name for name, _ in iterate_adapter(policy.model, dtype=torch.float32)]
        return {name.split(".")[-3] for name in names}, {name.split(".")[4] for name in names}

    glm = tiny.build(tmp_path, "Glm4MoeForCausalLM")
    policy = adapt(glm)
    assert leaves(policy) == (ATTENTION | MLP, {"0", "1", "2"})
    assert set(json.loads(policy.adapter.config_json("base"))["target_modules"]) == ATTENTION | MLP
    assert not any(".experts." in name for name, _ in iterate_adapter(policy.model, dtype=torch.float32))
    assert any(".shared_experts." in name for name, _ in iterate_adapter(policy.model, dtype=torch.float32))
    assert leaves(adapt(glm, Lora(targets=("self_attn.q_proj", "o_proj")))) == ({"q_proj", "o_proj"}, {"0", "1", "2"})


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (
            "gate_up_proj",
            "gate_up_proj are routed experts of Glm4MoeForCausalLM, which are adapted together .* say experts",
        ),
        ("lm_head", "has no linear layer lm_head in its decoder layers; choose among down_proj"),
        ("proj", "has no linear layer proj"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(tmp_path, adapt, target, words):
    with pytest.raises(UserError, match=words):
        adapt(tiny.build(tmp_path, "Glm4MoeForCausalLM"), Lora(targets=("q_proj", target)))


def test_experts_that_cannot_be_adapted_are_refused(tmp_path, adapt):
    for architecture, words in (("Qwen3ForCausalLM", "has no experts"), ("GptOssForCausalLM", "one transposed matrix")):
        with pytest.raises(UserError, match=words):
            adapt(tiny.build(tmp_path, architecture), Lora(targets=("q_proj", "experts")))
    with pytest.raises(ValidationError, match=r"model\.lora\.rank=12.* set it to 16"):
        Lora(rank=12, targets=("experts",))
