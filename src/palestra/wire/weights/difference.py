"""What changed between two versions of a tensor, to the bit.

A tensor is taken as words, the integers that its elements' bits spell: what is put together again is what was there,
not-a-number payloads and negative zeros included. A step of reinforcement learning in bfloat16 changes one word in a
hundred, most of them to a neighbour. So a difference is, in the words' order,

  gaps    how many unchanged words lie before each changed one. The largest number that a gap's integer holds means
          "so many, and on": most take one byte.
  steps   how much each changed word grows by. A step that a byte does not hold is `FAR`, and stands in
  far     the other steps, as wide as a word.

N: words of the tensor; C: changed ones.
"""

from dataclasses import dataclass

import numpy as np
import torch

MAX_SHARE = 0.5  # of words that changed: above it a difference saves little, and costs more than it saves
FAR = -128
_GAP_TYPES = (np.uint8, np.uint16, np.uint32)


@dataclass(frozen=True)
class Difference:
    """Shapes: `gaps` is [C] or longer; `steps` is [C], 8 bits each; `far` has one for each `FAR` among them."""

    gaps: np.ndarray
    steps: np.ndarray
    far: np.ndarray

    @property
    def num_changed(self) -> int:
        return self.steps.size

    @property
    def num_bytes(self) -> int:
        return self.gaps.nbytes + self.steps.nbytes + self.far.nbytes


def between(before: torch.Tensor, after: torch.Tensor) -> Difference | None:
    """What turns `before` into `after`, both on the CPU; None where whole `after` is not larger than that.

    Errors: ValueError, if they differ in dtype or shape.
    """
    if before.dtype != after.dtype or before.shape != after.shape:
        raise ValueError(f"{after.dtype} {tuple(after.shape)} was {before.dtype} {tuple(before.shape)} before")
    before_N, after_N = _words(before), _words(after)
    differs_N = before_N != after_N
    if np.count_nonzero(differs_N) > MAX_SHARE * differs_N.size:
        return None
    changed_C = np.flatnonzero(differs_N)
    steps_C = (after_N[changed_C] - before_N[changed_C]).view(_signed(after_N.dtype))
    is_far_C = (steps_C <= FAR) | (steps_C > -FAR - 1)
    steps = np.where(is_far_C, FAR, steps_C).astype(np.int8)
    found = Difference(gaps=_gaps(changed_C), steps=steps, far=steps_C[is_far_C])
    return found if not found.num_changed or found.num_bytes < after.nbytes else None


def apply(difference: Difference, tensor: torch.Tensor) -> None:
    """Turn `tensor`, contiguous and on the CPU, into what came after it, in place.

    Whether it was what the difference was taken from, only a hash of the result can tell.
    Errors: ValueError, if the difference is of a larger tensor, or torn.
    """
    words_N = _words(tensor)
    changed_C = _positions(difference.gaps)
    steps_C = difference.steps.astype(_signed(words_N.dtype))
    is_far_C = difference.steps == FAR
    if changed_C.size != steps_C.size or np.count_nonzero(is_far_C) != difference.far.size:
        raise ValueError(
            f"a difference has {changed_C.size} positions, {steps_C.size} steps and {difference.far.size} far ones, "
            f"of which there should be {np.count_nonzero(is_far_C)}"
        )
    if changed_C.size and changed_C[-1] >= words_N.size:
        raise ValueError(f"a difference changes element {changed_C[-1]} of {words_N.size}")
    steps_C[is_far_C] = difference.far
    words_N[changed_C] += steps_C.view(words_N.dtype)


def _words(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as unsigned integers of an element's size, 8 bytes at most."""
    raw = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return raw.view(f"u{min(tensor.element_size(), 8)}")


def _signed(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"i{dtype.itemsize}")


def _gaps(changed_C: np.ndarray) -> np.ndarray:
    """In the type that makes them shortest."""
    gaps_C = np.diff(changed_C, prepend=-1) - 1
    sizes = {kind: (gaps_C // np.iinfo(kind).max + 1).sum() * np.dtype(kind).itemsize for kind in _GAP_TYPES}
    kind = min(sizes, key=lambda kind: sizes[kind])
    limit = np.iinfo(kind).max
    times_C, rest_C = np.divmod(gaps_C, limit)
    ends_C = np.cumsum(times_C + 1)
    gaps = np.full(ends_C[-1] if ends_C.size else 0, limit, kind)
    gaps[ends_C - 1] = rest_C
    return gaps


def _positions(gaps: np.ndarray) -> np.ndarray:
    """Of the changed words: as many lie before one as were skipped and as were changed."""
    is_end = gaps != np.iinfo(gaps.dtype).max
    skipped_C = np.cumsum(gaps, dtype=np.int64)[is_end]
    return skipped_C + np.arange(skipped_C.size)
