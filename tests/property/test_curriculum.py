"""The curriculum as a state machine: random rewards, closings in any order, ratings and kills keep its laws."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.unit.orchestrate.drawing import Drawing, drawing_config

from palestra.orchestrate import curriculum
from palestra.orchestrate.curriculum import Pool, pool_for, rate_of
from palestra.orchestrate.ratings import rules_of

ENDLESS = [f"t{i}" for i in range(10**4)]
REWARDS = st.lists(st.sampled_from([0.0, 1.0, None]), min_size=4, max_size=4)
PLAYS = REWARDS | st.sampled_from([[0.0] * 4, [1.0] * 4, [None] * 4])


class CurriculumMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self._directory = TemporaryDirectory()
        self.queued: dict[str, int] = {}  # when a task got its place in its queue
        self.tick = 0
        self.num_moves = 0

    def teardown(self):
        self._directory.cleanup()

    @initialize(
        size=st.integers(1, 12),
        repeats=st.integers(1, 3),
        epochs_differ=st.booleans(),
        is_endless=st.booleans(),
        remember=st.sampled_from([15, 1000]),
        seeded=st.booleans(),
    )
    def begin(self, size, repeats, epochs_differ, is_endless, remember, seeded):
        def keys(source: str, epoch: int) -> list[str]:
            if is_endless:
                return ENDLESS
            return [f"t{epoch if epochs_differ else ''}.{i // repeats}" for i in range(size * repeats)]

        path, more = Path(self._directory.name) / "seed.jsonl", {}
        if seeded:
            rows = {f"t{i}": [0] * 4 for i in range(0, 50, 3)} | {f"t.{i}": [1] * 4 for i in range(0, 12, 2)}
            path.write_text("".join(f'{{"key": "{key}", "rewards": {rewards}}}\n' for key, rewards in rows.items()))
            more["seed_from"] = str(path)
        config = drawing_config(Path(self._directory.name), chunk_tasks=3, remember=remember, **more)
        self.rules = rules_of(config)
        self.drawing = Drawing(config, keys)

    @precondition(lambda self: len(self.drawing.groups) < 5)
    @rule()
    def draw(self):
        before = {key: pool for key, (pool, _) in self.tasks().items()}
        opened = self.drawing.open()
        key, pool = opened.task.key, Pool(opened.pool)
        of_pool = [other for other, its in before.items() if its == pool]
        unseen = [other for other in of_pool if other not in self.queued]
        if key in self.queued:
            assert not unseen, "each once before any twice"
            assert self.queued[key] == min(self.queued[other] for other in of_pool), "the one drawn longest ago"
        self.enqueue(key)

    def enqueue(self, key: str) -> None:
        self.tick += 1
        self.queued[key] = self.tick

    @precondition(lambda self: self.drawing.groups)
    @rule(data=st.data(), rewards=PLAYS)
    def close(self, data, rewards):
        self.drawing.close(data.draw(st.sampled_from(sorted(self.drawing.groups))), rewards)

    @rule()
    def rate(self):
        self.drawing.rate()
        assert not self.drawing.state.pools or not self.drawing.pools().pending
        num_moves = self.drawing.state.counts.get("pool_moves", 0)
        for move in self.drawing.state.moves if num_moves > self.num_moves else ():
            self.enqueue(move.key)
        self.num_moves = num_moves

    @rule()
    def kill_and_replay(self):
        self.drawing.restart()

    def tasks(self) -> dict:
        if "s" not in self.drawing.state.pools:
            return {}
        pools = self.drawing.pools()
        return {key: (pool, pools[pool][key]) for pool in Pool for key in [*pools[pool].fresh, *pools[pool].drawn]}

    @invariant()
    def every_task_is_in_exactly_one_pool_that_of_its_rate(self):
        tasks, counts = self.tasks(), self.drawing.state.counts
        assert len(tasks) == counts.get("tasks_found", 0) - counts.get("tasks_forgotten", 0)
        assert not tasks or len(tasks) == self.drawing.pools().num_tasks
        for pool, standing in tasks.values():
            assert pool == pool_for(standing.recent, self.rules)
            assert len(standing.recent) <= self.rules.window_groups

    @invariant()
    def the_rate_of_a_pool_is_that_of_its_tasks(self):
        tasks = self.tasks()
        for pool in Pool if tasks else ():
            rates = [rate_of(standing.recent) for its, standing in tasks.values() if its == pool]
            queue = self.drawing.pools()[pool]
            assert (queue.total, queue.count) == (sum(r.total for r in rates), sum(r.count for r in rates))

    @invariant()
    def what_is_in_no_pool_is_forgotten(self):
        known = self.tasks()
        self.queued = {key: tick for key, tick in self.queued.items() if key in known}


TestCurriculum = CurriculumMachine.TestCase
TestCurriculum.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
FOUND_OUT = settings(
    max_examples=400,
    stateful_step_count=40,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    report_multiple_bugs=False,
)


def test_a_curriculum_that_draws_the_last_task_first_is_found_out(monkeypatch):
    monkeypatch.setattr(curriculum.Queue, "head", property(lambda queue: list(queue.fresh or queue.drawn)[-1]))
    with pytest.raises(AssertionError, match="the one drawn longest ago"):
        run_state_machine_as_test(CurriculumMachine, settings=FOUND_OUT)


def test_a_task_that_moves_without_its_results_is_found_out(monkeypatch):
    plain = curriculum.SourcePools.rate

    def forgetful(pools, rating):
        plain(pools, rating)
        pools[rating.after].take(rating.key)

    monkeypatch.setattr(curriculum.SourcePools, "rate", forgetful)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(CurriculumMachine, settings=FOUND_OUT)
