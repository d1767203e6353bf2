"""What may be asked of the pages of evaluations."""

from typing import Annotated, Literal

from pydantic import Field

from palestra.hub.queries import Limit, Place, Query, Sort

PER_PAGE = 50
BoardSort = Literal["reward", "-reward", "tokens", "-tokens", "newest", "oldest", "model"]
Page = Annotated[int, Field(ge=1, le=10_000)]
Id = Annotated[str, Field(max_length=32, pattern=r"^[0-9a-f]*$")]


class Board(Query):
    sort: BoardSort = "-reward"
    version: str = Field(default="", max_length=100, description="of the environment")
    library: str = Field(default="", max_length=100, description="of palestra")
    model: str = Field(default="", max_length=500)
    split: str = Field(default="", max_length=200)
    verified: Literal["", "yes", "no"] = ""
    page: Page = 1


class Rollouts(Query):
    ending: str = Field(default="", description="ok, truncated, failed or invalid")
    error: str = Field(default="", max_length=300, description="`any`, `none`, or the first line of the error")
    min_reward: float | None = None
    max_reward: float | None = None
    task: str = Field(default="", max_length=4000)
    sort: Sort = "oldest"
    after: Place = ""
    before: Place = ""
    limit: Limit = 50


class Comparison(Query):
    one: Id
    other: Id
    which: Literal["", "won", "lost", "alike"] = Field(default="", description="what `other` did, task by task")
    page: Page = 1
