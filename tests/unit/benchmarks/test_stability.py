"""The experiment on stability: what it runs, what it skips, what it reads. Runs are played by a script."""

from pathlib import Path

import pytest
from benchmarks.stability import Setting, curve, draw, main, measure, player, run_all, settings_of, table

from palestra.core.metrics import Last
from palestra.wire.rundir import RunDir
from palestra.wire.runlog import RunLog
from palestra.wire.status import State, Status, write_status

SETTINGS = settings_of(["mis", "none", "gspo"], [0, 8])


def write_run(outputs: Path, setting: Setting, seed: int, rewards: dict[int, float], state: State = State.FINISHED):
    log = RunLog(RunDir(outputs / setting.run_name(seed)))
    for version, reward in rewards.items():
        log.metrics(version, {"eval/greedy/reward": Last(reward), "eval/other/reward": Last(0.5)}, phase="eval-during")
    for step, share in enumerate((0.9, 0.4)):
        log.metrics(
            step,
            {
                "age/mean": Last(setting.age / 2),
                "age/max": Last(setting.age - step),
                "train/rl/effective_share": Last(share),
            },
        )
    if state is State.FINISHED:
        log.summary({"status": "finished"})
    log.close()
    status = Status(state=state, attempt=1, pid=1, started_at=0.0)
    write_status(RunDir(outputs / setting.run_name(seed)), status)


def test_the_first_loss_has_every_age_and_the_others_the_greatest():
    assert [setting.label for setting in SETTINGS] == ["mis, age 0", "mis, age 8", "none, age 8", "gspo, age 8"]
    assert {"algo.pace_age=8", "sync.every=7"} <= set(SETTINGS[-1].overrides(seed=1))
    assert {"algo.pace_age=0", "sync.every=1"} <= set(SETTINGS[0].overrides(seed=1))


def test_finished_runs_are_skipped_and_settings_take_turns_within_a_seed(tmp_path: Path):
    write_run(tmp_path, SETTINGS[1], 0, {0: 0.1})
    write_run(tmp_path, SETTINGS[2], 0, {0: 0.1}, State.INTERRUPTED)
    played = []
    run_all(SETTINGS, [0, 1], tmp_path, budget_s=1e6, play=lambda s, seed, left_s: played.append((seed, s)) or True)
    first = [(0, SETTINGS[i]) for i in (0, 2, 3)]
    assert played == [*first, *[(1, setting) for setting in SETTINGS]]


def test_the_budget_ends_it(tmp_path: Path):
    played = []
    run_all(SETTINGS, [0], tmp_path, budget_s=0, play=lambda *_: played.append(1) or True)
    assert played == []
    run_all(SETTINGS, [0], tmp_path, budget_s=1e6, play=lambda *_: bool(played.append(1)))  # interrupted at its end
    assert played == [1]


def test_a_mistake_stops_everything_and_a_run_that_fails_is_counted(tmp_path: Path):
    with pytest.raises(Exception, match="returned non-zero exit status 2"):
        player(tmp_path / "no-such-recipe.toml", tmp_path, [])(SETTINGS[0], 0, 60)
    write_run(tmp_path, SETTINGS[0], 0, {0: 0.1, 20: 0.0}, State.FAILED)
    failed = measure(RunDir(tmp_path / SETTINGS[0].run_name(0)), SETTINGS[0], 0, None)
    assert "| mis | 0 | 0.00 | 0 | 1 | 1 | 0.000 |" in table(SETTINGS, [failed])


def test_numbers_by_hand(tmp_path: Path):
    ends = {SETTINGS[0]: (0.9, 0.8), SETTINGS[1]: (0.7, 0.9), SETTINGS[2]: (0.2, 0.4)}
    for setting, rewards in ends.items():
        for seed, reward in enumerate(rewards):
            write_run(tmp_path, setting, seed, {0: 0.1, 20: reward - 0.1, 40: reward})
    write_run(tmp_path, SETTINGS[3], 0, {0: 0.1}, State.INTERRUPTED)
    runs = [measure(RunDir(tmp_path / s.run_name(seed)), s, seed, None) for s in SETTINGS for seed in (0, 1)]
    text = table(SETTINGS, runs)
    assert "| mis | 0 | 0.00 | 0 | 2 | 0 | 0.850 | 0.800 to 0.900 | >= 0.400 |" in text
    assert "| none | 8 | 4.00 | 8 | 2 | 0 | 0.300 | 0.200 to 0.400 | >= 0.400 |" in text
    assert "| gspo | 8 | | | 0 | | | | |" in text  # in progress: not compared
    assert "over ages are at most 0.050 apart" in text  # 0.85 and 0.8
    points = curve([run for run in runs if run.setting == SETTINGS[1]])
    assert points == [(0, 0.1, 0.1, 0.1), (20, pytest.approx(0.7), pytest.approx(0.6), 0.8), (40, 0.8, 0.7, 0.9)]
    draw(SETTINGS, runs, tmp_path / "stability.png")
    assert (tmp_path / "stability.png").read_bytes().startswith(b"\x89PNG")
    other = measure(RunDir(tmp_path / SETTINGS[0].run_name(0)), SETTINGS[0], 0, "other")
    assert other.last == 0.5


def test_overrides_may_follow_the_options(tmp_path: Path):
    words = ["recipe.toml", "--ages", "0", "--budget-s", "0", "--outputs", str(tmp_path), "train.steps=3", "train.lr=1"]
    main(words)
    assert "| mis | 0 | | | 0 |" in (tmp_path / "stability.md").read_text()
