"""What is pushed: read to its end, counted by hand, and refused where it is not what it says."""

import json
import zipfile
from pathlib import Path

import msgspec
import pytest

from palestra.algo.standing import standing
from palestra.core.errors import UserError
from palestra.core.records import Ending, RolloutRecord
from palestra.hub.evals.archive import ROLLOUTS, SETTINGS, Limits, check, pack
from tests.unit.hub.evals.made import archive, record, records, spoiled, told


def test_what_was_packed_is_read_and_counted(tmp_path: Path):
    """Tasks: 1 1, 0 1, 0 0."""
    found = check(archive(tmp_path / "a.zip"), to=tmp_path / "rollouts.jsonl")
    assert found.told == told()
    assert found.standing.reward.value == pytest.approx(3 / 6)
    assert {k: of.value for k, of in found.standing.pass_at.items()} == pytest.approx({"1": 1 / 2, "2": 2 / 3})
    assert (found.standing.tokens.completion, found.standing.tokens.prompt) == (24, 60)
    assert found.task_means == {"task 0": 1.0, "task 1": 0.5, "task 2": 0.0}
    lines = (tmp_path / "rollouts.jsonl").read_bytes().splitlines()
    assert [msgspec.json.decode(line, type=RolloutRecord) for line in lines] == records()


def test_the_same_content_is_the_same_archive_and_other_content_another(tmp_path: Path):
    pack(told(), records(), tmp_path / "one.zip")
    pack(told(), list(reversed(records())), tmp_path / "other.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "other.zip").read_bytes()
    same = check(tmp_path / "one.zip").digest
    assert check(archive(tmp_path / "c.zip", rewards="110101")).digest != same
    assert check(archive(tmp_path / "d.zip", seed=1)).digest != same


def _changed(number: int, **changes):
    def change(rows: list[dict]) -> list[dict]:
        rows[number] |= changes
        return rows

    return change


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (_changed(2, reward=float("inf")), "rollouts.jsonl:3"),
        (_changed(2, reward=float("nan")), "rollouts.jsonl:3 is no rollout"),
        (_changed(2, reward="1"), "rollouts.jsonl:3 is no rollout"),
        (_changed(2, reward=1.7e308), "rollouts.jsonl:3: its reward, .* beyond all bounds"),  # two of them are infinite
        (_changed(2, task={"key": "a" * 5000}), "the key of its task is longer than 4000"),
        (_changed(1, metrics={"m": float("-inf")}), "rollouts.jsonl:2"),
        (_changed(1, ending="invalid"), "errors are never rewards"),
        (_changed(1, ending="won"), "rollouts.jsonl:2 is no rollout"),
        (_changed(0, num_tokens=-1), "below 0"),
        (_changed(0, environment="another"), "is of 'another'"),
        (_changed(0, rollout_id=6), "beyond 3 tasks x 2"),
        (_changed(0, rollout_id=1), "a rollout_id twice"),
        (_changed(1, task={"key": "task 2"}), "of another task than those beside it"),
        (lambda rows: rows[:-1], "has 5 rollouts, and 3 tasks x 2 are 6"),
        (lambda rows: [], "has 0 rollouts"),
        (lambda rows: b"{}\n", "is no rollout"),
        (lambda rows: b'{"rollout_id":' + b"[" * 200_000 + b"\n", "is no rollout"),
        (lambda rows: b"\xff\xfe\n", "is no rollout"),
    ],
)
def test_a_rollout_that_cannot_be_is_named(lines, said, tmp_path: Path):
    with pytest.raises(UserError, match=said):
        check(spoiled(tmp_path / "a.zip", lines=lines))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "format"),
        ({"num_tasks": None}, "may be unknown in an import alone"),
        ({"surprise": 1}, "surprise"),
        ({"args": {"a": "x" * 30_000}}, "args are longer"),
        ({"overrides": ["engine.args={}; rm -rf /", "train.lr=1"]}, "overrides.1"),
        ({"environment_version": "1; rm"}, "environment_version"),
        ({"model": ""}, "model"),
        ({"model": "a\0b"}, "model"),
    ],
)
def test_settings_that_cannot_be_are_named(changes, said, tmp_path: Path):
    with pytest.raises(UserError, match=said):
        check(spoiled(tmp_path / "a.zip", settings=lambda known: known | changes))


def test_nothing_grows_beyond_its_bounds(tmp_path: Path):
    """The archive says nothing that is believed: a bomb ends where it passes the bound."""
    bomb = spoiled(tmp_path / "bomb.zip", lines=lambda rows: b" " * (20 << 20))
    assert bomb.stat().st_size < 100_000
    with pytest.raises(UserError, match="is longer than 1,048,576 bytes"):
        check(bomb, limits=Limits(line_bytes=1 << 20))
    with pytest.raises(UserError, match="larger than 1,048,576 bytes"):
        check(bomb, limits=Limits(rollouts_bytes=1 << 20))
    plain = archive(tmp_path / "a.zip")
    for limits, said in (
        (Limits(archive_bytes=100), "the archive is larger"),
        (Limits(settings_bytes=100), "evaluation.json is larger"),
        (Limits(rollouts=5), "more than 5 rollouts"),
        (Limits(line_bytes=50), "rollouts.jsonl:1 is longer"),
    ):
        with pytest.raises(UserError, match=said):
            check(plain, limits=limits)


def test_a_size_that_lies_is_not_believed(tmp_path: Path):
    """The directory says 10 bytes of what are 10 million: it is read as what it says, and fails its checksum."""
    bomb = spoiled(tmp_path / "a.zip", lines=lambda rows: b" " * 10_000_000)
    data = bytearray(bomb.read_bytes())
    size = (10_000_000).to_bytes(4, "little")
    while (place := data.find(size)) >= 0:
        data[place : place + 4] = (10).to_bytes(4, "little")
    bomb.write_bytes(bytes(data))
    with pytest.raises(UserError):
        check(bomb)


@pytest.mark.parametrize(
    "files",
    [
        {"../evaluation.json": b"{}", ROLLOUTS: b""},
        {SETTINGS: b"{}", ROLLOUTS: b"", "more": b""},
        {SETTINGS: b"{}"},
    ],
)
def test_other_files_are_refused(files, tmp_path: Path):
    with pytest.raises(UserError, match=r"an archive holds evaluation\.json and rollouts\.jsonl"):
        check(spoiled(tmp_path / "a.zip", files=files))


def test_what_is_no_archive_is_refused(tmp_path: Path):
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(UserError, match="no archive of an evaluation"):
        check(tmp_path / "a.zip")
    torn = archive(tmp_path / "b.zip").read_bytes()
    for length in range(0, len(torn), 97):
        (tmp_path / "c.zip").write_bytes(torn[:length])
        with pytest.raises(UserError):
            check(tmp_path / "c.zip")


def test_a_bit_that_fell_over_is_noticed(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_STORED) as file:
        file.writestr(SETTINGS, told().model_dump_json())
        file.writestr(ROLLOUTS, b"".join(msgspec.json.encode(one) + b"\n" for one in records()))
    assert check(tmp_path / "a.zip").standing.num_rollouts == 6
    data = bytearray((tmp_path / "a.zip").read_bytes())
    place = data.index(b"word2")
    data[place] ^= 1
    (tmp_path / "a.zip").write_bytes(bytes(data))
    with pytest.raises(UserError, match="no archive"):
        check(tmp_path / "a.zip")


def test_an_import_says_less_and_is_read_all_the_same(tmp_path: Path):
    said = told(imported="verifiers", num_tasks=None, rollouts_per_task=None, seed=None, missing=["no seeds"])
    pack(said, [record(0, 1.0), record(7, 0.5)], tmp_path / "a.zip")
    found = check(tmp_path / "a.zip")
    assert (found.standing.num_rollouts, found.told.missing) == (2, ("no seeds",))
    assert json.loads(found.told.model_dump_json())["imported"] == "verifiers"


def test_whatever_is_broken_is_refused_and_nothing_else_is_raised(tmp_path: Path):
    whole, refused = archive(tmp_path / "a.zip").read_bytes(), 0
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 0xFF
        (tmp_path / "b.zip").write_bytes(bytes(broken))
        try:
            check(tmp_path / "b.zip")
        except UserError:
            refused += 1
    assert refused > len(whole) / 2


def test_of_causes_only_the_most_frequent_are_told():
    invalid = [record(n, 0.0, ending=Ending.INVALID, error=f"cause {max(n - 50, 0)}") for n in range(300)]
    found = standing([record(300, 1.0), *invalid])
    assert (found.num_errors, len(found.errors)) == (300, 100)
    assert found.errors["cause 0"] == 51
