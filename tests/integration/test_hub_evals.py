"""From `palestra eval --push` to a verified row, with a real hub and endpoint; and the command that the page shows."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from palestra.hub.client import Client
from palestra.wire.results import read_results
from palestra.wire.rundir import RunDir
from tests.hubs import Running, running
from tests.integration.endpoint import Endpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]
CLI = [sys.executable, "-m", "palestra.launch.cli"]


@dataclass
class Served:
    """A hub, and how its administrator asks it."""

    running: Running

    def client(self) -> Client:
        return self.running.client()

    def palestra(self, *words: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
        done = self.running.palestra(*map(str, words))
        assert done.returncode == expect, done.stderr
        return done


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with running(tmp_path_factory.mktemp("hub") / "data", "--admin", "alice") as started:
        started.environ |= {"PALESTRA_HUB": started.url, "PALESTRA_HUB_TOKEN": started.token}
        served = Served(started)
        served.palestra("hub", "push", ROOT / "environments" / "reverse_text")
        yield served


def told(directory: Path) -> list[tuple]:
    records = read_results(RunDir(directory))["reverse-text"].values()
    return sorted((one.rollout_id, one.task.key, one.reward, str(one.messages)) for one in records)


def test_an_evaluation_is_pushed_shown_verified_and_played_again_by_its_command(hub: Served, tmp_path: Path):
    with Endpoint() as endpoint:
        at = ("--base-url", endpoint.url, "--model", "backwards")
        words = ("reverse-text", *at, "-n", 6, "-r", 2, "--seed", 3, "--max-tokens", 50)
        pushed = hub.palestra("eval", *words, "--output", tmp_path / "out", "--push")
        again = hub.palestra("hub", "push-eval", tmp_path / "out", "--json")
        with hub.client() as client:
            (row,) = client.evaluations("alice", "reverse-text")
            page = client.evaluation("alice", "reverse-text", row.id)
        assert f"/alice/reverse-text/evaluations/{row.id}" in pushed.stdout
        assert (json.loads(again.stdout)["is_new"], json.loads(again.stdout)["id"]) == (False, row.id)
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())["sets"]["reverse-text"]
        assert row.standing.reward.value == pytest.approx(summary["reward"]["mean"])
        assert row.standing.pass_at["2"].value == pytest.approx(summary["pass_at"]["2"])
        assert row.standing.tokens.prompt == sum(len(one[1]) for one in told(tmp_path / "out"))
        assert (row.version, row.is_known_version, row.library) == ("0.1.0", True, "0.1.0")
        asked = len(endpoint.asked)
        command = shlex.split(page.reproduce[-1])
        assert command[:2] == ["palestra", "eval"]
        hub.palestra(*command[1:], "--output", tmp_path / "again")
        assert len(endpoint.asked) == 2 * asked == 24
    assert told(tmp_path / "again") == told(tmp_path / "out")
    verified = hub.palestra("hub", "verify", "--data", hub.running.data)
    assert f"alice/reverse-text {row.id[:8]}: verified" in verified.stdout
    with hub.client() as client:
        assert [one.verified for one in client.evaluations("alice", "reverse-text", verified="yes")] == [True]


def test_the_library_before_this_one_is_imported_and_marked(hub: Served, tmp_path: Path):
    old = tmp_path / "reverse-text--gpt" / "1"
    old.mkdir(parents=True)
    metadata = {"env_id": "reverse-text", "model": "gpt", "num_examples": 2, "rollouts_per_example": 2}
    metadata |= {"sampling_args": {"temperature": 0.7, "max_tokens": 20}, "avg_reward": 0.75}
    (old / "metadata.json").write_text(json.dumps(metadata))
    rows = [
        {
            "example_id": number // 2,
            "prompt": [{"role": "user", "content": "abc"}],
            "completion": [{"role": "assistant", "content": "cba"}],
            "reward": float(number > 0),
            "info": {},
            "token_usage": {"input_tokens": 5, "output_tokens": 2},
        }
        for number in range(4)
    ]
    (old / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hub.palestra("eval", "import", old, "--output", tmp_path / "imported")
    hub.palestra("hub", "push-eval", tmp_path / "imported")
    with hub.client() as client:
        (row,) = client.evaluations("alice", "reverse-text", model="gpt")
        page = client.evaluation("alice", "reverse-text", row.id)
    assert (row.imported, row.verified, row.status, row.temperature) == ("verifiers", False, "unverifiable", 0.7)
    assert (row.standing.reward.value, row.standing.tokens.prompt) == (0.75, 20)
    assert page.reproduce == []
    assert any("cannot be scored again" in note for note in page.notes)


def test_what_cannot_be_pushed_is_said_before_anything_is_measured_or_sent(hub: Served, tmp_path: Path):
    with Endpoint() as endpoint:
        words = ("eval", "reverse-text", "--base-url", endpoint.url, "--model", "m", "-n", "2")
        unknown = hub.running.environ | {"PALESTRA_HUB_TOKEN": ""}
        done = subprocess.run([*CLI, *words, "--push"], capture_output=True, text=True, timeout=60, env=unknown)
        assert (done.returncode, len(endpoint.asked)) == (2, 0)
        assert "nobody has logged in" in done.stderr
        hub.palestra(*words, "--output", tmp_path / "out")
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "results.jsonl").write_text(lines[0])
    assert "has 1 of 2 rollouts" in hub.palestra("hub", "push-eval", tmp_path / "out", expect=2).stderr
    (tmp_path / "out" / "results.jsonl").write_text("".join(lines))
    nowhere = hub.palestra("hub", "push-eval", tmp_path / "out", "--owner", "nobody", expect=2)
    assert "there is no environment nobody/reverse-text" in nowhere.stderr
    assert "push it later by: palestra hub push-eval" in nowhere.stderr
