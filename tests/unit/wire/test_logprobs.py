"""What the trainer said of its tokens, and what a batch says of one rollout, found again without reading the rest."""

from pathlib import Path

import numpy as np
import pytest

from palestra.core.errors import InfrastructureError
from palestra.wire.batches import Batch, BatchFiles, decode, read_samples
from palestra.wire.logprobs import LogprobFiles


def batch_of(seed: int, *, is_constant: bool) -> Batch:
    chance = np.random.default_rng(seed)
    lengths = chance.integers(1, 9, 12)
    num = int(lengths.sum())

    def stream() -> np.ndarray:
        return np.full(num, 0.5, np.float32) if is_constant else chance.normal(size=num).astype(np.float32)

    weight = (chance.random(num) < 0.5).astype(np.float32)
    return Batch(
        step=3,
        attempt=1,
        num_packs=2,
        max_pack_tokens=64,
        token_ids=chance.integers(0, 70_000, num),
        engine_logprobs=stream(),
        advantage=stream(),
        rl_weight=weight,
        ce_weight=np.zeros_like(weight),
        ref_weight=np.zeros_like(weight),
        reference_logprobs=stream(),
        lengths=lengths,
        rollout=1000 + chance.integers(0, 5, 12),
        temperature=np.ones(12, np.float32),
        pack=chance.integers(0, 2, 12),
        version=np.full(12, 2),
    )


@pytest.mark.parametrize("is_constant", [True, False])
def test_samples_of_a_rollout_are_those_of_the_whole_batch(tmp_path: Path, is_constant: bool):
    path = BatchFiles(tmp_path).write(batch_of(1, is_constant=is_constant))
    whole = decode(path.read_bytes())
    seen = 0
    for rollout in range(999, 1006):
        for sample in read_samples(path, rollout):
            where = slice(whole.offsets[sample.index], whole.offsets[sample.index + 1])
            assert whole.rollout[sample.index] == rollout
            assert sample.token_ids.tolist() == whole.token_ids[where].tolist()
            assert sample.advantage.tolist() == whole.advantage[where].tolist()
            assert sample.weights["rl"].tolist() == whole.rl_weight[where].tolist()
            assert sample.reference_logprobs.tolist() == whole.reference_logprobs[where].tolist()
            assert sample.is_trained.tolist() == (whole.rl_weight[where] != 0).tolist()
            seen += 1
    assert seen == whole.num_samples


def test_a_torn_batch_is_told(tmp_path: Path):
    path = BatchFiles(tmp_path).write(batch_of(1, is_constant=False))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InfrastructureError, match="torn"):
        read_samples(path, 1000)


def test_each_rank_keeps_its_own(tmp_path: Path):
    files = LogprobFiles(tmp_path / "logprobs")
    said = {sample: np.arange(sample, dtype=np.float32) - 0.5 for sample in range(6)}
    files.write(7, 0, [4, 0, 2], [said[4], said[0], said[2]])
    files.write(7, 1, [1, 5, 3], [said[1], said[5], said[3]])
    files.write(8, 0, [0], [np.ones(3, np.float32)])
    found = files.read(7, [0, 3, 5, 99])
    assert {sample: values.tolist() for sample, values in found.items()} == {s: said[s].tolist() for s in (0, 3, 5)}
    files.discard_before(8)
    assert files.read(7, [0]) == {}
    assert files.read(8, [0])[0].tolist() == [1, 1, 1]


def test_a_torn_file_has_nothing(tmp_path: Path):
    files = LogprobFiles(tmp_path)
    path = files.write(1, 0, [0, 1], [np.ones(4), np.ones(4)])
    path.write_bytes(path.read_bytes()[:30])
    assert files.read(1, [0, 1]) == {}
