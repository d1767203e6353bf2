"""`palestra eval` against an endpoint: what it says, killed and resumed, compared, refused."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from palestra.wire.results import read_results
from palestra.wire.rundir import RunDir
from tests.integration.endpoint import Endpoint
from tests.integration.runs import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CONCURRENCY, ANSWERED = 4, 24  # requests of an evaluation that is killed: at once, and before it is


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as served:
        yield served


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "palestra.launch.cli", "eval", *map(str, words)]


def evaluate(*words: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words), capture_output=True, text=True, timeout=300, cwd=cwd, env={**os.environ, **env}
    )


def at(endpoint: Endpoint) -> tuple[str, ...]:
    return ("--base-url", endpoint.url, "--model", "backwards")


def backwards(body: dict) -> dict:
    """The word, or not, by the request's seed."""
    word = body["messages"][-1]["content"]
    return {"role": "assistant", "content": word[::-1] if body["seed"] % 3 else word}


def told(directory: Path) -> list[tuple]:
    """What a results file says that does not depend on when it was written."""
    records = [record for numbered in read_results(RunDir(directory)).values() for record in numbered.values()]
    return sorted((r.environment, r.rollout_id, r.task.key, r.reward, str(r.messages), r.ending) for r in records)


def test_what_an_endpoint_says_is_scored_and_told(endpoint, tmp_path):
    done = evaluate("reverse-text", *at(endpoint), "-n", 20, "-r", 3, "--output", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["sets"]["reverse-text"]
    asked = endpoint.asked
    right = sum(body["seed"] % 3 > 0 for body in asked) / 60
    assert len(asked) == 60
    assert 0.4 < right < 0.9
    assert found["reward"]["mean"] == pytest.approx(right)
    assert found["reward"]["low"] < right < found["reward"]["high"]
    assert (found["reward"]["num_tasks"], found["reward"]["num_rollouts"]) == (20, 60)
    assert found["pass_at"]["1"] == pytest.approx(right)
    assert found["pass_at"]["3"] > found["pass_at"]["2"] > found["pass_at"]["1"]
    assert found["endings"] == {"ok": 60}
    assert {body["temperature"] for body in asked} == {1.0}
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert metadata["environments"]["reverse-text"]["version"] == "0.1.0"
    for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["reward"] == float(row["messages"][-1]["content"] == row["task"]["answer"])


def test_killed_at_any_moment_and_resumed_it_is_the_unkilled_one_and_nothing_is_asked_twice(tmp_path):
    """It dies while its last requests wait for their answers."""
    words = ("reverse-text", "-n", 40, "-r", 2, "--concurrency", CONCURRENCY)
    with Endpoint(speak=backwards) as endpoint:
        assert evaluate(*words, *at(endpoint), "--output", tmp_path / "whole").returncode == 0
    numbers, goes_on = itertools.count(), threading.Event()

    def hesitant(body: dict) -> dict:
        assert next(numbers) < ANSWERED or goes_on.wait(300)
        return backwards(body)

    with Endpoint(speak=hesitant) as endpoint:
        out = tmp_path / "killed"
        process = subprocess.Popen(
            command(*words, *at(endpoint), "--output", out), stderr=subprocess.DEVNULL, start_new_session=True
        )
        wait_until(
            lambda: len(endpoint.asked) == ANSWERED + CONCURRENCY and told(out), deadline_s=240, what="all it may ask"
        )
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        assert not psutil.wait_procs(family, timeout=60)[1], "nothing is left behind"
        goes_on.set()
        finished = len(told(out))
        assert 0 < finished < 80
        with (out / "results.jsonl").open("ab") as file:
            file.write(b'{"rollout_id": 3, "half of a')
        before = len(endpoint.asked)
        resumed = evaluate(*words, *at(endpoint), "--concurrency", 64, "--resume", out)
        assert resumed.returncode == 0, resumed.stderr
        asked_again = len(endpoint.asked) - before
    assert told(out) == told(tmp_path / "whole")
    assert asked_again == 80 - finished
    lines = (out / "results.jsonl").read_text().splitlines()
    assert len(lines) == 80
    one, other = (json.loads((tmp_path / name / "summary.json").read_text())["sets"] for name in ("whole", "killed"))
    assert one == other


def test_a_busy_endpoint_is_asked_again_and_a_wrong_key_ends_it_in_words(tmp_path):
    with Endpoint(busy=8, key="secret") as endpoint:
        options = ("reverse-text", *at(endpoint), "-n", 4, "--key-env", "BACKWARDS_KEY")
        missing = evaluate(*options, "--output", tmp_path / "missing")
        assert missing.returncode == 2
        assert "eval.endpoint.key_env=BACKWARDS_KEY" in missing.stderr
        wrong = evaluate(*options, "--output", tmp_path / "wrong", BACKWARDS_KEY="guess")
        assert wrong.returncode == 2, wrong.stderr
        assert "check the model's name and the key" in wrong.stderr
        right = evaluate(*options, "--output", tmp_path / "right", BACKWARDS_KEY="secret")
        assert right.returncode == 0, right.stderr
    assert len(endpoint.asked) == 4
    assert "secret" not in (tmp_path / "right" / "config.json").read_text()


def test_two_evaluations_are_compared_task_by_task(endpoint, tmp_path):
    for name, seed in (("one", 0), ("other", 1)):
        words = ("reverse-text", *at(endpoint), "-n", 10, "--seed", seed, "--output", tmp_path / name)
        assert evaluate(*words).returncode == 0
    compared = evaluate("compare", tmp_path / "one", tmp_path / "other", "--json")
    assert compared.returncode == 0, compared.stderr
    found = json.loads(compared.stdout)["reverse-text"]
    means = [
        json.loads((tmp_path / n / "summary.json").read_text())["sets"]["reverse-text"]["reward"]["mean"]
        for n in ("one", "other")
    ]
    assert found["mean"] == pytest.approx(means[1] - means[0])
    assert found["num_tasks"] == 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name at least one environment"),
        (("reverse-text",), "give either --checkpoint DIR, or --base-url"),
        (("reverse-text", "--base-url", "http://127.0.0.1:1/v1"), "--base-url needs --model"),
        (("reverse-txt", "--base-url", "http://127.0.0.1:1/v1", "--model", "x"), "did you mean 'reverse-text'"),
        (("reverse-text", "--checkpoint", "nowhere/at/all"), "--checkpoint=nowhere/at/all is not a directory"),
        (("--resume", "nowhere"), "nowhere has no evaluation to resume"),
    ],
)
def test_a_wrong_wish_is_refused_before_anything_starts(words, said, tmp_path):
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "outputs").exists()


WORDS = """
from palestra.env import Environment, Task, reward

class Words(Environment):
    \"\"\"Write a word backwards.\"\"\"

    max_turns = 1

    def tasks(self):
        yield from (Task(prompt=word, answer=word[::-1]) for word in ("abc", "bcd", "cde", "def"))

    @reward
    def right(self, task, rollout):
        return {worth} * (rollout.reply == task.answer)

    @reward(group=True)
    def only(self, task, rollouts):
        right = [rollout.reply == task.answer for rollout in rollouts]
        return [float(one and sum(right) == 1) for one in right]
"""


def test_group_rewards_count_and_saved_rollouts_are_scored_again_after_a_reward_changed(endpoint, tmp_path):
    file = tmp_path / "words.py"
    file.write_text(WORDS.format(worth=1))
    words = ("words.py:Words", *at(endpoint), "-n", 4, "-r", 2, "--output", "out", "--json")  # seeds follow the name
    done = evaluate(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [found] = json.loads(done.stdout)["sets"].values()
    right = [body["seed"] % 3 > 0 for body in endpoint.asked]
    assert found["rewards"]["right"] == pytest.approx(sum(right) / 8)
    assert 0 < found["rewards"]["only"] < 1
    file.write_text(WORDS.format(worth=0.5))
    command = [sys.executable, "-m", "palestra.launch.cli", "replay", str(tmp_path / "out"), "--rewards", "--json"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    [row] = json.loads(again.stdout).values()
    assert row["before"] - row["after"] == pytest.approx(sum(right) / 16)
    assert (row["changed"], row["rollouts"]) == (sum(right), 8)


def test_good_rollouts_become_supervised_rows(endpoint, tmp_path):
    to = tmp_path / "data" / "rows.jsonl"
    command = [sys.executable, "-m", "palestra.launch.cli", "generate", "reverse-text", *at(endpoint), "-n", "12"]
    done = subprocess.run(
        [*command, "--to", str(to), "--output", str(tmp_path / "out")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in to.read_text().splitlines()]
    assert len(rows) == sum(body["seed"] % 3 > 0 for body in endpoint.asked) < 12
    for row in rows:
        asked, said = row["messages"]
        assert (asked["role"], said["role"], said["content"]) == ("user", "assistant", asked["content"][::-1])
        assert row["reward"] == 1.0


ECHO = """
from palestra.env import Environment, Frozen, Task, metric

class Echo(Environment):
    \"\"\"The user gives a word, the agent writes it backwards, the user judges.\"\"\"

    def tasks(self):
        yield from (Task(prompt=word) for word in ("abc", "bcd", "cde", "def"))

    async def run(self, task, agent, user: Frozen):
        word = await user(task.prompt)
        agent.rewards["right"] = float(await agent(word) == word[::-1])
        user.rewards["asked"] = 1.0
"""


def test_another_model_speaks_for_a_seat_and_is_no_part_of_what_is_measured(endpoint, tmp_path):
    (tmp_path / "echo.py").write_text(ECHO)
    with Endpoint() as users:
        words = (
            "echo.py:Echo",
            *at(endpoint),
            "--seat",
            f"user={users.url},guest",
            "-n",
            4,
            "--output",
            "out",
            "--json",
        )
        done = evaluate(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert {body["model"] for body in users.asked} == {"guest"}
        assert {body["model"] for body in endpoint.asked} == {"backwards"}
        assert [body["temperature"] for body in users.asked] == [1.0] * 4
    [found] = json.loads(done.stdout)["sets"].values()
    right = [body["seed"] % 3 > 0 for body in endpoint.asked]
    assert found["reward"]["mean"] == pytest.approx(sum(right) / 4)
    assert found["metrics"] == {"user.asked": 1.0}
    [records] = read_results(RunDir(tmp_path / "out")).values()
    assert [[seat.name for seat in record.seats] for record in records.values()] == [["agent"]] * 4


@pytest.mark.parametrize(
    ("seat", "said"),
    [
        ("user", "is not NAME=URL,MODEL"),
        ("guest=http://127.0.0.1:1/v1,m", "seats.guest names no seat"),
        ("agent=http://127.0.0.1:1/v1,m", "none would train"),
    ],
)
def test_a_seat_that_cannot_be_given_away_is_said(endpoint, tmp_path, seat, said):
    (tmp_path / "echo.py").write_text(ECHO)
    done = evaluate("echo.py:Echo", *at(endpoint), "--seat", seat, "-n", 1, "--output", "out", cwd=tmp_path)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


def test_an_interrupted_evaluation_of_a_file_goes_on_from_another_directory_and_not_after_it_changed(
    endpoint, tmp_path
):
    file, out = tmp_path / "echo.py", tmp_path / "out"
    file.write_text(ECHO)
    assert evaluate("echo.py:Echo", *at(endpoint), "-n", 2, "--output", "out", cwd=tmp_path).returncode == 0
    (elsewhere := tmp_path / "elsewhere").mkdir()
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text(lines[0])
    asked = len(endpoint.asked)
    again = evaluate("--resume", out, cwd=elsewhere)
    assert again.returncode == 0, again.stderr
    assert len(endpoint.asked) == asked + 2  # the user's turn and the agent's, of the rollout that was lost
    file.write_text(ECHO.replace("backwards", "back"))
    refused = evaluate("--resume", out, cwd=elsewhere)
    assert (refused.returncode, "go back to that version" in refused.stderr) == (2, True), refused.stderr


def test_known_answers_become_supervised_rows_without_a_model(tmp_path):
    to = tmp_path / "rows.jsonl"
    command = [
        sys.executable,
        "-m",
        "palestra.launch.cli",
        "generate",
        "reverse-text",
        "--gold",
        "-n",
        "7",
        "--to",
        str(to),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in to.read_text().splitlines()]
    assert len({row["key"] for row in rows}) == 7
    assert all(row["messages"][1]["content"] == row["messages"][0]["content"][::-1] for row in rows)
