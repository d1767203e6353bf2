"""What a page shows and its JSON twin says: the same records, and what the client returns.

Times are unix times; `None` is what a run does not tell.
"""

from typing import Any

from msgspec import Struct, field


class RunRow(Struct, frozen=True, kw_only=True):
    """`kind` is rl, sft, eval, or "" for a config that this version cannot read."""

    id: str
    name: str
    kind: str
    state: str
    what: str  # model and environments in words
    steps: int
    total_steps: int | None
    reward: float | None
    age: float | None
    started_at: float | None
    wall_s: float | None
    error: str = ""


class Runs(Struct, frozen=True, kw_only=True):
    outputs: str
    runs: list[RunRow]


class Curve(Struct, frozen=True, kw_only=True):
    """`steps`, `times` and `values` are as long as each other; evaluations are at the version they measured."""

    name: str
    steps: list[int]
    times: list[float]
    values: list[float]


class Curves(Struct, frozen=True, kw_only=True):
    run: str
    curves: list[Curve]
    known: list[str]  # all metrics that the run has
    num_rows: int  # of metrics.jsonl, so far


class Mark(Struct, frozen=True, kw_only=True):
    """Something that happened: publish, restart, evaluation, checkpoint or warning. `step` is where curves have it."""

    kind: str
    step: float
    time: float
    text: str


class Marks(Struct, frozen=True, kw_only=True):
    run: str
    marks: list[Mark]


class Band(Struct, frozen=True, kw_only=True):
    """Shares of the wall clock of a process: `shares[cause][i]` is that of the slice [times[i], times[i + 1])."""

    process: str
    times: list[float]
    shares: dict[str, list[float]]
    seconds: dict[str, float]  # by cause, of the whole run, the largest first
    wall_s: float
    closure: float


class Ledger(Struct, frozen=True, kw_only=True):
    run: str
    bands: list[Band]
    bottleneck: str


class Restart(Struct, frozen=True, kw_only=True):
    process: str
    attempt: int
    life: int
    why: str
    ended_at: float
    gone_s: float | None


class Pool(Struct, frozen=True, kw_only=True):
    source: str
    pool: str
    num_tasks: float
    rate: float | None


class Move(Struct, frozen=True, kw_only=True):
    step: int
    source: str
    key: str
    before: str
    after: str
    rate: float
    num_rollouts: int


class Indexed(Struct, frozen=True, kw_only=True):
    """How much of the rollouts' files has been looked at."""

    share: float
    num_rollouts: int
    num_training: int


class Run(Struct, frozen=True, kw_only=True):
    row: RunRow
    config: dict[str, Any]
    summary: dict[str, Any] | None
    latest: dict[str, float | int]  # the last step's metrics
    evals: list[dict[str, Any]]
    warnings: list[dict[str, Any]]
    restarts: list[Restart]
    pools: list[Pool]
    moves: list[Move]  # the latest ones
    ledger: Ledger
    indexed: Indexed


class RolloutRow(Struct, frozen=True, kw_only=True):
    """One line of a list. `file` and `line` are its address; `said` is the end of what the policy said last."""

    file: str
    line: int
    kind: str
    step: int
    rollout_id: int
    group: int | None
    environment: str
    task: str
    ending: str
    reward: float
    num_turns: int
    num_tokens: int
    version: int | None
    age: int | None
    wall_s: float
    error: str
    said: str


class Rollouts(Struct, frozen=True, kw_only=True):
    """`after` and `before` are the cursors of the pages next to this one; empty at the ends."""

    run: str
    rollouts: list[RolloutRow]
    num_matching: int
    num_before: int
    after: str
    before: str
    environments: list[str]
    errors: list[str]
    indexed: Indexed


class GroupRow(Struct, frozen=True, kw_only=True):
    group: int
    step: int
    environment: str
    task: str
    num_rollouts: int
    mean_reward: float
    min_reward: float
    max_reward: float


class Groups(Struct, frozen=True, kw_only=True):
    run: str
    groups: list[GroupRow]
    num_matching: int
    num_before: int
    after: str
    before: str
    environments: list[str]
    indexed: Indexed


class Tokens(Struct, frozen=True, kw_only=True):
    """Part of one token sequence, from token `first` on. Streams are as long as `ids`; None is what nobody recorded."""

    seat: str
    sample: int
    num_samples: int
    first: int
    num_tokens: int
    ids: list[int]
    texts: list[str]
    sampled: list[int]
    turns: list[int | None]
    versions: list[int | None]
    engine_logprobs: list[float | None]
    trainer_logprobs: list[float | None]
    advantages: list[float | None]
    weights: list[float | None]
    notes: list[str] = field(default_factory=list)  # why a stream is missing


class Rollout(Struct, frozen=True, kw_only=True):
    run: str
    row: RolloutRow
    task: dict[str, Any]
    rewards: dict[str, float]
    metrics: dict[str, float]
    seats: list[dict[str, Any]]  # name, rewards, number of samples
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    engine_s: float
    ended_at: float | None
    versions: list[int]
    tokens: Tokens | None
    siblings: list[RolloutRow]  # the others of its group


class VersionRow(Struct, frozen=True, kw_only=True):
    version: int
    num_rollouts: int
    mean_reward: float
    mean_tokens: float


class Said(Struct, frozen=True, kw_only=True):
    row: RolloutRow
    messages: list[dict[str, Any]]


class TaskHistory(Struct, frozen=True, kw_only=True):
    """What a policy did at one task, by the oldest version that sampled a rollout; two versions beside each other."""

    run: str
    task: str
    environment: str
    prompt: Any
    answer: Any
    versions: list[VersionRow]
    one: int | None
    other: int | None
    rollouts_one: list[Said]
    rollouts_other: list[Said]


class Difference(Struct, frozen=True, kw_only=True):
    """A key of the configuration that differs; one value per run, in order."""

    key: str
    values: list[Any]


class Comparison(Struct, frozen=True, kw_only=True):
    runs: list[RunRow]
    curves: list[Curves]
    differences: list[Difference]
