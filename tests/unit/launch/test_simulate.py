"""`palestra simulate`: what it prints, what it refuses, and the curves of a finished run."""

import json
from pathlib import Path

import numpy as np
import pytest

from palestra.core.errors import UserError
from palestra.launch.cli import main
from palestra.orchestrate.simulate.curves import EngineCurve, read_curves
from palestra.orchestrate.simulate.engine import Engine, Request
from palestra.orchestrate.simulate.speed import Flights, Stop, fit_speed

RECIPE = """
[log]
name = "small"
[model]
path = "unused"
[algo]
groups_per_step = 4
group_size = 4
[[env.mix]]
id = "none"
"""
CURVES = """
source = "made up"
[engine]
concurrency = [1, 16]
tokens_per_s = [50, 400]
[trainer]
s_per_token = 1e-3
[work]
median_tokens = 100
sigma = 0.8
max_tokens = 1000
"""


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "curves.toml").write_text(CURVES)
    return [str(tmp_path / "recipe.toml"), "--curves", str(tmp_path / "curves.toml")]


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main(["simulate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_recipe_and_what_it_would_be_without_being_asynchronous(files, capsys):
    found = told(capsys, *files)
    recipe, _, batches, turns = found["variants"].values()
    assert recipe["step_s"] < batches["step_s"] < turns["step_s"]
    assert found["in_flight_factor"] == pytest.approx(batches["step_s"] / recipe["step_s"])
    assert recipe["mean_age"] > turns["mean_age"] == 0


def test_overrides_change_what_is_simulated(files, capsys):
    plain, deep = told(capsys, *files), told(capsys, *files, "algo.pace_age=3")
    name = "as the recipe says"
    assert deep["variants"][name]["mean_age"] > plain["variants"][name]["mean_age"] + 0.5


def test_a_recipe_whose_publishes_wait_is_simulated_so(files, capsys):
    plain, waiting = told(capsys, *files)["variants"], told(capsys, *files, "sync.wait=true")["variants"]
    name = "as the recipe says"
    assert waiting[name] == plain["updates wait for rollouts"] != plain[name]


def test_splits_of_so_many_devices(files, capsys):
    found = told(capsys, *files, "--gpus", "6", "--steps", "10")
    assert {split["trainer_gpus"] + split["engines"] for split in found["splits"]} == {6}
    assert found["best"]["outcome"]["step_s"] == min(split["outcome"]["step_s"] for split in found["splits"])


def test_tables_are_for_people(files, capsys):
    assert main(["simulate", *files, "--steps", "5"]) == 0
    assert "times as long" in (shown := capsys.readouterr().out)
    assert "made up" in shown
    assert main(["simulate", *files, "--steps", "5", "--gpus", "4"]) == 0
    assert "Best: " in capsys.readouterr().out


def test_curves_are_saved_and_read_again(files, capsys, tmp_path):
    told(capsys, *files, "--save", str(tmp_path / "saved.json"))
    assert read_curves(tmp_path / "saved.json") == read_curves(tmp_path / "curves.toml")


def test_no_curves_and_two_are_mistakes(files, capsys):
    assert main(["simulate", files[0]]) == 2
    assert "exactly one of --from RUN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[50, 400]", "[50]", "give as many"),
        ("[1, 16]", "[16, 1]", "must ascend"),
        ("median_tokens", "middle_tokens", "middle_tokens"),
        ("[work]", "[work", "holds no curves"),
    ],
)
def test_curves_that_make_no_sense_are_mistakes(tmp_path, old, new, words):
    (tmp_path / "curves.toml").write_text(CURVES.replace(old, new))
    with pytest.raises(UserError, match=words):
        read_curves(tmp_path / "curves.toml")


# --- curves of a run


def flights_of(curve: EngineCurve, *, stop_s: float = 0.0) -> tuple[Flights, list[Stop]]:
    """Bursts of rollouts with long tails at one engine, stopped in the middle of each."""
    rng, rows, stops = np.random.default_rng(0), [], []
    now = 0.0
    for _ in range(40):
        engine, tokens = Engine(curve), np.rint(60 * np.exp(rng.standard_normal(48))) + 1
        coming = sorted(zip((now + rng.uniform(0, 1.0, 48)).tolist(), tokens.tolist(), strict=True))
        begun: dict[int, tuple[float, float]] = {}
        ended, is_stopped = [], not stop_s
        while coming or engine.in_flight:
            end = engine.next_end() or np.inf
            if not is_stopped and min(end, coming[0][0] if coming else np.inf) > now + 1.0:
                is_stopped = True
                engine.stop(now + 1.0, stop_s, 1, recompute=False)
                stops.append(Stop(now + 1.0, now + 1.0 + stop_s, 1.0))
            elif coming and coming[0][0] <= end:
                at, size = coming.pop(0)
                request = Request(0, size, lambda _: None, lambda: None)
                begun[id(request)] = (at, size)
                engine.admit(at, request)
            else:
                ended.append((*begun[id(engine.end_next(end))], end))
        rows += ended
        now = max(end for *_, end in ended) + 0.5
    began_s, tokens, ended_s = np.array(rows).T
    return Flights(began_s, ended_s, tokens, np.ones(len(rows))), stops


@pytest.mark.parametrize("stop_s", [0.0, 0.4])
def test_the_speed_of_an_engine_is_found_again(stop_s):
    curve = EngineCurve(concurrency=(1, 8, 32, 64), tokens_per_s=(100, 500, 1000, 1200))
    flights, stops = flights_of(curve, stop_s=stop_s)
    found = fit_speed(flights, stops, engines=1)
    for running in (2, 4, 8, 16, 32):
        assert found.per_request(running) == pytest.approx(curve.per_request(running), rel=0.2)


def test_a_rollouts_mean_speed_would_not_do():
    """The last ones of a tail began in a crowd: their own mean speed is far below that of a request alone."""
    curve = EngineCurve(concurrency=(1, 8, 32, 64), tokens_per_s=(100, 500, 1000, 1200))
    flights, _ = flights_of(curve)
    longest = flights.tokens > np.percentile(flights.tokens, 98)
    mean_speed = (flights.tokens / (flights.ended_s - flights.began_s))[longest].mean()
    assert mean_speed < 0.8 * curve.per_request(2)
