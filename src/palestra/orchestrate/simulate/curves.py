"""What the simulator knows of engines, trainer, publishes and rollouts: measured from a run, or given by a file.

People write these files, so they are sections like those of a recipe. Times are seconds, speeds tokens per second.
"""

import math
import tomllib
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError, model_validator

from palestra.config.schema import Fraction, Section
from palestra.core.errors import UserError


class EngineCurve(Section):
    """One engine: tokens per second of all running requests together against their number; straight in between, from 0
    at none, constant beyond the last point."""

    concurrency: tuple[PositiveFloat, ...] = Field(min_length=1)
    tokens_per_s: tuple[PositiveFloat, ...] = Field(min_length=1)
    prefill_tokens_per_s: PositiveFloat | None = None  # nothing is sampled meanwhile; None: contained in tokens_per_s
    max_running: PositiveInt | None = None  # further requests wait, first come first served
    gpus: PositiveInt = 1

    def per_request(self, num_running: float) -> float:
        """Tokens per second that each of them gets."""
        total = np.interp(num_running, (0.0, *self.concurrency), (0.0, *self.tokens_per_s))
        return float(total) / num_running

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if len(self.concurrency) != len(self.tokens_per_s):
            raise ValueError(
                f"engine.concurrency has {len(self.concurrency)} points and engine.tokens_per_s "
                f"{len(self.tokens_per_s)}; give as many"
            )
        if list(self.concurrency) != sorted(set(self.concurrency)):
            raise ValueError(f"engine.concurrency={self.concurrency} must ascend")
        return self


class TrainerCurve(Section):
    """A step costs `base_s` and `s_per_token` for every token, on `gpus` ranks. More ranks divide the second part; each
    doubling keeps `efficiency` of the gain."""

    base_s: NonNegativeFloat = 0.0
    s_per_token: PositiveFloat
    gpus: PositiveInt = 1
    min_gpus: PositiveInt = 1  # fewer do not hold the model
    efficiency: Fraction = Field(default=0.95, gt=0, le=1)
    stage_s: NonNegativeFloat = 0.0  # writing a version for the engines
    checkpoint_s: NonNegativeFloat = 0.0

    def step_s(self, tokens: int, gpus: int) -> float:
        doublings = math.log2(gpus / self.gpus)
        return self.base_s + self.s_per_token * tokens / (2 * self.efficiency) ** doublings


class PublishCurve(Section):
    """One engine takes a version: it stands still for `stop_s`; the next one's turn comes `probe_s` later."""

    stop_s: NonNegativeFloat = 0.0
    probe_s: NonNegativeFloat = 0.0


class LogNormal(Section):
    """Rollouts by law. The logarithm of the sampled tokens is normal; `group_share` of its variance is the task's, the
    same for all rollouts of a group. What is longer than `max_tokens` is cut there."""

    median_tokens: PositiveFloat
    sigma: NonNegativeFloat
    max_tokens: PositiveInt
    group_share: Fraction = Field(default=0.0, ge=0, le=1)
    prompt_tokens: int = Field(default=0, ge=0)  # of all turns together
    turns: PositiveInt = 1
    env_s: NonNegativeFloat = 0.0  # outside of the engine, of all turns together
    zero_signal: Fraction = Field(default=0.0, ge=0, lt=1)  # share of groups that are dropped and replaced


class RecordedGroup(Section):
    """The rollouts of one group of a run, a value each. `position`: share of the run's steps that had their batch."""

    position: float = Field(ge=0, le=1)
    trains: bool
    sampled_tokens: tuple[int, ...] = Field(min_length=1)
    prompt_tokens: tuple[int, ...]
    turns: tuple[int, ...]
    env_s: tuple[float, ...]


class Recorded(Section):
    """Rollouts as a run had them, in dispatch order: drawn from groups that were dispatched at about the same place of
    the run, since lengths and the share of groups without signal change while the policy learns."""

    groups: tuple[RecordedGroup, ...] = Field(min_length=1)


class Curves(Section):
    """Everything the simulator needs beside a recipe. `source` says in words where it comes from."""

    source: str
    engine: EngineCurve
    trainer: TrainerCurve
    publish: PublishCurve = PublishCurve()
    batch_s: NonNegativeFloat = 0.0  # from a full batch to its arrival at the trainer
    work: LogNormal | Recorded


def read_curves(path: Path) -> Curves:
    """From JSON or TOML, by the file's name. Errors: UserError."""
    try:
        data = path.read_bytes()
        if path.suffix == ".toml":
            return Curves.model_validate(tomllib.loads(data.decode()))
        return Curves.model_validate_json(data)
    except OSError as error:
        raise UserError(f"curves {path} cannot be read: {error.strerror}; see docs/simulate.md") from error
    except (ValidationError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} holds no curves: {error}; docs/simulate.md has an example") from error
