"""Batches on the wire: what they cost, what survives, what is refused."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from palestra.core.errors import FencedError, InfrastructureError
from palestra.core.files import write_atomically
from palestra.wire.batches import Batch, BatchFiles, decode, encode, equal

RNG = np.random.default_rng(0)


def batch(*, num_samples: int, prompt: int, reply: int, turns: int = 1, vocabulary: int = 151_936) -> Batch:
    """Samples of `turns` turns: the prompt (or the environment's message) is not trained, the reply is."""
    turn_weight = np.concatenate([np.zeros(prompt), np.ones(reply)])
    weight = np.tile(turn_weight, turns * num_samples).astype(np.float32)
    length = (prompt + reply) * turns
    size = length * num_samples
    advantage = np.repeat(RNG.normal(size=num_samples), length).astype(np.float32)
    logprobs = np.where(weight > 0, -RNG.exponential(size=size), 0).astype(np.float32)
    return Batch(
        step=3,
        attempt=2,
        num_packs=4,
        max_pack_tokens=4 * length,
        token_ids=RNG.integers(0, vocabulary, size),
        engine_logprobs=logprobs,
        advantage=advantage,
        rl_weight=weight,
        ce_weight=np.zeros(size, np.float32),
        ref_weight=np.zeros(size, np.float32),
        reference_logprobs=np.zeros(size, np.float32),
        lengths=np.full(num_samples, length),
        rollout=np.arange(num_samples) + 70_000,
        temperature=np.ones(num_samples, np.float32),
        pack=RNG.integers(0, 4, num_samples),
        version=RNG.integers(1, 4, num_samples),
    )


def bytes_per_token(one: Batch) -> float:
    return len(encode(one)) / one.num_tokens


@pytest.mark.parametrize(
    ("shape", "most"),
    [
        (
            {"num_samples": 256, "prompt": 12, "reply": 8, "vocabulary": 60},
            8.0,
        ),  # the quickstart's: words of a few letters
        ({"num_samples": 256, "prompt": 100, "reply": 300}, 9.0),
        ({"num_samples": 64, "prompt": 500, "reply": 4000}, 9.0),
        ({"num_samples": 32, "prompt": 40, "reply": 60, "turns": 20}, 9.0),  # many turns: the mask changes often
        ({"num_samples": 256, "prompt": 100, "reply": 300, "vocabulary": 49_152}, 7.0),
    ],
)
def test_a_token_costs_at_most_ten_bytes(shape: dict, most: float):
    assert bytes_per_token(batch(**shape)) <= most <= 10


def test_a_stream_that_is_constant_in_a_sample_costs_a_value_per_sample():
    plain = batch(num_samples=64, prompt=100, reply=300)
    flat = replace(plain, advantage=np.zeros_like(plain.advantage))
    assert len(encode(plain)) - len(encode(flat)) <= 64 * (4 + 2) + 64
    noisy = replace(plain, advantage=RNG.normal(size=plain.num_tokens).astype(np.float32))
    assert len(encode(noisy)) - len(encode(plain)) > 3.9 * plain.num_tokens  # what storing it per token would cost


def test_a_batch_survives_the_wire():
    before = batch(num_samples=5, prompt=3, reply=4)
    assert equal(decode(encode(before)), before)


@pytest.mark.parametrize(
    "field", ["token_ids", "engine_logprobs", "advantage", "rl_weight", "pack", "version", "temperature"]
)
def test_equal_sees_one_changed_number(field: str):
    before = batch(num_samples=5, prompt=3, reply=4)
    changed = getattr(before, field).copy()
    changed[-1] += 1
    assert not equal(before, replace(before, **{field: changed}))


def test_an_empty_batch_survives_the_wire():
    full = batch(num_samples=1, prompt=1, reply=1)
    nothing = {name: getattr(full, name)[:0] for name in full.__dict__ if isinstance(getattr(full, name), np.ndarray)}
    assert equal(decode(encode(replace(full, **nothing))), replace(full, **nothing))


def test_offsets_cut_samples():
    assert batch(num_samples=3, prompt=1, reply=1).offsets.tolist() == [0, 2, 4, 6]


def test_torn_at_any_byte_is_refused_by_name():
    data = encode(batch(num_samples=4, prompt=3, reply=4))
    for size in range(len(data)):
        with pytest.raises(InfrastructureError, match=r"000003\.batch"):
            decode(data[:size], source="000003.batch")


# --- files


def test_files_hold_steps(tmp_path: Path):
    files = BatchFiles(tmp_path / "batches")
    written = [replace(batch(num_samples=2, prompt=1, reply=2), step=step) for step in (0, 7, 12)]
    for one in written:
        files.write(one)
    assert files.steps() == [0, 7, 12]
    assert equal(files.read(7, attempt=2), written[1])
    files.discard_before(7)
    assert files.steps() == [7, 12]


def test_a_leftover_of_an_older_attempt_is_refused(tmp_path: Path):
    files = BatchFiles(tmp_path)
    files.write(batch(num_samples=1, prompt=1, reply=1))  # of attempt 2
    assert files.read(3, attempt=2).attempt == 2
    assert files.read(3, attempt=3).attempt == 2  # a later attempt trains what the earlier one left
    with pytest.raises(FencedError, match="written by attempt 2, this process belongs to attempt 1"):
        files.read(3, attempt=1)


def test_a_file_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "x"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path: Path):
    path = tmp_path / "manifest.json"
    path.write_bytes(b"old")
    script = (
        "import resource, signal, sys; from pathlib import Path; from palestra.core.files import write_atomically\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "write_atomically(Path(sys.argv[1]), b'x' * 1000)"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert "InfrastructureError: could not write" in ended.stderr
    assert "free space and resume" in ended.stderr
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
