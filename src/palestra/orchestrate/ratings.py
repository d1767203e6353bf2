"""What rollouts tell the curriculum, and when it counts.

Consumes: groups that close. Produces: `TasksRated` in the journal, and the moves between pools in curriculum.jsonl.
"""

from palestra.config.schema import RunConfig
from palestra.orchestrate.curriculum import Pool, Result, Rules, observe, rate
from palestra.orchestrate.desk import Desk
from palestra.orchestrate.state import Group, LoopState, TasksRated

_STEPS_WITHOUT_BATCH = 8  # steps' worth of closed groups after which ratings do not wait for a batch


def rules_of(config: RunConfig) -> Rules:
    curriculum, algo = config.env.curriculum, config.algo
    weights = {pool: getattr(curriculum.weights, pool) for pool in (Pool.EASY, Pool.NORMAL, Pool.HARD)}
    return Rules(
        weights={pool: weight for pool, weight in weights.items() if weight > 0},
        easy_above=curriculum.easy_above,
        hard_below=curriculum.hard_below,
        window_groups=curriculum.window_groups,
        retire_at=curriculum.retire_at,
        retire_rollouts=config.retire_rollouts,
        solved_at=curriculum.solved_at if curriculum.rate == "solved" else None,
        rest_groups=algo.max_outstanding // algo.group_size,
        remember=curriculum.remember,
        seed=config.train.seed,
    )


def observe_group(config: RunConfig, group: Group) -> Result:
    """What a group that closes tells of its task: all its valid rollouts, whether they train or not."""
    return observe(group.valid, rules_of(config).solved_at) if config.env.curriculum.on else Result(0.0, 0)


def observe_unclosed(config: RunConfig, groups: list[Group]) -> dict[int, Result]:
    """The same of groups that train before all their members ended, by group: of those that did."""
    if not config.env.curriculum.on:
        return {}
    return {group.group_id: observe_group(config, group) for group in groups if not group.is_observed}


def rate_tasks(desk: Desk) -> None:
    """Let what was observed count. Called before a batch is shipped: with `algo.max_age` 0 all earlier groups have
    closed by then, so that draws do not depend on which closed first."""
    rules = rules_of(desk.config)
    ratings = [rating for label, pools in desk.state.pools.items() for rating in rate(label, pools, rules)]
    if ratings:
        desk.journal.record(TasksRated(step=desk.state.next_step, ratings=ratings))
        log_moves(desk)


def rate_if_long_without_batch(desk: Desk) -> None:
    """Where few groups have signal a batch takes long, and the pools are what shortens it."""
    pending = sum(len(pools.pending) for pools in desk.state.pools.values())
    if pending >= _STEPS_WITHOUT_BATCH * desk.config.algo.groups_per_step:
        rate_tasks(desk)


def log_moves(desk: Desk) -> None:
    """Bring curriculum.jsonl up to the state: a kill may have come between the journal and the file."""
    desk.teller.log.moves(_rows(desk.state), total=desk.state.counts.get("pool_moves", 0))


def _rows(state: LoopState) -> list[dict[str, object]]:
    return [
        {
            "step": state.rated_at,
            "source": move.source,
            "key": move.key,
            "from": move.before,
            "to": move.after,
            "rate": move.rate,
            "rollouts": sum(result.count for result in move.recent),
        }
        for move in state.moves
    ]
