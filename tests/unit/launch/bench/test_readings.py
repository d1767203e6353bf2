"""Each number of the bench from ledgers, rows and spans made by hand; a fault that is planted shows."""

import math
from dataclasses import replace

import pytest

from palestra.core.ledger import LedgerEntry
from palestra.launch.bench import readings
from palestra.launch.bench.bare import Alone

ALONE = Alone(
    in_flight=4, num_replies=8, sampled_tokens=800, wall_s=5.0, saturated_tokens_per_s=200.0, decode_step_s=0.02
)


def row(step: int, **more: float) -> dict:
    """A step ends every 10 s; eight rollouts of 100 tokens are trained and finish in it."""
    return {
        "step": step,
        "time": 1000.0 + 10 * step,
        "rollout/sampled_tokens": 100.0,
        "rollout/finished": 8.0,
        "rollout/trained_tokens": 100.0,
        "train/tokens": 1000.0,
        "train/step_s": 6.0,
        "publish/stopped_s": 0.10,
        "publish/pause_s": 0.03,
        "publish/load_s": 0.05,
        "publish/resume_s": 0.01,
        "packing/fill": 0.98,
        "wire/bytes_per_token": 8.5,
        "age/mean": 1.0,
        "reward/trained": 0.1 * step,
        "orchestrator/loop_lag_p99_ms": 5.0 + step,
        **more,
    }


ROWS = [{"step": 3, "time": 0.0, "phase": "warmup"}, *(row(step) for step in range(6))]


def entries(*, waited: float = 1.0, again: float = 0.0) -> list[LedgerEntry]:
    """One entry per process and step, which the step's row closes; the first two steps are slow."""
    found = []
    for step in range(6):
        began, idle = 1000.0 + 10 * (step - 1), 9.0 if step < 2 else waited
        found += [
            LedgerEntry(
                process="trainer",
                started_at=began,
                wall_s=10.0,
                parts_s={"wait_for_batch": idle, "forward_backward": 10 - idle},
            ),
            LedgerEntry(
                process="engine-0",
                started_at=began,
                wall_s=10.0,
                parts_s={"generate": 9.9 - again, "publish": 0.1, "prefill again": again},
            ),
        ]
    return found


def reading(rows=ROWS, ledger=None) -> readings.Reading:
    within = readings.window(rows, skip=2, leave=1)
    return readings.read(rows, ledger or entries(), rollouts_per_step=8, within=within)


def test_the_window_leaves_out_both_ends():
    within = readings.window(ROWS, skip=2, leave=1)
    assert (within.first, within.last, within.steps, within.step_s) == (1, 4, 3, 10.0)
    with pytest.raises(ValueError, match="none is left"):
        readings.window(ROWS, skip=4, leave=2)


def test_what_one_run_says():
    found = reading()
    assert found.sampled_tokens_per_step == 800
    assert found.tokens_per_step == 1000
    assert found.sampled_tokens_per_s == pytest.approx(3 * 800 / 30)
    assert found.trainer_idle == pytest.approx(0.1)
    assert found.shares["engine-0"]["publish"] == pytest.approx(0.01)
    assert (found.packing_fill, found.wire_bytes_per_token, found.mean_age) == (0.98, 8.5, 1.0)
    assert found.reward == pytest.approx(0.4)
    assert found.loop_lag_p99_ms == 9.0


def test_steps_before_the_window_do_not_count():
    """The trainer waited 9 of 10 s in steps 0 and 1."""
    everything = replace(readings.window(ROWS, skip=1, leave=0), first=-1, began_at=990.0)
    assert readings.shares(entries(), everything)["trainer"]["wait_for_batch"] == pytest.approx((18 + 4) / 60)
    assert reading().trainer_idle == pytest.approx(0.1)


def test_pipeline_efficiency():
    """Generating alone: 800 tokens at 200 a second are 4 s; training alone 6 s; a step takes 10."""
    generate_s = readings.generate_alone_s(reading(), ALONE)
    assert generate_s == pytest.approx(4.0)
    assert readings.pipeline_efficiency(train_s=6.0, generate_s=generate_s, step_s=10.0) == pytest.approx(0.6)


def test_the_trainer_alone_by_token():
    rows = [row(0, **{"train/step_s": 60.0}), row(1), row(2, **{"train/step_s": 8.0, "train/tokens": 3000.0})]
    assert readings.train_s_per_token(rows) == pytest.approx(14 / 4000)


def test_engine_utilisation():
    assert readings.engine_utilisation(reading(), ALONE) == pytest.approx(80 / 200)


def test_the_stall_and_its_parts():
    found = reading()
    assert found.stall_parts_s == pytest.approx(
        {"pause": 0.03, "load": 0.05, "resume": 0.01, "other": 0.01, "prefill_again": 0.0}
    )
    assert readings.stall_decode_steps(found, ALONE) == pytest.approx(5.0)


def test_a_planted_stall_shows():
    slow = [row(step, **{"publish/stopped_s": 2.1, "publish/load_s": 2.05}) for step in range(6)]
    found = reading(slow)
    assert found.stall_parts_s["load"] == pytest.approx(2.05)
    assert readings.stall_decode_steps(found, ALONE) == pytest.approx(105.0)


def test_prefilling_again_is_part_of_the_stall():
    """0.5 s of every 10 in the engine's ledger, one publish a step."""
    found = reading(ledger=entries(again=0.5))
    assert found.stall_parts_s["prefill_again"] == pytest.approx(0.5)
    assert readings.stall_decode_steps(found, ALONE) == pytest.approx(30.0)


def test_a_planted_wait_shows():
    assert reading(ledger=entries(waited=7.0)).trainer_idle == pytest.approx(0.7)


def test_overhead_of_the_same_rollouts():
    spans = [
        {"name": "publish", "version": 0, "started_at": 90.0, "wall_s": 10.0},
        {"name": "batch", "step": 0, "started_at": 111.0, "wall_s": 1.0},
        {"name": "publish", "version": 1, "started_at": 118.0, "wall_s": 2.0},
        {"name": "batch", "step": 1, "started_at": 130.5, "wall_s": 1.0},
        {"name": "publish", "version": 2, "started_at": 140.0, "wall_s": 2.0},
    ]
    ours_s = readings.generate_walls_s(spans)
    assert ours_s == pytest.approx([11.0, 10.5])
    assert readings.overhead(ours_s=ours_s, bare_s=[10.0, 10.0]) == pytest.approx(0.075)
    assert readings.overhead(ours_s=[20.0], bare_s=[10.0]) == pytest.approx(1.0)


def test_gain_and_bound():
    """8 s with the tail and 5 s of training against 6 s saturated: 13 / 6; a step went from 13 to 7 s."""
    bound = readings.async_bound(in_turns_s=8.0 + 5.0, slower_s=6.0)
    assert bound == pytest.approx(13 / 6)
    assert readings.async_gain(sync_step_s=13.0, async_step_s=7.0) / bound == pytest.approx(6 / 7)


def test_the_bound_of_updates_in_flight():
    """800 tokens at 200 a second in 5 s: 1 s is lost; 4 s of generating become 5, half hidden by 4.5 of training."""
    assert readings.lost_by_draining_s(ALONE) == pytest.approx(1.0)
    assert readings.waiting_bound(generate_s=4.0, lost_s=1.0, train_s=1.0) == pytest.approx(5 / 4)
    assert readings.waiting_bound(generate_s=4.0, lost_s=1.0, train_s=4.5) == pytest.approx(5 / 4.5)
    assert readings.waiting_bound(generate_s=4.0, lost_s=1.0, train_s=9.0) == 1.0


def test_closure_is_the_worst_process():
    ledger = entries()
    assert readings.closure(ledger) == pytest.approx(0.0)
    hole = LedgerEntry(process="env-0", started_at=0.0, wall_s=100.0, parts_s={"work": 95.0})
    assert readings.closure([*ledger, hole]) == pytest.approx(0.05)


def test_no_publish_in_the_window_is_no_number():
    silent = [{key: value for key, value in row(step).items() if "publish" not in key} for step in range(6)]
    assert math.isnan(reading(silent).stall_s)
