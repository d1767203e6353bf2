"""What a measurement of the trainer is asked and answers, between the command and its processes. Imports no torch."""

from typing import Any, Literal

from msgspec import Struct


class Job(Struct, frozen=True, kw_only=True):
    """`config` is a RunConfig with a model in a directory. `packs` has the documents' lengths, pack by pack, of one
    step of all ranks. `prompt_share` of each document is not trained. `profile`: a file for what takes the time of one
    more step, or empty."""

    config: dict[str, Any]
    packs: list[list[int]]
    kind: Literal["rl", "sft"]
    prompt_share: float
    steps: int
    warmup_steps: int = 1
    profile: str = ""

    @property
    def lengths(self) -> list[int]:
        return [length for pack in self.packs for length in pack]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def prompt_of(self, length: int) -> int:
        """Tokens before the first trained one: the first token of all has no log-probability."""
        return max(int(length * self.prompt_share) if self.kind == "rl" else 1, 1)

    @property
    def num_scored(self) -> int:
        return sum(length - self.prompt_of(length) for length in self.lengths)


class Speed(Struct, frozen=True, kw_only=True):
    """What the first rank saw: wall and processor seconds of each step. `product_flops` is what a large matrix product
    reaches here. Bytes are of its device, or of its process on a CPU: before the model, with the model and nothing
    else, at the peak of all steps."""

    who: str
    device: str
    attention: list[str]  # kernels over packs
    ranks: int
    steps_s: list[float]
    cpu_s: list[float]
    parts_s: dict[str, float]
    bytes_before: int
    bytes_loaded: int
    bytes_peak: int
    flops: int
    product_flops: float
    loss: float
    parameters: int
