"""The part of a recipe that decides when what happens in the loop."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from palestra.config.schema import RunConfig
from palestra.orchestrate.trainer import Schedule

Updates = Literal["in_flight", "drain", "batches"]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """`updates`: a publish stops engines in the middle of rollouts (`in_flight`), or waits for all rollouts to end,
    while nothing new is dispatched (`drain`), or comes between two batches: all rollouts of a batch start with it, and
    the next one starts when they have ended (`batches`). `joins`: rollouts of a group that start together are one
    request, and end together. `is_shared`: trainer and engines take turns on the same devices."""

    steps: int
    group_size: int
    groups_per_step: int
    max_outstanding: int
    window: int
    max_age: int
    engines: int
    max_in_flight: int  # per engine
    joins: bool = False
    at_once: int = 1
    recompute: bool = False
    publish_every: int = 1
    checkpoint_every: int = 1_000_000
    trainer_gpus: int = 1
    is_shared: bool = False
    updates: Updates = "in_flight"

    @property
    def capacity(self) -> int:
        return self.engines * self.max_in_flight

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule(self.steps, self.publish_every, self.checkpoint_every)


def rules_of(config: RunConfig, *, updates: Updates | None = None) -> Rules:
    """`updates`: by default what the recipe's `sync.wait` says."""
    algo = config.algo
    return Rules(
        steps=config.train.steps,
        group_size=algo.group_size,
        groups_per_step=algo.groups_per_step,
        max_outstanding=algo.max_outstanding,
        window=algo.window,
        max_age=algo.max_age,
        engines=config.engine.replicas,
        max_in_flight=config.engine.max_in_flight,
        joins=config.sampling.max_tokens <= config.engine.join_max_tokens,
        at_once=config.sync.at_once,
        recompute=config.sync.kv == "recompute",
        publish_every=config.sync.every,
        checkpoint_every=config.train.checkpoint_every,
        trainer_gpus=config.train.num_ranks,
        is_shared=config.takes_turns,
        updates=updates or ("drain" if config.sync.wait else "in_flight"),
    )
