"""The policy agrees with transformers for every kind of family, and refuses what it would get wrong."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from palestra.core.errors import UserError
from palestra.model import kernels
from palestra.model import policy as policy_module
from palestra.model.documents import documents_of
from palestra.model.head import LogitMap
from palestra.model.policy import Policy, check_against_own_forward, require_softmax_attention
from tests.unit.model import tiny

LENGTHS = [12, 3, 30, 7]


def _unsharded(path) -> Policy:
    return tiny.unsharded(path)


@pytest.mark.parametrize("architecture", tiny.FAMILIES)
def test_packed_equals_one_by_one_in_transformers(tmp_path, load, architecture):
    path = tiny.build(tmp_path, architecture)
    policy = load(path)
    own = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(4, 30, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    documents = documents_of(LENGTHS)
    scored = torch.tensor([t for t in range(sum(LENGTHS)) if t not in documents.ends.tolist()])
    with torch.no_grad():
        temperature = torch.full((len(scored),), 0.7)
        logp, _ = policy(ids, documents, scored, temperature)
        leaking, _ = policy(ids, documents_of([sum(LENGTHS)]), scored, temperature)
        expected = [
            (own(input_ids=document[None]).logits[0, :-1].float() / 0.7).log_softmax(-1).gather(1, document[1:, None])
            for document in ids.split(LENGTHS)
        ]
    torch.testing.assert_close(logp, torch.cat(expected)[:, 0], atol=1e-5, rtol=1e-6)
    assert (leaking - logp).abs().max() > 1e-2  # the control: boundaries ignored


def test_bfloat16_computes_in_bfloat16_with_float32_masters(tmp_path, load):
    path = tiny.build(tmp_path)
    ids, scored, ones = torch.arange(4, 24), torch.arange(1, 20), torch.ones(19)
    full, _ = load(path)(ids, documents_of([20]), scored, ones)
    policy = load(path, dtype=torch.bfloat16)
    half, _ = policy(ids, documents_of([20]), scored, ones)
    assert half.dtype == torch.float32
    half.sum().backward()
    assert {parameter.grad.dtype for parameter in policy.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    difference = (full - half).abs().max()
    assert 1e-4 < difference < 0.3


def test_temperature_is_not_rounded_to_the_precision_of_the_model(tmp_path, load):
    policy = load(tiny.build(tmp_path), dtype=torch.bfloat16)
    ids, documents, scored = torch.arange(4, 24), documents_of([20]), torch.arange(1, 20)
    with torch.no_grad():
        logps = [policy(ids, documents, scored, torch.full((19,), t))[0] for t in (0.7, 0.7001)]
    assert not torch.equal(*logps)  # bfloat16 cannot tell the two apart


@pytest.mark.parametrize(
    "fault",
    [
        {"_logit_map": LogitMap(scale=1.02)},
        {"_logit_map": LogitMap(cap=4.0)},
    ],
)
def test_the_start_up_check_sees_a_wrong_head(tmp_path, fault):
    policy = _unsharded(tiny.build(tmp_path))
    check_against_own_forward(policy)
    for name, value in fault.items():
        setattr(policy, name, value)
    with pytest.raises(UserError, match="differ from the model's own"):
        check_against_own_forward(policy)


def test_the_start_up_check_sees_leaking_documents(tmp_path, monkeypatch):
    policy = _unsharded(tiny.build(tmp_path))
    monkeypatch.setattr(policy_module, "documents_of", lambda lengths, *more: documents_of([sum(lengths)], *more))
    with pytest.raises(UserError, match="differ from the model's own"):
        check_against_own_forward(policy)


def test_refuses_layers_that_are_not_softmax_attention(tmp_path):
    policy = _unsharded(tiny.build(tmp_path))
    policy.model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UserError, match="linear_attention"):
        require_softmax_attention(policy.model)


@pytest.mark.parametrize(
    ("path", "said"),
    [("/does/not/exist", "does not exist"), ("./nor/this/one", "does not exist"), ("{empty}", "no config.json")],
)
def test_a_missing_model_is_the_users_error(tmp_path, load, path, said):
    with pytest.raises(UserError, match=said):
        load(path.format(empty=tmp_path))


def test_weights_that_are_missing_are_the_users_error(tmp_path, load):
    path = tiny.build(tmp_path)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no \*.safetensors"):
        load(path)


def test_a_tensor_that_is_missing_is_not_made_up(tmp_path, load):
    path = tiny.build(tmp_path)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"lacks 1 tensors of Qwen3ForCausalLM, the first is model\.layers\.1\.mlp\.up_proj"
    ):
        load(path)


def test_a_broken_config_is_the_users_error(tmp_path, load):
    path = tiny.build(tmp_path)
    config = path / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 200'))
    with pytest.raises(UserError, match=r"num_hidden_layers.*layer_types"):
        load(path)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(tmp_path, load):
    path = tiny.build(tmp_path)
    config = path / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 64', '"intermediate_size": 6400000000'))
    with pytest.raises(UserError, match=r"billion parameters and needs [\d.]+ GiB .* GiB are free"):
        load(path)


def test_no_dropout_while_training(tmp_path, load):
    policy = load(tiny.build(tmp_path, attention_dropout=0.5))
    assert not policy.training
    outs = [policy(torch.arange(4, 14), documents_of([10]), torch.arange(1, 10), torch.ones(9))[0] for _ in range(2)]
    assert torch.equal(*outs)


def test_what_is_made_of_a_pack_is_made_once_for_all_layers(tmp_path, load, monkeypatch):
    """FSDP hands each layer its arguments anew: control for what would be forgotten on the way."""
    policy = load(tiny.build(tmp_path))
    assert policy.attention_kernels == {"padded"}
    seen = []
    monkeypatch.setitem(
        kernels._ATTEND, "padded", lambda q, k, v, documents, _: seen.append(documents) or v[:, [0] * 4]
    )
    documents = documents_of([9, 5])
    policy(torch.zeros(14, dtype=torch.int64), documents, torch.tensor([3]), torch.ones(1))
    assert len(seen) > 1
    assert all(one is documents for one in seen)
