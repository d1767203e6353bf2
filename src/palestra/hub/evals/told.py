"""What an evaluation says of itself: `evaluation.json` of an archive. Whoever pushes it may have written anything.

Everything that is shown, counted or run later is checked here, or counted from the rollouts themselves.
"""

import json
import shlex
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_ARGS_CHARS = 20_000
Short = Annotated[str, Field(max_length=200)]
Long = Annotated[str, Field(max_length=1000)]
# What a stranger's command may set on the machine of whoever copies it: sizes and times. No paths, no programs, no
# flags of engines, no weaker sandbox.
OVERRIDE = (
    r"^(engine\.(max_model_len|tensor_parallel|join_max_tokens|call_s)|env\.(retries|stall_s)"
    r"|sandbox\.(memory_mb|disk_mb|processes|cpus|timeout_s)|eval\.sets\.0\.top_p)=[0-9][0-9.e+-]{0,30}$"
)
Override = Annotated[str, Field(pattern=OVERRIDE)]
Version = Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9._+!-]*$")]


class Told(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SeatTold(Told):
    """Who spoke for another seat."""

    url: Long
    model: Short
    temperature: float = Field(default=1.0, ge=0, le=100)
    max_tokens: int | None = Field(default=None, ge=1, le=10**9)


class Evaluation(Told):
    """One environment measured with one model. A field that is None is not known: `missing` says so in words."""

    format: Literal[1] = 1
    name: Short = ""
    environment: str = Field(
        min_length=1, max_length=200, pattern="^[^-]", description="as `palestra eval` was given it"
    )
    environment_version: Version = ""
    palestra: Version = ""
    model: str = Field(min_length=1, max_length=500, pattern=r"^[^\x00]+$")  # of which PostgreSQL takes none
    served: Literal["endpoint", "checkpoint", "elsewhere"]
    endpoint: Long = ""
    split: Short | None = None
    args: dict[str, Any] = {}
    seats: dict[Short, SeatTold] = {}
    num_tasks: int | None = Field(default=None, ge=1, le=10**7)
    rollouts_per_task: int | None = Field(default=None, ge=1, le=10**5)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1, le=10**9)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    sandbox: Short | None = None
    overrides: tuple[Override, ...] = Field(default=(), max_length=50)
    started_at: float | None = Field(default=None, ge=0, le=1e11)
    ended_at: float | None = Field(default=None, ge=0, le=1e11)
    imported: Literal["", "verifiers"] = ""
    missing: tuple[Long, ...] = Field(default=(), max_length=20)

    @model_validator(mode="after")
    def _is_bounded(self) -> Self:
        if len(json.dumps(self.args)) > MOST_ARGS_CHARS:
            raise ValueError(f"args are longer than {MOST_ARGS_CHARS:,} characters")
        if not self.imported and None in (self.num_tasks, self.rollouts_per_task, self.temperature, self.seed):
            raise ValueError("num_tasks, rollouts_per_task, temperature and seed may be unknown in an import alone")
        return self


def without_secrets(url: str) -> str:
    """An address without user, password and query, which may hold keys."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def reproduce(told: Evaluation, *, index: str = "", project: str = "") -> list[str]:
    """Commands, one a line, that play it again: nothing in them is more than a word of `palestra eval`. The sandbox is
    that of whoever plays.

    `index` and `project`: where its environment is installed from. Empty, where settings are missing.
    """
    if told.imported or told.num_tasks is None:
        return []
    lines = []
    if index and project:
        pinned = f"{project}=={told.environment_version}" if told.environment_version else project
        lines.append(shlex.join(["pip", "install", "--extra-index-url", index, pinned]))
    return [*lines, shlex.join(_eval_words(told))]


def _eval_words(told: Evaluation) -> list[str]:
    model = (
        ["--base-url", told.endpoint, "--model", told.model]
        if told.served == "endpoint"
        else ["--checkpoint", told.model]
    )
    options = {
        "-n": told.num_tasks,
        "-r": told.rollouts_per_task,
        "--temperature": told.temperature,
        "--max-tokens": told.max_tokens,
        "--split": told.split,
        "--seed": told.seed,
        "--args": json.dumps(told.args) if told.args else None,
    }
    given = [word for name, value in options.items() if value is not None for word in (name, _plain(value))]
    seats = [word for name, seat in told.seats.items() for word in ("--seat", f"{name}={seat.url},{seat.model}")]
    return ["palestra", "eval", told.environment, *model, *given, *seats, *told.overrides]


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
