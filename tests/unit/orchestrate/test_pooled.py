"""Sources with a curriculum: finite, endless and repeating ones, kills, the loop."""

import json
from collections import Counter

import msgspec
import numpy as np
import pytest

from palestra.core.errors import UserError
from palestra.orchestrate.curriculum import Pool
from palestra.orchestrate.journal import recover
from palestra.orchestrate.state import BatchShipped, Event, GroupOpened, TaskQuarantined, TasksRated
from palestra.wire.framelog import read_frames
from palestra.wire.runlog import read_moves
from tests.unit.orchestrate.drawing import Drawing, drawing_config
from tests.unit.orchestrate.scripted import GROUP_SIZE, GROUPS, Life, ScriptedEngine, make_config, random_kill_s


def mixed(key: str, group_id: int) -> list[float | None]:
    """A third of the tasks is always solved, a third never, the rest half of the time; depends on both alone."""
    kind = int(key.removeprefix("t")) % 3
    half = np.random.default_rng(group_id).permutation([1.0, 1.0, 0.0, 0.0]).tolist()
    return [[1.0] * 4, [0.0] * 4, half][kind]


def finite(size: int):
    keys = [f"t{i}" for i in range(size)]
    return lambda source, epoch: keys


def test_every_task_is_drawn_once_before_any_is_drawn_twice(tmp_path):
    drawing = Drawing(drawing_config(tmp_path, chunk_tasks=4), finite(10))
    drawn = [drawing.play(lambda key, group_id: [1, 1, 0, 0]) for _ in range(40)]
    for start in range(0, 40, 10):
        assert sorted(drawn[start : start + 10]) == sorted(f"t{i}" for i in range(10))
    assert drawn[:4] != ["t0", "t1", "t2", "t3"]
    assert drawing.pools().is_whole


def test_a_quarantined_task_is_never_drawn_again(tmp_path):
    drawing = Drawing(drawing_config(tmp_path, chunk_tasks=4), finite(6))
    assert "t3" in {drawing.play(lambda key, group_id: [1, 1, 0, 0]) for _ in range(6)}
    drawing.record(TaskQuarantined(task="s/t3", reason="workers die of it"))
    drawing.restart()
    drawn = {
        drawing.play(lambda key, group_id: [1, 1, 0, 0]) for _ in range(40)
    }  # the source is read over again meanwhile
    assert drawn == {f"t{i}" for i in range(6)} - {"t3"}


def test_with_every_task_quarantined_the_run_ends_in_words(tmp_path):
    drawing = Drawing(drawing_config(tmp_path, chunk_tasks=4), finite(1))
    drawing.play(mixed)
    drawing.record(TaskQuarantined(task="s/t0", reason="workers die of it"))
    with pytest.raises(UserError, match="quarantined"):
        drawing.play(mixed)


def test_a_source_is_read_no_more_once_an_epoch_brought_nothing_new(tmp_path):
    drawing = Drawing(drawing_config(tmp_path, chunk_tasks=4), finite(10))
    for _ in range(60):
        drawing.play(mixed)
    assert max(epoch for _, epoch, _ in drawing.listed) == 1
    assert drawing.state.counts["tasks_found"] == 10
    assert len(drawing.listed) < 30  # known tasks come from a few kept chunks


def test_epochs_that_bring_other_tasks_are_read_on(tmp_path):
    drawing = Drawing(drawing_config(tmp_path), lambda source, epoch: [f"t{10 * epoch + i}" for i in range(6)])
    drawn = [drawing.play(lambda key, group_id: [1, 1, 0, 0]) for _ in range(30)]
    assert len(set(drawn)) == 30


def test_an_endless_source_gives_new_tasks_at_the_normal_pools_share(tmp_path):
    drawing = Drawing(drawing_config(tmp_path, chunk_tasks=8), finite(10**5))
    drawn = [drawing.play(mixed) for _ in range(400)]
    times = Counter(drawn)
    assert len(times) / 400 == pytest.approx(0.7 / 0.9, abs=0.05)  # nothing is easy here: 0.7 new, 0.2 hard again
    assert {int(key.removeprefix("t")) % 3 for key, count in times.items() if count > 1} == {1}
    assert not drawing.pools().is_whole


def test_an_endless_source_that_repeats_itself_is_known_whole_after_a_while(tmp_path):
    drawing = Drawing(drawing_config(tmp_path), lambda source, epoch: [f"t{i % 5}" for i in range(10**4)])
    drawn = [drawing.play(lambda key, group_id: [1, 1, 0, 0]) for _ in range(25)]
    assert drawing.pools().is_whole
    assert set(Counter(drawn).values()) == {5}
    assert len(drawing.listed) < 20


def test_no_more_tasks_are_kept_than_asked_for(tmp_path):
    drawing = Drawing(drawing_config(tmp_path, remember=20, chunk_tasks=4), finite(10**5))
    for _ in range(200):
        drawing.play(lambda key, group_id: [1, 1, 0, 0])
        assert drawing.pools().num_tasks <= 20
    counts = drawing.state.counts
    assert counts["tasks_found"] - counts["tasks_forgotten"] == drawing.pools().num_tasks == 20


def test_retired_tasks_are_not_drawn_until_nothing_else_is_left_and_come_back_when_unlearned(tmp_path):
    drawing = Drawing(drawing_config(tmp_path, chunk_tasks=4), finite(6))
    first = [drawing.play(lambda key, group_id: [float(key != "t5")] * 4) for _ in range(20)]
    assert Counter(first) == {"t0": 1, "t1": 1, "t2": 1, "t3": 1, "t4": 1, "t5": 15}
    assert drawing.said == []
    drawing.play(lambda key, group_id: [1.0] * 4)
    drawing.play(lambda key, group_id: [1.0] * 4)  # t5 is solved twice in a row: all are
    assert len(drawing.pools().retired) == 6
    again = [drawing.play(lambda key, group_id: [1.0] * 4) for _ in range(12)]
    assert set(Counter(again).values()) == {2}
    assert [words for words in drawing.said if "all 6 tasks of 's' are solved" in words] == drawing.said[:1]
    assert len(drawing.said) == 1
    lost = drawing.play(lambda key, group_id: [0.0] * 4)
    assert drawing.pool_of(lost) == Pool.NORMAL  # 4 of 8
    assert {drawing.play(lambda key, group_id: [1, 0, 0, 0]) for _ in range(5)} == {lost}


def test_sources_of_a_mix_have_pools_of_their_own(tmp_path):
    config = drawing_config(tmp_path, mix=[{"id": "a"}, {"id": "b", "weight": 3.0}])
    drawing = Drawing(config, lambda source, epoch: [f"t{i}" for i in range(9)])
    opened = []
    for _ in range(300):
        opened.append(drawing.open())
        right = opened[-1].source == "a"
        drawing.close(opened[-1].group_id, [float(right)] * 4)
        drawing.rate()
    assert len(drawing.pools("a").retired) == len(drawing.pools("b").hard) == 9
    assert sum(event.source == "b" for event in opened) / 300 == pytest.approx(0.75, abs=0.06)


def test_tasks_that_change_their_place_are_noticed(tmp_path):
    changed = []
    drawing = Drawing(
        drawing_config(tmp_path), lambda source, epoch: [f"{'x' if changed else 't'}{i}" for i in range(9)]
    )
    drawing.open()
    changed.append(True)
    drawing.restart()  # nothing is kept in memory
    with pytest.raises(UserError, match="does not list the same tasks again"):
        drawing.open()


def test_a_task_without_a_list_error_is_the_users_to_fix(tmp_path):
    with pytest.raises(UserError, match="has no tasks in epoch 0"):
        Drawing(drawing_config(tmp_path), lambda source, epoch: []).open()


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2, 7])
def test_killed_anywhere_the_same_tasks_are_drawn(tmp_path, every):
    def drawn(name: str, restart_every: int | None) -> list[tuple[str, str]]:
        drawing = Drawing(drawing_config(tmp_path / name, chunk_tasks=4), finite(40))
        found = []
        for i in range(150):
            opened = drawing.open()
            found.append((opened.task.key, opened.pool))
            if restart_every and i % restart_every == 0:
                drawing.restart()
            drawing.close(opened.group_id, mixed(opened.task.key, opened.group_id))
            if restart_every and i % restart_every == 1 % restart_every:
                drawing.restart()
            if i % 4 == 3:
                drawing.rate()
        return found

    assert drawn("killed", every) == drawn("whole", None)


def test_moves_that_a_kill_kept_from_the_file_are_written_at_the_next_start(tmp_path):
    drawing = Drawing(drawing_config(tmp_path), finite(6))
    for _ in range(4):
        opened = drawing.open()
        drawing.close(opened.group_id, [0.0] * 4)
    drawing.rate()
    whole = read_moves(drawing.desk.run)
    assert len(whole) == 4
    text = drawing.desk.run.moves.read_text()
    for cut in (0, 10, len(text) // 2, len(text) - 1, len(text)):
        drawing.desk.run.moves.write_text(text[:cut])
        drawing.restart()
        assert read_moves(drawing.desk.run) == whole


# --- the loop


def by_task(record):
    """Tasks 0, 3, 6, ... are solved always, 1, 4, ... never, the others by their tokens."""
    kind = int(record.task.prompt.removeprefix("task ")) % 3
    return [1.0, 0.0, float(sum(record.seats[0].samples[0].token_ids) % 2)][kind]


def loop_config(outputs, **algo):
    return make_config(
        outputs,
        algo={"max_age": 0} | algo,
        train={"steps": 12, "checkpoint_every": 3},
        env={"chunk_tasks": 8, "curriculum": {"on": True}},
    )


def events_of(run) -> list:
    decoder = msgspec.msgpack.Decoder(Event)
    paths = sorted(run.journal.glob("*.frames"))
    return [decoder.decode(frame) for path in paths for frame in read_frames(path)]


async def test_the_loop_draws_by_pools_and_tells_of_them(tmp_path):
    life = Life(loop_config(tmp_path, max_age=4), reward=by_task)
    life.worker.num_tasks = 24
    await life.play()
    state = life.journal.state
    assert state.pools["scripted"].num_tasks == 24
    events = events_of(life.run)
    moved = [r for e in events if isinstance(e, TasksRated) for r in e.ratings if r.before != r.after]
    assert read_moves(life.run) == [
        {
            "step": e.step,
            "source": "scripted",
            "key": r.key,
            "from": r.before,
            "to": r.after,
            "rate": r.rate,
            "rollouts": sum(result.count for result in r.recent),
        }
        for e in events
        if isinstance(e, TasksRated)
        for r in e.ratings
        if r.before != r.after
    ]
    assert {int(r.key.removeprefix("task ")) % 3 for r in moved if r.after == Pool.HARD} >= {1}
    summary = json.loads(life.run.summary.read_text())
    assert sum(summary["curriculum"]["tasks"]["scripted"].values()) == 24
    assert summary["counts"]["tasks_retired"] > 0
    rows = [json.loads(line) for line in life.run.metrics.read_text().splitlines()]
    last = [row for row in rows if "curriculum/scripted/hard_tasks" in row][-1]
    assert last["curriculum/scripted/hard_tasks"] > 0
    assert sum(last.get(f"curriculum/scripted/{pool}_tasks", 0) for pool in Pool) == 24
    shares = [
        sum(row[f"curriculum/scripted/{pool}_draws"] for pool in Pool)
        for row in rows
        if "curriculum/scripted/hard_draws" in row
    ]
    assert shares == pytest.approx([1.0] * len(shares))
    replayed = recover(life.run.journal, None)
    replayed.close()
    assert replayed.state.pools == state.pools


async def test_where_hardly_a_group_has_signal_ratings_do_not_wait_for_a_batch(tmp_path):
    def reward(record):
        return float(record.task.key in ("task 20", "task 21")) * by_seed(record)

    def by_seed(record):
        return float(sum(record.seats[0].samples[0].token_ids) % 2)

    life = Life(loop_config(tmp_path), reward=reward)
    life.worker.num_tasks = 24
    await life.play(kill_when=lambda: any(isinstance(event, TasksRated) for event in events_of(life.run)))
    events = events_of(life.run)
    before = events[: next((i for i, event in enumerate(events) if isinstance(event, BatchShipped)), len(events))]
    first = next(event for event in before if isinstance(event, TasksRated))
    assert first.step == 0
    assert len(first.ratings) == 8 * GROUPS  # the first 16 tasks of the source, all of them too hard
    assert {rating.after for rating in first.ratings} == {Pool.HARD}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
async def test_a_run_that_is_killed_and_resumed_draws_what_an_uninterrupted_one_draws(tmp_path, seed):
    """With `max_age` 0, whatever the order in which groups end."""

    async def draws(name: str, kills: int) -> list[tuple[str, str]]:
        config = loop_config(tmp_path / name)
        for number in range(kills + 1):
            slow = {"whole": 3, "killed": 5}[name]
            life = Life(
                config,
                reward=by_task,
                engine=lambda url, slow=slow: ScriptedEngine(url, delay_s=lambda s: s % slow * 0.002),
                step_s=0.005,
            )
            life.worker.num_tasks = 24
            await life.play(kill_after_s=random_kill_s(10 * seed + number) if number < kills else None)
            if life.run.summary.exists():
                break
        opened = [event for event in events_of(life.run) if isinstance(event, GroupOpened)]
        assert [event.group_id for event in opened] == list(range(len(opened)))
        assert {event.size for event in opened} == {GROUP_SIZE}
        return [(event.task.key, event.pool) for event in opened]

    killed, whole = await draws("killed", 4), await draws("whole", 0)
    assert killed == whole
    assert len({pool for _, pool in whole}) > 1
