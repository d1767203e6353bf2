"""On a CUDA device the policy computes what it computes on the CPU. One command: `python -m pytest tests/gpu`."""

import pytest
import torch

from palestra.model.documents import documents_of
from palestra.model.policy import Policy
from tests.unit.model import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = [12, 3, 30, 7]


def _logps(policy: Policy, device: str) -> torch.Tensor:
    ids = torch.randint(4, 30, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1)).to(device)
    documents = documents_of(LENGTHS, device)
    scored = torch.tensor([t for t in range(sum(LENGTHS)) if t not in documents.ends.tolist()]).to(device)
    logp, _ = policy(ids, documents, scored, torch.full((len(scored),), 0.7, device=device))
    logp.sum().backward()
    return logp.detach().cpu()


@pytest.mark.parametrize("architecture", tiny.FAMILIES)
def test_log_probabilities_and_gradients_equal_those_of_the_cpu(tmp_path, architecture):
    path = str(tiny.build(tmp_path, architecture))
    policies = {device: tiny.unsharded(path, experts="eager").to(device) for device in ("cpu", "cuda")}
    logps = {device: _logps(policy, device) for device, policy in policies.items()}
    torch.testing.assert_close(logps["cpu"], logps["cuda"], atol=1e-4, rtol=1e-3)
    pairs = zip(policies["cpu"].named_parameters(), policies["cuda"].parameters(), strict=True)
    for (name, one), other in pairs:
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad.cpu(), atol=1e-3, rtol=1e-2, msg=name)
