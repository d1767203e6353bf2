"""The loop, simulated: the same rules as `orchestrate/dispatch.py`, `ship.py` and `publisher.py`, without the work.

Consumes: rules and curves. Produces: the course of a run, step by step. Waits for nothing: time is simulated.
Ends when: every step is trained.
"""

from collections import deque
from functools import partial

import numpy as np

from palestra.orchestrate.simulate.clock import Clock
from palestra.orchestrate.simulate.curves import Curves
from palestra.orchestrate.simulate.engine import Engine, Request
from palestra.orchestrate.simulate.fleet import Fleet
from palestra.orchestrate.simulate.groups import Buffer, Group
from palestra.orchestrate.simulate.outcome import Course, Outcome, Tally, outcome_of
from palestra.orchestrate.simulate.peers import Publisher, Shipped, Trainer
from palestra.orchestrate.simulate.rules import Rules
from palestra.orchestrate.simulate.work import Want, Work


def simulate(rules: Rules, curves: Curves, *, seed: int = 0, skip: int = 0, steps: int | None = None) -> Outcome:
    """Means over `steps` steps after the first `skip` + 1, or all of them: the last ones are short, since nothing is
    dispatched that no step is left for."""
    loop = Loop(rules, curves, seed=seed)
    loop.run(rules.steps if steps is None else skip + 1 + steps)
    return outcome_of(loop.course, skip=skip)


class Loop:
    """`settle` does everything that the state allows; what comes of it later is planned on the clock."""

    def __init__(self, rules: Rules, curves: Curves, *, seed: int):
        self.rules, self.curves, self.clock = rules, curves, Clock()
        self.fleet = Fleet(self.clock, curves.engine, rules.engines)
        self.work = Work(curves.work, group_size=rules.group_size, seed=seed)
        self.buffer, self.course = Buffer(rules.window), Course(rules.engines)
        self.trainer = Trainer(
            self.clock,
            curves.trainer,
            rules,
            trained=self._trained,
            staged=self._staged,
            computes=self.fleet.lend if rules.is_shared else lambda seconds: None,
        )
        self.publisher = Publisher(self.clock, curves.publish, rules, self.fleet, loaded=self._loaded)
        self.step, self.in_flight = 0, 0
        self._next_group = 0
        self._round_left = 0  # groups of this round that were not opened yet, where batches come one by one
        self._waiting: deque[tuple[Group, int]] = deque()  # members that were opened and not started
        self._loaded_version = 0  # of the engines
        self._tally = _Tally()
        self._has_changed = True  # what was told last may allow something

    def run(self, steps: int | None = None) -> None:
        """All of the rules' steps, or the first `steps`."""
        rules = self.rules
        while len(self.course.tallies) < (steps or rules.steps):
            if self._has_changed:
                self._has_changed = False
                self.settle()
            self.fleet.plan()
            if not self.clock.tick():
                raise AssertionError(f"the simulated loop stands still at step {self.step}")

    def settle(self) -> None:
        while self._ship():
            pass
        in_flight = self.rules.updates == "in_flight"
        if self.publisher.is_waiting and (in_flight or not self.in_flight):
            self.publisher.start()
        if in_flight or not self.publisher.is_waiting:
            if not self._round_left and not self.in_flight and not self._waiting and not self.publisher.is_publishing:
                self._round_left = self.rules.groups_per_step
            self._dispatch()

    # --- rollouts

    def _dispatch(self) -> None:
        """Members that are to start now, of each group together."""
        if not self._waiting and not self._may_open():
            return
        starting: dict[int, tuple[Group, list[int]]] = {}
        num_starting = 0
        while True:
            if not self._waiting and self._may_open():
                self._open_group()
            elif self._waiting and self.in_flight + num_starting < self.rules.capacity:
                group, member = self._waiting.popleft()
                starting.setdefault(group.group_id, (group, []))[1].append(member)
                num_starting += 1
            else:
                break
        for group, members in starting.values():
            self._start(group, members)

    def _may_open(self) -> bool:
        """Pacing: bounds the rollouts dispatched and not yet in the engines' weights, but for those without which there
        would be no others; none more than can be trained."""
        rules, untrained = self.rules, len(self.buffer)
        groups_on_the_way = (self.step - self._loaded_version) * rules.groups_per_step
        has_room = (untrained + groups_on_the_way + 1) * rules.group_size <= rules.max_outstanding
        next_version = rules.schedule.next_published(self._loaded_version)
        is_needed = untrained < (next_version - self.step) * rules.groups_per_step
        left = (rules.steps - self.step) * rules.groups_per_step
        if rules.updates == "batches" and not self._round_left:
            return False
        return untrained < left and (has_room or is_needed)

    def _open_group(self) -> None:
        want = self.work.group(self._next_group, self.step / self.rules.steps)
        group = Group(self._next_group, want, begun=[-1] * self.rules.group_size)
        self.buffer.open[group.group_id] = group
        self._next_group += 1
        self._round_left -= 1
        self._waiting += [(group, member) for member in range(self.rules.group_size)]

    def _start(self, group: Group, members: list[int]) -> None:
        self._tally.change(self.clock.now, self.in_flight)
        self.in_flight += len(members)
        if group.engine is None:
            group.engine = self.fleet.least_busy()
        if self.rules.joins:
            wants = [group.want.members[member] for member in members]
            joined = sum(want.sampled_tokens for want in wants) / len(wants)
            for member, want in zip(members, wants, strict=True):
                Play(self, group, member, want, joined).turn()
        else:
            for member in members:
                want = group.want.members[member]
                Play(self, group, member, want, want.sampled_tokens).turn()

    def ended(self, group: Group, member: int, started_at: float) -> None:
        """A rollout."""
        want = group.want.members[member]
        self._tally.change(self.clock.now, self.in_flight)
        self._tally.end(want.sampled_tokens, self.clock.now - started_at)
        self.in_flight -= 1
        group.ended += 1
        if group.ended == self.rules.group_size:
            self._tally.groups_closed += 1
            self._tally.groups_dropped += not group.want.trains
            self._round_left += not group.want.trains  # replaced
            self.buffer.close(group)
            self._has_changed = True
        elif self._waiting or not self.in_flight:
            self._has_changed = True

    # --- batches

    def _ship(self) -> bool:
        """Whether a batch was shipped."""
        rules = self.rules
        if self.step >= rules.steps or not self.trainer.has_room(self.step):
            return False
        self._tally.too_old += rules.group_size * self.buffer.expire(self.step, rules.max_age)
        if (groups := self.buffer.take(rules.groups_per_step)) is None:
            return False
        ages, tokens = self._train_on(groups)
        batch = Shipped(self.step, tokens)
        self.course.ages.append(np.asarray(ages))
        self.course.tokens.append(tokens)
        self.step += 1
        self.clock.after(self.curves.batch_s, partial(self.trainer.receive, batch))
        return True

    def _train_on(self, groups: list[Group]) -> tuple[list[int], int]:
        """Ages of the rollouts that are fresh, and the tokens of these."""
        ages: list[int] = []
        tokens = 0
        for group in groups:
            for version, want in zip(group.begun, group.want.members, strict=True):
                if self.step - version <= self.rules.max_age:
                    ages.append(self.step - version)
                    tokens += want.prompt_tokens + want.sampled_tokens
                else:
                    self._tally.too_old += 1
        return ages, tokens

    # --- versions

    def _staged(self, version: int) -> None:
        self.publisher.stage(version)
        self._has_changed = True

    def _trained(self, batch: Shipped) -> None:
        self._has_changed = True
        self._tally.change(self.clock.now, self.in_flight)
        self.fleet.advance()
        self.course.tallies.append(self._tally.reading(self.clock.now, self.trainer.waited_s, self.fleet.engines))

    def _loaded(self, version: int) -> None:
        self._has_changed = True
        self._loaded_version = version
        self.trainer.loaded(version)


class Play:
    """One rollout: its turns at the group's engine, and the environment's time after each."""

    __slots__ = ("_began", "_context", "_group", "_left", "_loop", "_member", "_share", "_tokens", "_want")

    def __init__(self, loop: Loop, group: Group, member: int, want: Want, sampled_tokens: float):
        self._loop, self._group, self._member, self._want = loop, group, member, want
        self._began, self._left, self._context = loop.clock.now, want.turns, 0
        self._tokens, self._share = sampled_tokens / want.turns, want.prompt_tokens // want.turns

    def turn(self) -> None:
        assert self._group.engine is not None
        request = Request(self._share, self._tokens, self._begins, self._replied, self._context)
        self._loop.fleet.ask(self._group.engine, request)

    def _begins(self, engine: Engine) -> None:
        if self._group.begun[self._member] < 0:
            self._group.begun[self._member] = engine.version

    def _replied(self) -> None:
        self._left -= 1
        self._context += self._share + int(self._tokens)
        call = self.turn if self._left else self._end
        if self._want.env_s:
            self._loop.clock.after(self._want.env_s / self._want.turns, call)
        else:
            call()

    def _end(self) -> None:
        self._loop.ended(self._group, self._member, self._began)


class _Tally:
    """Sums since the beginning."""

    def __init__(self):
        self.ended, self.ended_s, self.sampled_tokens = 0, 0.0, 0.0
        self.too_old, self.groups_closed, self.groups_dropped = 0, 0, 0
        self._in_flight_s, self._at = 0.0, 0.0

    def change(self, now: float, in_flight: int) -> None:
        """The number in flight is about to change."""
        self._in_flight_s += in_flight * (now - self._at)
        self._at = now

    def end(self, tokens: float, seconds: float) -> None:
        self.ended += 1
        self.ended_s += seconds
        self.sampled_tokens += tokens

    def reading(self, now: float, waited_s: float, engines: list[Engine]) -> Tally:
        return Tally(
            at_s=now,
            trainer_waited_s=waited_s,
            generate_s=sum(engine.spent.generate for engine in engines),
            prefill_s=sum(engine.spent.prefill for engine in engines),
            publish_s=sum(engine.spent.publish for engine in engines),
            lent_s=sum(engine.spent.lent for engine in engines),
            in_flight_s=self._in_flight_s,
            ended=self.ended,
            ended_s=self.ended_s,
            sampled_tokens=self.sampled_tokens,
            too_old=self.too_old,
            groups_closed=self.groups_closed,
            groups_dropped=self.groups_dropped,
        )
