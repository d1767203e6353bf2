"""What is exported is the checkpoint that transformers would have written, and loads with the same logits."""

import json
import resource
import weakref

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from palestra.core.errors import InfrastructureError
from palestra.model import export
from palestra.model.documents import documents_of
from palestra.model.export import iterate_weights, save_huggingface
from tests.unit.model import tiny


@pytest.mark.parametrize("architecture", tiny.FAMILIES)
def test_same_names_and_bits_as_the_checkpoint_it_came_from(tmp_path, load, architecture):
    path = tiny.build(tmp_path, architecture)
    weights = dict(iterate_weights(load(path), dtype=torch.float32))
    stored = load_file(path / "model.safetensors")
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], stored[name]) for name in stored)


def test_tied_tensors_once_and_persistent_buffers_too(tmp_path, load):
    names = [name for name, _ in iterate_weights(load(tiny.build(tmp_path)), dtype=torch.float32)]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    glm = dict(iterate_weights(load(tiny.build(tmp_path, "Glm4MoeForCausalLM")), dtype=torch.bfloat16))
    assert glm["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32  # a buffer stays as it is
    assert glm["model.layers.1.mlp.experts.3.down_proj.weight"].dtype == torch.bfloat16
    assert "lm_head.weight" in glm


def test_layer_by_layer(tmp_path, load):
    """The tensors of a layer come together, so that never more than one layer is whole."""
    names = [name for name, _ in iterate_weights(load(tiny.build(tmp_path, "Glm4MoeForCausalLM")), dtype=torch.float32)]
    layers = [name.split(".")[2] if ".layers." in name else name for name in names]
    runs = [layer for i, layer in enumerate(layers) if i == 0 or layers[i - 1] != layer]
    assert len(runs) == len(set(runs))


@pytest.mark.parametrize("architecture", ["Glm4MoeForCausalLM", "Qwen3ForCausalLM"])
def test_a_layer_is_let_go_of_before_the_next_one_is_whole(tmp_path, load, architecture):
    policy, whole = load(tiny.build(tmp_path, architecture)), []  # of bfloat16: copies, not the parameters themselves
    for name, tensor in iterate_weights(policy, dtype=torch.bfloat16):
        layer = name.split(".")[2] if ".layers." in name else name
        alive = {before for before, reference in whole if reference() is not None}
        assert alive <= {layer}, f"{alive - {layer}} is there while {name} is handed out"
        if tensor.dtype == torch.bfloat16:
            whole.append((layer, weakref.ref(tensor)))
        del tensor
    assert whole


@pytest.mark.parametrize("shard_bytes", [1 << 30, 10_000])
def test_transformers_loads_the_export_with_identical_logits(tmp_path, load, monkeypatch, shard_bytes):
    monkeypatch.setattr(export, "SHARD_BYTES", shard_bytes)
    path, out = tiny.build(tmp_path, "Glm4MoeForCausalLM"), tmp_path / "out"
    policy = load(path)
    ids = torch.arange(4, 24)
    logp, _ = policy(ids, documents_of([20]), torch.arange(1, 20), torch.ones(19))
    logp.sum().backward()  # the weights below are not those of the file any more
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.sub_(0.01 * parameter.grad.sign())
    expected = policy.score(ids)
    save_huggingface(policy, out, dtype=torch.float32, source=str(path))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    own = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, logp, atol=1e-2)
    assert AutoTokenizer.from_pretrained(out).encode("ab") == [4, 5]
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Glm4MoeForCausalLM"]
    assert json.loads((out / "config.json").read_text()) == json.loads((path / "config.json").read_text())
    assert (out / "model.safetensors.index.json").exists() == (shard_bytes == 10_000)


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path, load):
    path = tiny.build(tmp_path)
    (tmp_path / ".out.4711").mkdir()
    save_huggingface(load(path), tmp_path / "out", dtype=torch.float32, source=str(path))
    assert sorted(found.name for found in tmp_path.iterdir()) == sorted(["out", path.name])


def test_a_full_disk_is_an_error_and_leaves_nothing_behind(tmp_path, load):
    """The limit on file sizes stands in for the disk: the writes fail in the same way."""
    path = tiny.build(tmp_path)
    policy = load(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InfrastructureError, match=r"could not export to .*; free space and resume"):
            save_huggingface(policy, tmp_path / "out", dtype=torch.float32, source=str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
