"""Batches: any numbers survive the wire bit by bit, and any log of frames survives a cut."""

from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from palestra.wire.batches import Batch, decode, encode, equal
from palestra.wire.framelog import FrameLog, read_frames

INTEGERS = {"token_ids": (0, 2**31), "rollout": (0, 2**62), "pack": (0, 255), "version": (0, 10**6)}
FLOATS = ("engine_logprobs", "advantage", "rl_weight", "ce_weight", "ref_weight", "reference_logprobs")


@st.composite
def streams(draw: st.DrawFn, size: int) -> np.ndarray:
    """Any 32-bit floats, or runs of equal ones."""
    if draw(st.booleans()):
        return draw(arrays.arrays(np.float32, size, elements=st.floats(width=32, allow_subnormal=True)))
    few = draw(st.lists(st.floats(width=32), min_size=1, max_size=3))
    chosen = draw(arrays.arrays(np.int64, size, elements=st.integers(0, len(few) - 1)))
    return np.array(few, np.float32)[np.sort(chosen)]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    lengths = np.array(draw(st.lists(st.integers(1, 40), max_size=6)), np.int64)
    num_tokens, num_samples = int(lengths.sum()), lengths.size
    integers = {
        name: draw(
            arrays.arrays(np.int64, num_tokens if name == "token_ids" else num_samples, elements=st.integers(*span))
        )
        for name, span in INTEGERS.items()
    }
    return Batch(
        step=draw(st.integers(0, 10**6)),
        attempt=draw(st.integers(1, 100)),
        num_packs=draw(st.integers(1, 64)),
        max_pack_tokens=4096,
        lengths=lengths,
        temperature=draw(streams(num_samples)),
        **integers,
        **{name: draw(streams(num_tokens)) for name in FLOATS},
    )


@given(batches())
def test_every_number_survives_bit_by_bit(before: Batch):
    after = decode(encode(before))
    assert equal(after, before)
    for field in fields(Batch):
        one, other = np.asarray(getattr(before, field.name)), np.asarray(getattr(after, field.name))
        assert one.tobytes() == other.tobytes(), field.name


@given(st.lists(st.binary(max_size=50), max_size=8), st.data())
def test_a_cut_log_is_a_prefix_of_its_frames(frames: list[bytes], data: st.DataObject):
    with TemporaryDirectory() as directory:
        path = Path(directory) / "log"
        log = FrameLog(path)
        for frame in frames:
            log.append(frame)
        log.close()
        whole = path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
        kept = list(read_frames(path))
        assert kept == frames[: len(kept)]
        assert path.stat().st_size - sum(8 + len(frame) for frame in kept) < 8 + max(map(len, frames), default=1)
