"""What may be asked: the parameters of every page and of its JSON twin."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_ROWS = 200
Sort = Literal[
    "newest", "oldest", "reward", "-reward", "tokens", "-tokens", "turns", "-turns", "age", "-age", "-wall_s"
]
GroupSort = Literal["newest", "oldest", "reward", "-reward", "-spread"]
Kind = Literal["", "training", "evaluation"]
Limit = Annotated[int, Field(ge=1, le=MOST_ROWS, description="rows of a page")]
Place = Annotated[str, Field(max_length=300, description="a cursor that a page before gave")]


class Query(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Nothing(Query):
    """No parameters."""


class Where(Query):
    """Which rollouts. A bound that is left out bounds nothing; bounds themselves are within."""

    kind: Kind = Field(default="", description="training or evaluation; empty: both")
    environment: str = ""
    ending: str = Field(default="", description="ok, truncated, failed or invalid")
    error: str = Field(default="", max_length=300, description="`any`, `none`, or the first line of the error")
    min_reward: float | None = None
    max_reward: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    min_step: int | None = Field(default=None, description="of an evaluation: the policy version")
    max_step: int | None = None
    min_age: int | None = None
    max_age: int | None = None
    group: int | None = Field(default=None, ge=0, lt=2**62, description="number of a group of training")
    task: str = Field(default="", max_length=4000, description="key of a task")


class Rollouts(Where):
    sort: Sort = "newest"
    after: Place = ""
    before: Place = ""
    limit: Limit = 50


class Groups(Query):
    environment: str = ""
    min_reward: float | None = Field(default=None, description="mean over the group")
    max_reward: float | None = None
    min_step: int | None = None
    max_step: int | None = None
    signal: Literal["", "yes", "no"] = Field(default="", description="yes: its rewards differ; no: they are all equal")
    task: str = Field(default="", max_length=4000)
    sort: GroupSort = "newest"
    after: Place = ""
    before: Place = ""
    limit: Limit = 50


class Rollout(Query):
    sample: int = Field(default=0, ge=0, description="which token sequence, over all seats")
    first: int = Field(default=0, ge=0, description="the first token shown")


class OfTask(Query):
    task: str = Field(max_length=4000, description="key of the task")
    one: int | None = Field(default=None, description="policy version; default: the oldest there is")
    other: int | None = Field(default=None, description="policy version; default: the newest there is")
    environment: str = ""
    kind: Kind = ""


class Curves(Query):
    names: str = Field(
        default="", max_length=4000, description="metrics, with commas between; empty: those of the overview"
    )
    points: int = Field(default=1000, ge=10, le=20_000, description="at most so many of each curve")


class Compare(Query):
    runs: str = Field(default="", max_length=4000, description="ids of runs, with commas between")
    names: str = Field(default="", max_length=4000)
    points: int = Field(default=500, ge=10, le=20_000)


class Events(Query):
    run: str = Field(default="", description="only of this run")
