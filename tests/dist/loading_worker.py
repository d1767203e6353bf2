"""One of two ranks that load a model. Arguments: its directory, and where to write what was measured."""

import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from palestra.config.schema import Train
from palestra.model import places
from palestra.model.fill import empty_model, fill
from palestra.model.load import read_config, shard
from palestra.model.policy import Policy
from palestra.train import ranks as trainer_ranks


def anonymous_bytes() -> int:
    """Without the pages of the checkpoint's files, which the kernel takes back."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def peak_of(work: Callable[[], None]) -> int:
    """What `work` adds at its peak, by a look every millisecond."""
    before, peak, is_over = anonymous_bytes(), 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not is_over.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.001)

    watch = threading.Thread(target=look)
    watch.start()
    try:
        work()
    finally:
        is_over.set()
        watch.join()
    return peak - before


def main(model: Path, out: Path) -> None:
    disable_progress_bar()
    ranks = trainer_ranks.join(Train(shard=2), deadline_s=120)

    config = read_config(str(model))
    policies = [Policy(empty_model(config, experts="grouped_mm"), head_chunk_tokens=64) for _ in range(2)]
    for policy in policies:
        shard(policy, dtype=torch.float32, experts="grouped_mm", meshes=ranks.meshes)
    fills = [partial(fill, policy.model, model, device=torch.device("cpu")) for policy in policies]
    added = peak_of(fills[0])
    kept: list[Tensor] = []
    share = places.share

    def keeping_all(whole: Tensor, like: Tensor) -> Tensor:
        kept.append(whole.clone())
        return share(whole, like)

    with patch.object(places, "share", keeping_all):
        whole = peak_of(fills[1])
    held = sum(parameter.to_local().nbytes for parameter in policies[0].parameters())
    layer = sum(parameter.numel() * 4 for parameter in policies[0].decoder_layers[0].parameters())
    found = {"added": added, "shard": held, "layer": layer, "whole": whole}
    (out / f"{ranks.rank}.json").write_text(json.dumps(found))
    dist.barrier()
    trainer_ranks.leave()
