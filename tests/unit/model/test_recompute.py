"""Keeping less for the backward changes memory and no number."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from palestra.model.documents import documents_of
from palestra.model.recompute import keep_less
from tests.unit.model import tiny

LENGTHS = [12, 3, 30, 7]
WAYS = [("none", True), ("selective", False), ("selective", True), ("full", False), ("full", True)]


def run(path, recompute: str = "none", offload: bool = False):
    """Log-probabilities, gradients, and the bytes that the forward left behind."""
    policy = tiny.unsharded(path)
    keep_less(policy.decoder_layers, recompute=recompute, offload=offload)
    ids = torch.randint(4, 30, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    documents = documents_of(LENGTHS)
    scored = torch.tensor([t for t in range(sum(LENGTHS)) if t not in documents.ends.tolist()])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        logp, _ = policy(ids, documents, scored, torch.ones(len(scored)))
    num_bytes = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
    (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
    return logp.detach(), {name: parameter.grad for name, parameter in policy.named_parameters()}, num_bytes


@pytest.mark.parametrize("family", ["Qwen3ForCausalLM", "Glm4MoeForCausalLM", "GptOssForCausalLM"])
def test_no_number_changes(tmp_path, family):
    path = tiny.build(tmp_path, family)
    logp, gradients, _ = run(path)
    for recompute, offload in WAYS:
        other, others, _ = run(path, recompute, offload)
        assert torch.equal(other, logp), (recompute, offload)
        assert all(torch.equal(gradient, gradients[name]) for name, gradient in others.items()), (recompute, offload)


@pytest.mark.parametrize("family", ["Qwen3ForCausalLM", "Glm4MoeForCausalLM"])
def test_less_is_kept(tmp_path, family):
    """Of `none` everything; of `full` little more than the input of each layer."""
    path = tiny.build(tmp_path, family)
    kept = {recompute: run(path, recompute)[2] for recompute in ("none", "selective", "full")}
    assert kept["full"] < 0.5 * kept["none"]
    assert kept["full"] < kept["selective"] < kept["none"]
