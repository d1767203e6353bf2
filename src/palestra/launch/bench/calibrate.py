"""How long prompts must be for a wanted ratio of generating to training.

Prompt tokens cost the trainer as much as sampled ones, and the engines next to nothing: a group shares its prompt.
"""

import math
from collections.abc import Sequence
from random import Random

import numpy as np

from palestra.config import RunConfig
from palestra.core.records import Ending, RolloutRecord, Sample, Seat, Span, Task
from palestra.launch.bench.lengths import LengthLaw
from palestra.orchestrate.batcher import make_batch, rules_of
from palestra.orchestrate.state import Group
from palestra.wire.batches import Batch

SHORTEST_PROMPT = 4
_TOKENS = 16  # ids that every vocabulary has


def made_batches(config: RunConfig, prompt_tokens: Sequence[int], *, law: LengthLaw) -> list[Batch]:
    """A batch per entry of `prompt_tokens`, as the loop would ship it, of random tokens."""
    lengths = Random(config.train.seed)
    replies = [law.draw(lengths) for _ in range(config.algo.rollouts_per_step)]  # of every batch
    return [_made(config, step, prompt, replies) for step, prompt in enumerate(prompt_tokens)]


def _made(config: RunConfig, step: int, prompt: int, replies: list[int]) -> Batch:
    chance, size = Random(step), config.algo.group_size
    groups = [Group(group_id=index, source="made", task=Task(), size=size) for index in range(len(replies) // size)]
    for group in groups:
        for rollout_id in group.rollout_ids:
            group.records[rollout_id] = _record(rollout_id, prompt, replies[rollout_id], chance)
    return make_batch(groups, {}, step=step, attempt=1, rules=rules_of(config))[0]


def _record(rollout_id: int, prompt: int, reply: int, chance: Random) -> RolloutRecord:
    total = prompt + reply
    sample = Sample(
        token_ids=chance.choices(range(_TOKENS), k=total),
        logprobs=[0.0] * prompt + [-math.log(_TOKENS)] * reply,
        sampled=[0] * prompt + [1] * reply,
        spans=(Span(0, prompt, total),),
    )
    return RolloutRecord(
        rollout_id=rollout_id,
        environment="made",
        task=Task(),
        ending=Ending.OK,
        reward=chance.random(),
        seats=(Seat(samples=(sample,)),),
    )


def prompt_for(
    ratio: float, *, generate_s: float, rollouts: int, prompts: Sequence[int], train_s: Sequence[float]
) -> int:
    """The prompt length at which `generate_s` is `ratio` times the trainer's seconds, by a straight line through
    measured `train_s` at `prompts`; the shortest possible one where even that takes the trainer too long."""
    seconds_per_token, base_s = np.polyfit(np.asarray(prompts, float) * rollouts, np.asarray(train_s), 1)
    wanted = (generate_s / ratio - base_s) / seconds_per_token / rollouts
    return max(SHORTEST_PROMPT, round(float(wanted)))
