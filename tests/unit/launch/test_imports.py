"""Evaluations of the `verifiers` library: rows as two of its versions wrote them."""

import json
from pathlib import Path

import pytest

from palestra.core.errors import UserError
from palestra.core.records import Ending
from palestra.launch.cli import main
from palestra.launch.imports import import_all
from palestra.wire.results import read_results
from palestra.wire.runlog import read_summary

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"}]


def row(key: int, reward: float, said: str | None = "5", **more) -> dict:
    completion = [] if said is None else [{"role": "assistant", "content": said}]
    times = {"generation_ms": 1500.0, "scoring_ms": 500.0, "total_ms": 2000.0}
    return {"id": key, "prompt": ASKED, "completion": completion, "task": "default", "reward": reward, **times, **more}


def evaluation(path: Path, rows: list[dict], **metadata) -> Path:
    path.mkdir(parents=True)
    (path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    if metadata:
        (path / "metadata.json").write_text(json.dumps(metadata))
    return path


def test_rows_keep_what_they_say_and_are_summed_up_as_ours(tmp_path):
    rows = [
        row(0, 1.0, answer="5", correct_answer_reward_func=1.0, format_reward_func=1.0),
        row(0, 0.0, "six", answer="5", correct_answer_reward_func=0.0, format_reward_func=1.0),
        row(1, 1.0, answer="5", correct_answer_reward_func=1.0, format_reward_func=0.0),
        row(1, 1.0, answer="5", correct_answer_reward_func=1.0, format_reward_func=1.0),
    ]
    there = evaluation(tmp_path / "gsm8k--gpt" / "d497", rows, env="gsm8k", model="gpt")
    run = import_all([there], tmp_path / "ours")
    records = read_results(run)["gsm8k"]
    assert [(records[i].task.key, records[i].reward) for i in range(4)] == [("0", 1), ("0", 0), ("1", 1), ("1", 1)]
    assert records[1].messages == [*ASKED, {"role": "assistant", "content": "six"}]
    assert (records[1].task.answer, records[1].wall_s, records[1].num_turns) == ("5", 2.0, 1)
    assert records[1].metrics == {"correct_answer_reward_func": 0.0, "format_reward_func": 1.0}
    found = (read_summary(run) or {})["sets"]["gsm8k"]
    assert found["reward"]["mean"] == 0.75
    assert found["pass_at"] == {"1": 0.75, "2": 1.0}
    assert found["metrics"]["format_reward_func"] == 0.75


def test_what_was_never_played_is_invalid_and_no_reward_of_0(tmp_path):
    rows = [row(0, 0.0, None), row(1, 1.0), row(2, 0.0, "x", error="rate limit")]
    run = import_all([evaluation(tmp_path / "a", rows, env_id="e")], tmp_path / "ours")
    assert [record.ending for record in read_results(run)["e"].values()] == [Ending.INVALID, Ending.OK, Ending.INVALID]
    assert (read_summary(run) or {})["sets"]["e"]["reward"]["mean"] == 1.0


def test_later_rows_have_metrics_and_usage_of_their_own(tmp_path):
    later = row(0, 0.5, example_id=7, metrics={"f": 0.5}, token_usage={"output_tokens": 12}, is_truncated=True)
    run = import_all([evaluation(tmp_path / "deepdive--m" / "0d", [later])], tmp_path / "ours")
    [record] = read_results(run)["deepdive"].values()
    assert (record.task.key, record.metrics, record.num_tokens) == ("7", {"f": 0.5}, 12)
    assert record.ending == Ending.TRUNCATED


def test_several_evaluations_are_one_and_rollouts_keep_numbers_of_their_own(tmp_path):
    one = evaluation(tmp_path / "a", [row(0, 1.0), row(1, 1.0)], env="e")
    other = evaluation(tmp_path / "b", [row(0, 0.0)], env="e")
    run = import_all([one, other], tmp_path / "ours")
    assert sorted(read_results(run)["e"]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "1 is no row"), ('{"prompt": []}', "1 is no row"), ('{"prompt": [], "completion": [], "reward": 0}', "e: ")],
)
def test_what_cannot_be_read_is_named(tmp_path, content, words):
    there = evaluation(tmp_path / "a", [], env="e")
    (there / "results.jsonl").write_text(content + "\n")
    with pytest.raises(UserError, match=words):
        import_all([there], tmp_path / "ours")


def test_an_imported_evaluation_cannot_be_scored_again_and_says_why(tmp_path, capsys):
    import_all([evaluation(tmp_path / "a", [row(0, 1.0)], env="e")], tmp_path / "ours")
    assert main(["replay", str(tmp_path / "ours"), "--rewards"]) == 2
    assert "cannot be played or scored again, because its environment is not ours" in capsys.readouterr().err


def test_a_directory_without_results_and_one_that_is_there_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no results\.jsonl"):
        import_all([tmp_path], tmp_path / "ours")
    with pytest.raises(UserError, match="exists; give another"):
        import_all([evaluation(tmp_path / "a", [row(0, 1.0)])], tmp_path)
