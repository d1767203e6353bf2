"""What it takes on a CPU to find what changed, and to put it in place, by the code of `sync.kind=sparse_nccl`.

    python benchmarks/weight_changes.py [--layers 14] [--changed 0.01]

Weights are random, in the shapes of Qwen3-0.6B's layers and embedding, in bfloat16. The network is not in it.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)

from palestra.wire.weights.changes import Past, digest_of

WIDTH, INNER, HEADS, VOCABULARY = 1024, 3072, 2048, 151_936
LAYER = ((HEADS, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, HEADS), (INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER))


class Plain(torch.nn.Module):
    """An engine's model whose weights are named as they are published."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        self.held = weights

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> set[str]:
        for name, tensor in weights:
            self.held[name].copy_(tensor)
        return {name for name, _ in weights}


def changed(weights: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """To neighbours, as most changes of a step are."""
    generator, found = torch.Generator().manual_seed(1), {}
    for name, tensor in weights.items():
        words = tensor.clone().view(torch.int16).view(-1)
        words[torch.randint(words.numel(), (int(words.numel() * share),), generator=generator)] += 1
        found[name] = words.view(tensor.dtype).view(tensor.shape)
    return found


def timed(what: str, do: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    found = do()
    print(f"{what:40s} {time.perf_counter() - began:7.2f} s")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--changed", type=float, default=0.01)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shapes = [(VOCABULARY, WIDTH), *(shape for _ in range(arguments.layers) for shape in LAYER)]
    before = {f"w{number}": torch.randn(shape).to(torch.bfloat16) for number, shape in enumerate(shapes)}
    after, past = changed(before, arguments.changed), Past(rank=0, num_ranks=1)
    timed("copied once", lambda: list(past.keep(iter(before.items()), "0")))
    found = timed("changes found", lambda: past.step(after.items(), "1"))
    timed("digest", lambda: digest_of(found.patches))
    patches = [
        CheckpointWeightPatch(patch.name, patch.shape, patch.values_C.dtype, patch.values_C, patch.at_C)
        for patch in found.patches
    ]
    timed("put in place by vLLM", lambda: load_checkpoint_weight_patches(Plain(before), patches))
    is_same = all(torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)) for name in after)
    print(f"{found.sent_bytes:,} of {found.full_bytes:,} bytes: {found.sent_bytes / found.full_bytes:.2%}; ", end="")
    print("the same to the bit" if is_same else "NOT THE SAME")


if __name__ == "__main__":
    main()
