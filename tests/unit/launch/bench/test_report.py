"""What is said of the numbers: met, missed, or not judged at this ratio."""

import json

import pytest

from palestra.launch.bench.report import AIMS, tell, verdict

AT_A_RATIO = {
    "generate_over_train": 1.02,
    "m1_pipeline_efficiency": 0.96,
    "trainer_idle": 0.2,
    "m2_engine_utilisation": 0.5,
    "m3_stall_decode_steps": 4.0,
    "m3_share_of_step": 0.01,
    "packing_fill": 0.97,
    "wire_bytes_per_token": 9.0,
    "ledger_closure": 0.02,
    "stall_parts_s": {"pause": 0.03, "load": 0.05},
    "decode_step_s": 0.02,
    "ledger": {"trainer": {"wait_for_batch": 0.2, "forward_backward": 0.8}},
}


def test_an_aim_is_judged_where_its_side_is_the_bottleneck():
    assert verdict("trainer_idle", 0.2, "2") == ""
    assert verdict("trainer_idle", 0.2, "0.5") == "missed"
    assert verdict("trainer_idle", 0.04, "0.5") == "met"
    assert verdict("m2_engine_utilisation", 0.93, "2") == "met"
    assert verdict("m2_engine_utilisation", 0.929, "2") == "missed"
    assert verdict("m2_engine_utilisation", None, "2") == ""


@pytest.mark.parametrize("key", AIMS)
def test_no_number_meets_its_aim_from_the_wrong_side(key: str):
    ratio = AIMS[key].ratios[-1]
    assert {verdict(key, -1e9, ratio), verdict(key, 1e9, ratio)} == {"met", "missed"}
    assert verdict(key, float("nan"), ratio) == "missed"


def test_numbers_stand_beside_their_aims(capsys: pytest.CaptureFixture):
    numbers = {**AT_A_RATIO, "m4_overhead_wall": 0.3, "m5_async_gain_over_bound": None, "ratios": {"1": AT_A_RATIO}}
    tell(numbers, as_json=False)
    shown = capsys.readouterr().out
    for part in ("m4_overhead_wall", ">= 0.95", "missed", "met", "not measured", "wait_for_batch"):
        assert part in shown
    tell(numbers, as_json=True)
    said = capsys.readouterr()
    assert json.loads(said.out) == numbers
    assert "missed" in said.err
