"""What the trainer said of the tokens it trained: a file per step and rank, beside the batches, for people to look at.

The log-probabilities are those of the forward pass of the step, at the sample's temperature: of version `step`.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from palestra.core.files import write_atomically

_MAGIC = b"palestra-logprobs-1\n"


class LogprobFiles:
    def __init__(self, directory: Path):
        self.directory = directory

    def _path(self, step: int, rank: int) -> Path:
        return self.directory / f"{step:06d}-{rank}.logprobs"

    def write(self, step: int, rank: int, samples: Sequence[int], logprobs: Sequence[np.ndarray]) -> Path:
        """`logprobs[i]` are those of the trained tokens of the batch's sample `samples[i]`, in order.
        Errors: InfrastructureError, if the disk is full."""
        self.directory.mkdir(parents=True, exist_ok=True)
        table = np.array([samples, [len(of_sample) for of_sample in logprobs]], "<u4").reshape(2, len(samples))
        header = msgspec.msgpack.encode({"step": step, "samples": len(samples)})
        values = np.concatenate([*logprobs, np.zeros(0)]).astype("<f4")
        data = [_MAGIC, len(header).to_bytes(4, "little"), header, table.tobytes(), values.tobytes()]
        return write_atomically(self._path(step, rank), b"".join(data))

    def discard_before(self, step: int) -> None:
        for path in self.directory.glob("*.logprobs"):
            if int(path.name.partition("-")[0]) < step:
                path.unlink(missing_ok=True)

    def read(self, step: int, samples: Sequence[int]) -> dict[int, np.ndarray]:
        """By sample, of those that were kept; a file that cannot be read has none."""
        found: dict[int, np.ndarray] = {}
        for path in self.directory.glob(f"{step:06d}-*.logprobs"):
            try:
                found |= _read(path, set(samples))
            except (OSError, ValueError, KeyError, TypeError, msgspec.DecodeError):
                continue
        return found


def _read(path: Path, wanted: set[int]) -> dict[int, np.ndarray]:
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            return {}
        header = msgspec.msgpack.decode(file.read(int.from_bytes(file.read(4), "little")))
        num = header["samples"]
        table = np.frombuffer(file.read(8 * num), "<u4").reshape(2, num)
        begin, ends = file.tell(), np.cumsum(table[1])
        found = {}
        for i in np.flatnonzero(np.isin(table[0], list(wanted))).tolist():
            file.seek(begin + 4 * int(ends[i] - table[1, i]))
            found[int(table[0, i])] = np.frombuffer(file.read(4 * int(table[1, i])), "<f4")
        return found
