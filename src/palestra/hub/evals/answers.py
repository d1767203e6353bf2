"""What the pages of evaluations show, and their JSON twins say. Times are seconds since 1970."""

from typing import Any

from msgspec import Struct

from palestra.algo.intervals import Interval
from palestra.algo.standing import Standing, TaskPair
from palestra.hub.answers import RolloutRow


class EvaluationRow(Struct, frozen=True, kw_only=True):
    """A line of a leaderboard. `is_known_version`: the hub has that version of the environment.

    `status` is new, verified, differs (scored again, it gave other rewards) or unverifiable; `note` says why.
    """

    id: str
    pushed_by: str
    name: str
    model: str
    served: str
    version: str  # of the environment
    is_known_version: bool
    library: str  # version of palestra
    split: str
    temperature: float | None
    rollouts_per_task: int | None
    imported: str
    standing: Standing
    verified: bool
    status: str
    note: str
    created: float


class Leaderboard(Struct, frozen=True, kw_only=True):
    """`versions`, `libraries`, `models` and `splits` are those that there are to filter by."""

    owner: str
    environment: str
    rows: list[EvaluationRow]
    num_matching: int
    page: int
    is_last: bool
    versions: list[str]
    libraries: list[str]
    models: list[str]
    splits: list[str]


class EvaluationPage(Struct, frozen=True, kw_only=True):
    """`reproduce` are commands, a line each; empty, where what is known does not suffice."""

    owner: str
    environment: str
    row: EvaluationRow
    told: dict[str, Any]
    reproduce: list[str]
    notes: list[str]
    digest: str
    num_bytes: int  # of the rollouts, unpacked
    may_delete: bool


class EvaluationRollouts(Struct, frozen=True, kw_only=True):
    """`after` and `before` are the cursors of the pages next to this one; empty at the ends."""

    owner: str
    environment: str
    evaluation: str
    rollouts: list[RolloutRow]
    num_matching: int
    num_before: int
    after: str
    before: str
    errors: list[str]


class SettingDifference(Struct, frozen=True, kw_only=True):
    key: str
    one: Any
    other: Any


class EvaluationComparison(Struct, frozen=True, kw_only=True):
    """`difference` is that of `other` minus `one`, task by task; of `pairs` a page, the largest difference first."""

    owner: str
    environment: str
    one: EvaluationRow
    other: EvaluationRow
    difference: Interval
    won: int
    lost: int
    alike: int
    only_one: int
    only_other: int
    settings: list[SettingDifference]
    pairs: list[TaskPair]
    num_pairs: int
    page: int
    is_last: bool


class EvaluationPushed(Struct, frozen=True, kw_only=True):
    """`is_new` is false, if exactly this was there before."""

    owner: str
    environment: str
    id: str
    is_new: bool
    url: str
    standing: Standing
