"""`palestra bench trainer`: what it makes of readings; and a whole one, of a model of a few thousand parameters."""

import json
from pathlib import Path

import msgspec
import pytest

from palestra.core.errors import UserError
from palestra.launch.bench import trainer as bench
from palestra.train import plain
from palestra.train.job import Job, Speed
from palestra.train.speed import build, synthetic_batch

SPEED = Speed(
    who="palestra",
    device="NVIDIA H100 80GB HBM3",
    attention=["padded"],
    ranks=2,
    steps_s=[2.0, 4.0, 9.0],
    cpu_s=[1.0, 1.0, 1.0],
    parts_s={"optimizer": 1.0},
    bytes_before=10,
    bytes_loaded=30,
    bytes_peak=60,
    flops=int(8 * 989e12),
    product_flops=7e14,
    loss=0.5,
    parameters=100,
)


def job(kind="rl") -> Job:
    return Job(config={}, packs=[[8, 4], [12]], kind=kind, prompt_share=0.25, steps=1)


def test_numbers_by_hand():
    told = bench._numbers(bench.Wish(), SPEED, 1000)
    assert told["tokens_per_s"] == 1000 / 4.0
    assert told["mfu"] == pytest.approx(8 * 989e12 / 4 / 2 / 989e12)  # the data sheet's peak, of two ranks
    assert (told["state_bytes"], told["peak_bytes"], told["optimizer_share"]) == (20, 50, 0.25)


def test_an_unknown_device_is_as_fast_as_its_products():
    assert bench.peak_flops(SPEED)[0] == 989e12
    unknown = Speed(**{name: getattr(SPEED, name) for name in SPEED.__struct_fields__} | {"device": "cpu"})
    assert bench.peak_flops(unknown)[0] == 7e14


def with_steps(who, steps_s, **others):
    return msgspec.structs.replace(SPEED, who=who, device="cpu", steps_s=steps_s, **others)


def test_two_that_are_compared_take_turns_and_memory_is_of_a_process_of_its_own(monkeypatch, tmp_path):
    """A machine that gets slower between the first turn and the second changes no ratio."""
    asked = []

    def speed(command, job, config, directory, *, is_lean=False):
        name, slow = command[-1], 3.0 if len(asked) >= 3 else 1.0
        asked.append((name, is_lean, job.steps))
        seconds = {"JOB": 1.0, "padded": 9.0, "masked": 2.0}[name]
        return with_steps(name, [seconds * slow] * job.steps, cpu_s=[seconds] * job.steps, bytes_peak=20 + is_lean)

    monkeypatch.setattr(bench, "_speed", speed)
    wish = bench.Wish(against="transformers")
    config = bench._config(wish, tmp_path)
    speeds = bench._speeds(bench._ways(wish, config), msgspec.structs.replace(job(), steps=2), config, tmp_path)
    names = ["JOB", "padded", "masked"]
    assert asked == [(name, False, 2) for name in names * 2] + [(name, True, 1) for name in names]
    assert speeds["palestra"].steps_s == [1.0, 1.0, 3.0, 3.0]
    told = bench._compare(speeds)
    assert (told["transformers_way"], told["throughput_over_transformers"]) == ("masked", 2.0)
    assert {speed.bytes_peak for speed in speeds.values()} == {21}


@pytest.mark.parametrize(("tokens", "documents"), [(100, 1), (100, 50), (4096, 7)])
def test_lengths_add_up_and_differ(tokens, documents):
    lengths = bench.unequal_lengths(tokens, documents, seed=1)
    assert (sum(lengths), len(lengths)) == (tokens, documents)
    assert min(lengths) >= 2
    assert documents in (1, 50) or len(set(lengths)) > documents // 2


def test_more_documents_than_tokens_are_refused():
    with pytest.raises(UserError, match="--documents 51"):
        bench.unequal_lengths(100, 51, seed=0)


def test_a_quarter_of_a_document_is_prompt_in_rl_and_its_first_token_in_sft():
    assert (job("rl").num_scored, job("sft").num_scored) == (24 - 2 - 1 - 3, 24 - 3)
    for kind, weight in (("rl", "rl_weight"), ("sft", "ce_weight")):
        batch = synthetic_batch(job(kind), step=0, vocab_size=9)
        assert getattr(batch, weight).sum() == job(kind).num_scored
        assert batch.token_ids.max() < 9


@pytest.mark.slow
def test_a_whole_one_agrees_with_transformers_alone(monkeypatch, tmp_path):
    """The same objective on the same weights and tokens: the losses are equal, after a step of training too."""
    monkeypatch.setattr(bench, "build", lambda fields, directory, threads: build(fields, directory))
    of_a_process: list[Speed] = []
    in_a_process = bench._speed

    def speed(command, job, config, directory, *, is_lean=False):
        if "palestra.train.plain" not in command:
            if not of_a_process:  # one is enough for all turns
                of_a_process.append(in_a_process(command, job, config, directory, is_lean=True))
            return of_a_process[0]
        plain_speed = plain.measure(job, command[-1])  # starting it would take longer than the step
        peak = plain_speed.bytes_before + 2**20  # this process had more before: what it adds cannot be seen
        return msgspec.structs.replace(plain_speed, bytes_peak=peak)

    monkeypatch.setattr(bench, "_speed", speed)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(bench.SHAPES["tiny"]))
    wish = bench.Wish(
        config=Path(file), tokens=64, documents=3, steps=1, against="transformers", overrides=["model.dtype=float32"]
    )
    told = bench.measure(wish)
    assert told["loss"] == pytest.approx(told["transformers_loss"], abs=1e-4)
    assert 0 < told["mfu"] < 1
    assert told["peak_bytes"] > told["state_bytes"] > 4 * told["parameters"] * 0.8
    assert told["throughput_over_transformers"] > 0
