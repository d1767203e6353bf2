"""The real engine's choice of experts in the trainer: same layers, same experts, and a smaller gap between both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from palestra.infer import engine_environment
from palestra.model.documents import documents_of
from palestra.wire.routes import as_array, read_routes
from tests.unit.model import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def with_close_experts(path: Path) -> Path:
    """Routers for which experts are nearly as good as each other: rounding decides."""
    tensors = load_file(path / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith("mlp.gate.weight"):
            tensors[name] = weight[:1] + 0.04 * weight
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_real_engines_choices_bring_the_trainer_nearer_to_it(tmp_path):
    """In bfloat16, the trainer in float32. The first layer has no experts."""
    differs = {"num_experts": 8, "num_hidden_layers": 3, "mlp_only_layers": [0], "head_dim": 32}
    path = with_close_experts(tiny.build(tmp_path, "Qwen3MoeForCausalLM", **differs))
    out, own = tmp_path / "found.json", engine_environment(model=str(path), device="cpu")
    command = [sys.executable, "-m", "tests.integration.routes_of_engine", str(path), str(out)]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=240)
    assert out.exists(), done.stderr[-2000:]
    found = json.loads(out.read_text())
    token_ids, engine_logp = torch.tensor(found["token_ids"]), torch.tensor(found["logprobs"])
    num, said = len(token_ids), len(engine_logp)
    known = torch.from_numpy(as_array(read_routes(found["routed_experts"], num_tokens=num - 1)).astype("int16"))
    policy = tiny.unsharded(path)
    policy.routers.accept_routes(policy.decoder_layers)
    assert not known[:, 0].any(), "of a layer without experts"

    def measured(routes: Tensor) -> tuple[float, float]:
        """Mean gap to the engine, and the share of tokens and layers for which the trainer would choose otherwise."""
        policy.routers.forget()
        scored = torch.arange(num - said, num)
        with torch.no_grad():
            logp, _ = policy(token_ids, documents_of([num]), scored, torch.ones(said), routes)
        other, given, _ = policy.routers.replay._counts.tolist()
        return float((logp - engine_logp).abs().mean()), other / max(given, 1)

    last = torch.full_like(known[:1], -1)
    gap, rerouted = measured(torch.cat([known, last]))
    alone, _ = measured(torch.cat([known * 0 - 1, last]))
    shifted, of_shifted = measured(torch.cat([known.roll(1, 0), last]))
    _, of_swapped = measured(torch.cat([known[:, [0, 2, 1]], last]))
    print(f"gap {gap:.4f}, without replay {alone:.4f}, one token off {shifted:.4f}; rerouted {rerouted:.3f}")
    assert 0 < rerouted < 0.2 < min(of_shifted, of_swapped)
    assert gap < 0.5 * alone < 0.5 * shifted
