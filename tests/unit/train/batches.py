"""Batches for tests: random tokens and streams, packed as asked."""

from collections.abc import Sequence

import numpy as np

from palestra.wire.batches import Batch


def make_batch(
    lengths: Sequence[int],
    *,
    packs: Sequence[int] | None = None,
    rollouts: Sequence[int] | None = None,
    step: int = 0,
    prompt: int = 2,
    temperature: float = 1.0,
    seed: int = 0,
    supervised: Sequence[int] = (),
    ages: Sequence[int] | None = None,
) -> Batch:
    """Every sample trains its tokens after the first `prompt`, by reinforcement unless it is in `supervised`."""
    rng = np.random.default_rng(seed)
    num, samples = sum(lengths), len(lengths)
    is_completion = np.concatenate([np.arange(length) >= prompt for length in lengths]).astype(np.float32)
    is_supervised = np.repeat([sample in supervised for sample in range(samples)], lengths).astype(np.float32)
    pack = np.asarray(packs if packs is not None else np.zeros(samples), np.int64)
    return Batch(
        step=step,
        attempt=1,
        num_packs=int(pack.max()) + 1,
        max_pack_tokens=max(64, num),
        token_ids=rng.integers(4, 31, num),
        engine_logprobs=(-2.0 + 0.3 * rng.standard_normal(num)).astype(np.float32) * is_completion,
        advantage=np.repeat(rng.standard_normal(samples), lengths).astype(np.float32),
        rl_weight=is_completion * (1 - is_supervised),
        ce_weight=is_completion * is_supervised,
        ref_weight=np.zeros(num, np.float32),
        reference_logprobs=np.zeros(num, np.float32),
        lengths=np.asarray(lengths),
        rollout=np.asarray(rollouts if rollouts is not None else np.arange(samples)),
        temperature=np.full(samples, temperature, np.float32),
        pack=pack,
        version=step - np.asarray(ages if ages is not None else np.zeros(samples, np.int64)),
    )
