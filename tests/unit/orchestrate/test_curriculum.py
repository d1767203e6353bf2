"""The curriculum: numbers by hand, seeds, draws, and what it is good for."""

import json
from collections import Counter

import msgspec
import numpy as np
import pytest

from palestra.config.schema import RunConfig, Source
from palestra.core.errors import UserError
from palestra.core.records import Ending, RolloutRecord, Task
from palestra.orchestrate import curriculum
from palestra.orchestrate.curriculum import (
    Pool,
    Result,
    Rules,
    SourcePools,
    decide,
    find,
    observe,
    pool_for,
    pool_metrics,
    rate,
    result_of,
)
from palestra.orchestrate.ratings import observe_group, observe_unclosed
from palestra.orchestrate.seeding import read_seeds
from palestra.orchestrate.sources import TaskSources
from palestra.orchestrate.state import BatchShipped, GroupStatus, RolloutEnded
from palestra.wire.messages import Tasks
from palestra.wire.runlog import read_moves
from tests.unit.orchestrate.drawing import Drawing, drawing_config

WEIGHTS = {Pool.EASY: 0.1, Pool.NORMAL: 0.7, Pool.HARD: 0.2}


def rules(**changes) -> Rules:
    known = {
        "weights": WEIGHTS,
        "easy_above": 0.8,
        "hard_below": 0.2,
        "window_groups": 2,
        "retire_at": 1.0,
        "retire_rollouts": 4,
        "solved_at": 1.0,
        "rest_groups": 0,
        "remember": 10**6,
        "seed": 0,
    }
    return Rules(**known | changes)


# --- the law, by hand


@pytest.mark.parametrize(
    ("recent", "pool"),
    [
        ((), Pool.NORMAL),  # nothing is known
        ((Result(0.0, 4),), Pool.HARD),
        ((Result(0.0, 4), Result(2.0, 4)), Pool.NORMAL),  # 2 of 8
        ((Result(1.0, 5),), Pool.NORMAL),  # 0.2 is not below 0.2
        ((Result(4.0, 5),), Pool.NORMAL),  # 0.8 is not above 0.8
        ((Result(3.0, 4), Result(4.0, 4)), Pool.EASY),  # 7 of 8
        ((Result(4.0, 4),), Pool.RETIRED),
        ((Result(3.0, 3),), Pool.EASY),  # solved, but by too few to retire
        ((Result(1.0, 1), Result(0.0, 7)), Pool.HARD),  # 1 of 8: the mean over rollouts, not over groups
    ],
)
def test_pools_by_hand(recent, pool):
    assert pool_for(recent, rules()) == pool


def test_what_rollouts_are_worth():
    rewards = [1.0, 0.6, 0.1 + 0.2 + 0.7, 0.0, 1.2]
    assert result_of(rewards, 1.0) == Result(3.0, 5)
    assert result_of(rewards, 0.5) == Result(4.0, 5)
    assert result_of([0.25, 0.5], None) == Result(0.75, 2)
    records = [_rollout("a", 1.0), _rollout("a", 0.0), _rollout("a", 0.0, ending=Ending.INVALID)]
    assert observe(records, 1.0) == Result(1.0, 2)


def test_a_task_moves_as_its_last_groups_say_and_the_moves_are_written(tmp_path):
    drawing = Drawing(drawing_config(tmp_path), lambda source, epoch: ["a"])
    played = [[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, None, None], [None] * 4]
    pools = []
    for rewards in played:
        drawing.play(lambda key, group_id, rewards=rewards: rewards)
        pools.append(drawing.pool_of("a"))
    # by hand, over two groups: 0/4, 2/8, 6/8, 8/8, 5/6; a group without valid rollouts tells nothing
    assert pools == [Pool.HARD, Pool.NORMAL, Pool.NORMAL, Pool.RETIRED, Pool.EASY, Pool.EASY]
    moves = [(m["from"], m["to"], m["rate"], m["rollouts"]) for m in read_moves(drawing.desk.run)]
    assert moves == [
        ("normal", "hard", 0.0, 4),
        ("hard", "normal", 0.25, 8),
        ("normal", "retired", 1.0, 8),
        ("retired", "easy", pytest.approx(5 / 6), 6),
    ]
    assert drawing.state.counts["pool_moves"] == 4
    assert drawing.state.counts["tasks_retired"] == 1


def test_observations_count_in_dispatch_order_whichever_ended_first():
    def rated(order: list[int]) -> list[curriculum.Rating]:
        pools = SourcePools()
        pools.read(find(pools, {}, [(0, Task(key="a"))], rules(), epoch=0), [], barren=0, is_whole=True)
        results = {0: Result(0.0, 4), 1: Result(4.0, 4), 2: Result(2.0, 4)}
        pools.pending = [curriculum.Observation(i, "a", results[i]) for i in order]
        return rate("s", pools, rules())

    assert rated([0, 1, 2]) == rated([2, 0, 1])
    assert rated([2, 0, 1])[0].recent == (Result(4.0, 4), Result(2.0, 4))


def test_nothing_counts_before_it_is_rated(tmp_path):
    drawing = Drawing(drawing_config(tmp_path), lambda source, epoch: ["a"])
    opened = drawing.open()
    drawing.close(opened.group_id, [0, 0, 0, 0])
    assert drawing.pool_of("a") == Pool.NORMAL
    drawing.rate()
    assert drawing.pool_of("a") == Pool.HARD


def test_a_group_that_trains_before_it_closed_is_observed_once(tmp_path):
    drawing = Drawing(drawing_config(tmp_path), lambda source, epoch: ["a"])
    drawing.open()
    group = drawing.state.groups[0]
    for rollout_id, reward in enumerate([1.0, 0.0, 1.0]):  # the fourth is stuck
        drawing.record(RolloutEnded(record=msgspec.structs.replace(_rollout("a", reward), rollout_id=rollout_id)))
    observed = observe_unclosed(drawing.config, [group])
    assert observed == {0: Result(2.0, 3)}
    group.move(GroupStatus.READY)
    shipped = BatchShipped(step=0, group_ids=[0], rollout_ids=[0, 1, 2], observed=observed)
    drawing.record(shipped)
    assert observe_unclosed(drawing.config, [group]) == {}
    drawing.rate()
    assert drawing.pools().normal["a"].recent == (Result(2.0, 3),)
    off = drawing_config(tmp_path, on=False)
    assert observe_unclosed(off, [group]) == {}
    assert observe_group(off, group) == Result(0.0, 0)


# --- seeds


def _rollout(key: str, reward: float, *, ending: Ending = Ending.OK) -> RolloutRecord:
    return RolloutRecord(rollout_id=0, environment="e", task=Task(key=key), ending=ending, reward=reward)


def test_seeds_of_both_formats_say_the_same(tmp_path):
    rollouts = [_rollout("a", 1.0), _rollout("b", 0.3), _rollout("a", 0.0), _rollout("b", 0, ending=Ending.INVALID)]
    rollouts.append(_rollout("c", 0, ending=Ending.INVALID))  # nothing is known of it
    of_rollouts, of_tasks = tmp_path / "eval-test-v000000.jsonl", tmp_path / "avg.jsonl"
    of_rollouts.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in rollouts))
    of_tasks.write_text('{"key": "a", "rewards": [1.0]}\n{"key": "b", "rewards": [0.3]}\n{"key":"a","rewards":[0]}\n\n')
    for path in (of_rollouts, of_tasks):
        assert read_seeds(path, 1.0) == {"a": Result(1.0, 2), "b": Result(0.0, 1)}
        assert read_seeds(path, None) == {"a": Result(1.0, 2), "b": Result(0.3, 1)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"key": "a", "rewards": [1]}\n{"key": "a", "rewards": "x"}\n', ":2 is no line of results"),
        ('{"key": "a"\n', ":1 is no line of results"),
        ('{"prompt": "a"}\n', ":1 is neither a rollout of an evaluation"),
        ('{"key": "a", "rewards": {"x": 1}}\n', ":1 is neither"),
        ("", "has no rewards"),
    ],
)
def test_a_file_that_holds_no_results_is_named(tmp_path, text, words):
    (tmp_path / "f.jsonl").write_text(text)
    with pytest.raises(UserError, match=words):
        read_seeds(tmp_path / "f.jsonl", 1.0)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_seeds(tmp_path / "g.jsonl", 1.0)


def test_tasks_begin_as_seeded_the_others_as_normal_and_strangers_are_counted(tmp_path):
    lines = {"t0": [0, 0, 0, 0], "t1": [1, 1, 1, 1], "t2": [1, 1, 1, 1, 1, 0], "t3": [1, 0], "who": [1], "where": [0]}
    path = tmp_path / "seed.jsonl"
    path.write_text("".join(json.dumps({"key": key, "rewards": rewards}) + "\n" for key, rewards in lines.items()))
    config = drawing_config(tmp_path, seed_from=str(path))
    drawing = Drawing(config, lambda source, epoch: [f"t{i}" for i in range(6)])
    seen = Counter(drawing.play(lambda key, group_id: [1, 0, 0, 0]) for _ in range(30))
    assert "t1" not in seen  # the teacher always solved it: retired from the beginning
    assert seen.keys() == {"t0", "t2", "t3", "t4", "t5"}
    begun = Drawing(config, lambda source, epoch: [f"t{i}" for i in range(6)])
    while not begun.state.pools or begun.pools().num_tasks < 6:
        begun.open()
    expected = {"t0": "hard", "t1": "retired", "t2": "easy", "t3": "normal", "t4": "normal", "t5": "normal"}
    assert {key: begun.pool_of(key) for key in expected} == expected
    assert drawing.state.counts["tasks_seeded"] == 4
    assert f"curriculum: 2 of 6 task keys of {path} match no task of env.mix" in drawing.said
    assert curriculum.pool_summary(drawing.state.pools, drawing.state.seeds)["seeds_of_no_task"] == 2


def test_seeds_of_other_tasks_altogether_are_noticed_at_the_first_chunk(tmp_path):
    (tmp_path / "seed.jsonl").write_text('{"key": "other", "rewards": [1]}\n')
    config = drawing_config(tmp_path, seed_from=str(tmp_path / "seed.jsonl"))
    drawing = Drawing(config, lambda source, epoch: [f"t{i}" for i in range(100)])
    drawing.open()
    assert drawing.said == [f"curriculum: none of the first 4 tasks of 's' is among those of {tmp_path}/seed.jsonl"]


def test_a_resumed_run_needs_the_file_no_more(tmp_path):
    path = tmp_path / "seed.jsonl"
    path.write_text('{"key": "t7", "rewards": [0, 0, 0, 0]}\n')
    drawing = Drawing(drawing_config(tmp_path, seed_from=str(path)), lambda source, epoch: [f"t{i}" for i in range(8)])
    drawing.open()
    path.unlink()
    drawing.restart()
    for _ in range(8):
        drawing.open()
    assert drawing.pool_of("t7") == Pool.HARD


# --- draws


def test_pools_are_drawn_from_by_weight_and_an_empty_ones_share_goes_to_the_others():
    pools = SourcePools()
    seeds = {"h": Result(0.0, 4), "e": Result(7.0, 8)}
    tasks = [(i, Task(key=key)) for i, key in enumerate(["h", "e", "n"])]
    pools.read(find(pools, seeds, tasks, rules(), epoch=0), [], barren=0, is_whole=True)
    drawn = Counter(decide(pools, rules(), group_id=i) for i in range(4000))
    for pool, weight in WEIGHTS.items():
        assert drawn[pool] / 4000 == pytest.approx(weight, abs=0.025)
    pools.normal.take("n")
    drawn = Counter(decide(pools, rules(), group_id=i) for i in range(4000))
    assert drawn[Pool.HARD] / 4000 == pytest.approx(2 / 3, abs=0.03)
    assert drawn[Pool.EASY] / 4000 == pytest.approx(1 / 3, abs=0.03)


def test_a_task_rests_after_it_was_drawn_where_another_can_be():
    pools = SourcePools()
    tasks = [(0, Task(key="n")), (1, Task(key="h"))]
    pools.read(find(pools, {"h": Result(0.0, 4)}, tasks, rules(), epoch=0), [], barren=0, is_whole=True)
    resting = rules(rest_groups=3)
    pools.draw("n", 10)
    assert {decide(pools, resting, group_id=i) for i in (11, 12, 13)} == {Pool.HARD}
    assert Pool.NORMAL in {decide(pools, resting, group_id=i) for i in range(14, 40)}
    pools.draw("h", 11)
    assert {decide(pools, rules(rest_groups=10**6), group_id=i) for i in range(12, 60)} == {Pool.NORMAL, Pool.HARD}


async def test_without_a_curriculum_the_draws_are_what_they_are():
    async def list_tasks(source, epoch, offset, count):
        names = [f"{source}{epoch}.{i}" for i in range(10)][offset : offset + count]
        return Tasks(request_id=0, tasks=[Task(prompt=n) for n in names], exhausted=offset + count >= 10)

    mix = (Source(id="a", weight=3.0), Source(id="b", weight=1.0))
    expected = {
        4: "a0.0 a0.1 a0.2 a0.3 a0.4 a0.6 a0.5 a0.7 a0.8 a0.9 b0.0 a1.2 a1.0 b0.1 a1.1 b0.2 a1.3 a1.4 a1.7 a1.5 a1.6",
        5: "a0.4 a0.0 a0.1 a0.2 a0.3 a0.6 a0.8 a0.9 a0.7 a0.5 b0.4 a1.1 a1.4 b0.0 a1.0 b0.1 a1.3 a1.2 a1.7 a1.9 a1.8",
    }
    for chunk_tasks, prompts in expected.items():
        sources = TaskSources(mix, list_tasks, seed=1, chunk_tasks=chunk_tasks)
        opened = [await sources.open(group_id, 4) for group_id in range(21)]
        assert " ".join(event.task.prompt for event in opened) == prompts
        assert {event.pool for event in opened} == {""}


def test_metrics_by_hand():
    pools = SourcePools()
    seeds = {"h": Result(0.0, 4), "g": Result(1.0, 8), "n": Result(2.0, 4)}
    tasks = [(i, Task(key=key)) for i, key in enumerate(["h", "g", "n", "m"])]
    pools.read(find(pools, seeds, tasks, rules(), epoch=0), [], barren=0, is_whole=False)
    values = {name: metric.value for name, metric in pool_metrics({"s": pools}).items()}
    assert values["curriculum/s/hard_tasks"] == 2
    assert values["curriculum/s/normal_tasks"] == 2
    assert values["curriculum/s/retired_tasks"] == 0
    assert values["curriculum/s/hard_rate"] == pytest.approx(1 / 12)
    assert values["curriculum/s/normal_rate"] == 0.5


# --- config


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"hard_below": 0.9}, "must ascend"),
        ({"retire_at": 0.5}, "must ascend"),
        ({"on": True, "retire_rollouts": 33}, "more than the 32 rollouts"),
        ({"weights": {"normal": 0}}, "greater than 0"),
    ],
)
def test_a_curriculum_that_cannot_work_is_refused(section, words):
    tree = {"log": {"name": "x"}, "model": {"path": "x"}, "env": {"curriculum": section}}
    with pytest.raises(ValueError, match=words):
        RunConfig.model_validate(tree)


# --- what it is good for


def zero_signal_share(*, with_curriculum: bool, learns: bool = True, num_groups: int = 4000) -> float:
    """Of the later half of the groups drawn from 300 tasks whose solve probability never changes."""
    rng, size = np.random.default_rng(5), 8
    chances = np.concatenate([np.full(120, 0.0), np.full(90, 1.0), rng.uniform(0.2, 0.8, 90)])
    law, pools = rules(window_groups=2, retire_rollouts=8, rest_groups=16), SourcePools()
    tasks = [(i, Task(key=str(i))) for i in rng.permutation(len(chances)).tolist()]
    pools.read(find(pools, {}, tasks, law, epoch=0), [], barren=0, is_whole=True)
    without_signal = []
    for group_id in range(num_groups):
        if with_curriculum:
            pool = decide(pools, law, group_id=group_id)
            assert pool is not None
            key = pools[pool].head
            pools.draw(key, group_id)
        else:
            key = str(tasks[group_id % len(tasks)][0])
        solved = int(rng.binomial(size, chances[int(key)]))
        without_signal.append(solved in (0, size))
        if learns:
            pools.pending.append(curriculum.Observation(group_id, key, Result(float(solved), size)))
        if group_id % 16 == 15:
            for rating in rate("s", pools, law):
                pools.rate(rating)
            pools.pending = []
    return float(np.mean(without_signal[num_groups // 2 :]))


def test_fewer_groups_without_signal_are_drawn_and_a_curriculum_that_learns_nothing_is_no_help():
    uniform, pooled = zero_signal_share(with_curriculum=False), zero_signal_share(with_curriculum=True)
    deaf = zero_signal_share(with_curriculum=True, learns=False)
    assert uniform == pytest.approx(0.72, abs=0.03)  # 210 of 300 never have signal, the others nearly always
    assert pooled < 0.3
    assert deaf == pytest.approx(uniform, abs=0.03)
