"""vLLM's own engine for CPUs with vLLM's own capture of routed experts, which its server gives out on GPUs alone.

Arguments: a model's directory, and a file to write. Run by `test_routes.py`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCapturer,
    bind_routed_experts_capturer,
)
from vllm.utils.serial_utils import numpy2base64

NUM_PROMPT, NUM_SAID = 40, 24


class Capturer(RoutedExpertsCapturer):
    """Keeps what each step leaves in the buffer of one."""

    def __init__(self, vllm_config: Any):
        super().__init__(4096, vllm_config)
        self.heard: dict[int, list[torch.Tensor]] = {}

    def capture(self, layer_id: int, topk_ids: torch.Tensor) -> None:
        super().capture(layer_id, topk_ids)
        rows = self.snapshot_routing_data(len(topk_ids))[:, layer_id]
        self.heard.setdefault(layer_id, []).append(rows)

    def routes(self, num_tokens: int) -> torch.Tensor:
        found = torch.zeros((num_tokens, *self.shape_per_token), dtype=self.output_dtype)
        for layer, rows in self.heard.items():
            found[:, layer] = torch.cat(rows)
        return found


def main(model: Path, out: Path) -> None:
    llm = LLM(
        str(model),
        dtype="bfloat16",
        max_model_len=128,
        enforce_eager=True,
        kv_cache_memory_bytes=2**26,
        enable_chunked_prefill=False,
        max_num_batched_tokens=4096,
        logprobs_mode="processed_logprobs",
        hf_overrides={"head_dtype": "float32"},
    )
    engine = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker  # type: ignore[attr-defined]
    capturer = Capturer(llm.llm_engine.vllm_config)
    bind_routed_experts_capturer(engine.model_runner.model, capturer)
    prompt = torch.randint(4, 30, (NUM_PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    params = SamplingParams(max_tokens=NUM_SAID, seed=0, ignore_eos=True, detokenize=False, logprobs=0)
    (reply,) = llm.generate([TokensPrompt(prompt_token_ids=prompt)], params)[0].outputs
    said = list(reply.token_ids)
    found = {
        "token_ids": [*prompt, *said],
        "logprobs": [entry[token].logprob for entry, token in zip(reply.logprobs or [], said, strict=True) if entry],
        "routed_experts": numpy2base64(capturer.routes(NUM_PROMPT + NUM_SAID - 1).numpy()),
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
