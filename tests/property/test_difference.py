"""What changed between two versions of a tensor, applied to the one, is the other to the bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from palestra.wire.weights.difference import FAR, MAX_SHARE, Difference, apply, between

WORDS = {torch.bfloat16: np.uint16, torch.float32: np.uint32, torch.uint8: np.uint8, torch.float64: np.uint64}


def as_tensor(words: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(words.view(np.uint8).copy()).view(dtype)


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.uint8).tolist()


@st.composite
def versions(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Any bits, not-a-numbers and negative zeros among them; some of them change, to a neighbour or to anything."""
    dtype = draw(st.sampled_from(list(WORDS)))
    kind = WORDS[dtype]
    before = draw(arrays.arrays(kind, draw(st.integers(1, 400)), elements=st.integers(0, np.iinfo(kind).max)))
    after = before.copy()
    for position in draw(st.lists(st.integers(0, before.size - 1), max_size=before.size)):
        step = draw(st.integers(-130, 130) | st.integers(0, np.iinfo(kind).max))
        after[position] = (int(after[position]) + step) % (1 << (8 * after.itemsize))
    return as_tensor(before, dtype), as_tensor(after, dtype)


@given(versions())
def test_the_version_after_comes_out_to_the_bit(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    before, after = pair
    difference = between(before, after)
    if difference is None:
        return
    kind = WORDS[before.dtype]
    old, new = (tensor.view(torch.uint8).numpy().view(kind) for tensor in pair)
    assert difference.num_changed == np.count_nonzero(old != new)
    assert difference.num_bytes < after.nbytes or not difference.num_changed
    apply(difference, before)
    assert bits(before) == bits(after)


def test_by_hand() -> None:
    """Words 1 and 300 of 1000 change: one to its neighbour, one by far more than a byte holds."""
    before = torch.zeros(1000, dtype=torch.bfloat16)
    after = before.clone()
    after.view(torch.int16)[1] = 1
    after[300] = -0.0  # the sign bit alone
    difference = between(before, after)
    assert difference is not None
    assert difference.gaps.tolist() == [1, 255, 43], "one before the first; 255 and 43 more between the two"
    assert difference.steps.tolist() == [1, FAR]
    assert difference.far.tolist() == [-(1 << 15)]
    assert difference.num_bytes == 3 + 2 + 2


def test_long_gaps_take_a_wider_integer() -> None:
    before = torch.zeros(1 << 20, dtype=torch.int16)
    after = before.clone()
    after[:: 1 << 15] = 1
    difference = between(before, after)
    assert difference is not None
    assert (difference.gaps.dtype, difference.gaps.size) == (np.uint16, 32)


def test_nothing_changed_is_nothing_sent() -> None:
    payload = torch.tensor([float("nan"), -0.0, 1.0])
    difference = between(payload, payload.clone())
    assert difference is not None
    assert (difference.num_changed, difference.num_bytes) == (0, 0)
    empty = between(torch.zeros(0), torch.zeros(0))
    assert empty is not None
    assert empty.num_bytes == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_changed_goes_whole(dtype: torch.dtype) -> None:
    before = torch.ones(100, dtype=dtype)
    assert between(before, before * 2) is None
    half = before.clone()
    half.view(torch.uint8)[: int(MAX_SHARE * half.nbytes) : half.element_size()] += 1
    assert between(before, half) is not None


def test_another_shape_or_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float32 \(5,\) was torch.float32 \(4,\) before"):
        between(torch.zeros(4), torch.zeros(5))
    with pytest.raises(ValueError, match="was"):
        between(torch.zeros(4), torch.zeros(4, dtype=torch.float64))


def test_a_torn_difference_is_refused() -> None:
    steps, far = np.array([1, FAR], np.int8), np.array([500], np.int16)
    tensor = torch.zeros(8, dtype=torch.bfloat16)
    for torn in (
        Difference(gaps=np.array([1], np.uint8), steps=steps, far=far),
        Difference(gaps=np.array([1, 2], np.uint8), steps=steps, far=far[:0]),
        Difference(gaps=np.array([1, 6], np.uint8), steps=steps, far=far),  # the ninth word
    ):
        with pytest.raises(ValueError, match="a difference"):
            apply(torn, tensor)
    assert bits(tensor) == [0] * 16, "nothing of it was applied"
