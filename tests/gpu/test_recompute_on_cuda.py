"""On a CUDA device layers that keep less compute the same. One command: `python -m pytest tests/gpu`."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from palestra.model.documents import documents_of
from palestra.model.recompute import PLAIN, Activations, keep_activations
from tests.unit.model import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # torch's own compiler has some
]

LENGTHS = [600, 3, 400, 21]


def _run(path: Path, way: Activations) -> tuple[list[Tensor], int]:
    """Log-probabilities and gradients in bfloat16; bytes on the device between forward and backward."""
    device = torch.device("cuda")
    policy = tiny.unsharded(path).to(device, torch.bfloat16)
    keep_activations(policy.decoder_layers, way, device)
    ids = torch.randint(4, 30, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1)).to(device)
    documents = documents_of(LENGTHS, device)
    scored = torch.tensor([t for t in range(sum(LENGTHS)) if t not in documents.ends.tolist()], device=device)
    before = torch.cuda.memory_allocated()
    logp, _ = policy(ids, documents, scored, torch.ones(len(scored), device=device))
    kept = torch.cuda.memory_allocated() - before
    logp.sum().backward()
    return [logp.detach(), *(parameter.grad for parameter in policy.parameters() if parameter.grad is not None)], kept


@pytest.mark.parametrize("family", ["Qwen3ForCausalLM", "Glm4MoeForCausalLM"])
def test_recomputed_and_offloaded_layers_are_equal_and_smaller(tmp_path, family):
    path = tiny.build(tmp_path, family, num_hidden_layers=6)
    plain, most = _run(path, PLAIN)
    kept = {}
    for recompute in ("none", "selective", "full"):
        for offload in (False, True):
            found, kept[recompute, offload] = _run(path, Activations(recompute, offload))
            for ours, theirs in zip(found, plain, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)
    assert kept["full", False] < kept["selective", False] < most
    assert all(kept[recompute, True] < kept[recompute, False] for recompute in ("none", "selective"))


def test_compiled_layers_compute_the_same(tmp_path):
    """Norm by norm: fused, fewer results between are rounded to bfloat16."""
    path = tiny.build(tmp_path, num_hidden_layers=2)
    (plain, _), (compiled, _) = _run(path, PLAIN), _run(path, Activations(compile=True))
    for ours, theirs in zip(compiled, plain, strict=True):
        assert torch.linalg.vector_norm((ours - theirs).float()) <= 0.03 * torch.linalg.vector_norm(theirs.float())
