"""A whole run with frozen models behind real engines: the policy's own first weights, and other ones."""

from pathlib import Path

import pytest

from palestra.config import load
from palestra.config.schema import Build
from palestra.model.build import build_model
from tests.integration.runs import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def built(directory: Path, build: Build, seed: int) -> Path:
    path = directory / f"seed-{seed}"
    build_model(build.model_copy(update={"seed": seed}), path)
    return path


def test_the_policy_starts_at_its_own_weights_and_not_at_those_of_another(tmp_path: Path):
    """KL about 0 to a reference that equals version 0, in engine and trainer alike; the control is another model."""
    run = Run(tmp_path, "frozen", max_age=0)
    build = load(tmp_path / "frozen.toml").config.model.build
    assert build is not None
    reference, teacher = (built(tmp_path, build, seed) for seed in (build.seed, build.seed + 1))
    code, said = run.finish(
        "train.steps=2",
        f"algo.reference.path={reference}",
        "algo.reference.weight=0.1",
        f"algo.teacher.path={teacher}",
        "algo.teacher.weight=1.0",
        deadline_s=560,  # three engines start, on however few cores
    )
    assert code == 0, said
    first, second = run.rows[0], run.rows[1]
    assert abs(first["frozen/reference/kl"]) < 1e-4
    assert first["train/ref/reference_k3"] < 1e-6
    assert first["frozen/teacher/kl"] > 1e-3  # untrained models are all nearly uniform
    assert second["train/ref/reference_k3"] > 100 * first["train/ref/reference_k3"]  # one step away
    assert run.summary["ledger_closure"] <= 0.01
