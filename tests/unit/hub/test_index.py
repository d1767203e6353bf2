"""The index equals its files: however they grow, whoever else looks, whatever happened to it."""

import errno
import fcntl
import random
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest

from palestra.core.errors import InfrastructureError
from palestra.core.records import RolloutRecord
from palestra.hub import index as index_module
from palestra.hub.columns import COLUMNS, read_part
from palestra.hub.index import NAME, RunIndex
from palestra.wire.rundir import RunDir
from tests.unit.hub.written import lines_of, record, scan, write, write_some


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    write_some(RunDir(tmp_path / "run"))
    return RunDir(tmp_path / "run")


def updated(run: RunDir) -> RunIndex:
    index = RunIndex(run)
    index.update()
    return index


def rows(index: RunIndex) -> list[tuple]:
    """Everything that the index says, with texts instead of their numbers."""
    return [
        (
            part.name,
            *(part.columns[name][i].item() for name in COLUMNS if name not in ("environment", "error")),
            part.header.environments[part.columns["environment"][i]],
            part.header.errors[part.columns["error"][i]],
        )
        for part in index.parts
        for i in range(part.num_rows)
    ]


def test_it_says_what_the_lines_say(run: RunDir):
    index = updated(run)
    by_name = {part.name: part for part in index.parts}
    lines = scan(run)
    assert sum(part.num_rows for part in index.parts) == len(lines)
    for line in lines:
        columns, of = by_name[line.file].columns, line.record
        found = {name: columns[name][line.line].item() for name in COLUMNS}
        assert found["reward"] == of.reward
        assert found["rollout_id"] == of.rollout_id
        assert (found["tokens"], found["turns"], found["wall_s"]) == (of.num_tokens, of.num_turns, of.wall_s)
        assert found["version"] == min(of.versions, default=-1)
        assert by_name[line.file].header.environments[found["environment"]] == of.environment
        assert by_name[line.file].header.errors[found["error"]] == (of.error.splitlines() or [""])[0]
        data = (run.rollouts / f"{line.file}.jsonl").read_bytes()
        assert data[found["offset"] : found["offset"] + found["size"]] == lines_of([of])


@pytest.mark.parametrize("seed", range(5))
def test_growing_by_pieces_equals_at_once(tmp_path: Path, seed: int):
    """Cut anywhere, in the middle of lines too; some pieces are seen by a second index that begins anew."""
    chance, run = random.Random(seed), RunDir(tmp_path / "run")
    run.path.mkdir()
    data = lines_of([record(i, chance) for i in range(60)])
    index, begin = RunIndex(run), 0
    while begin < len(data):
        end = min(begin + chance.randrange(1, 2500), len(data))
        with run.results.open("ab") as file:
            file.write(data[begin:end])
        begin = end
        if chance.random() < 0.3:
            index = RunIndex(run)
        index.update()
        assert sum(part.num_rows for part in index.parts) == data[:end].count(b"\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.jsonl").write_bytes(data)
    assert rows(index) == rows(updated(RunDir(tmp_path / "other")))
    assert rows(index) == rows(updated(run))


def test_a_torn_tail_is_waited_for(run: RunDir):
    path = run.rollouts / "step-000003.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    index = updated(run)
    num = index.parts[-2].num_rows
    assert num == whole.count(b"\n") - 1
    path.write_bytes(whole)
    assert index.update()
    assert rows(index) == rows(updated(run))
    assert not index.update()


def test_a_file_written_anew_is_read_anew(run: RunDir):
    index, chance = updated(run), random.Random(9)
    path = write(run, "step-000001", [record(i, chance) for i in range(100, 140)])
    index.update()
    part = next(part for part in index.parts if part.name == path.stem)
    assert part.columns["rollout_id"].tolist() == list(range(100, 140))


def test_a_part_that_goes_on_where_it_should_not_is_wrong(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    """The control of the test above: without a look at the edges of what was read before, it fails."""
    index, chance = updated(run), random.Random(9)
    monkeypatch.setattr("palestra.hub.columns.goes_on", lambda *_: True)
    path = write(run, "step-000001", [record(i, chance) for i in range(100, 140)])
    index.update()
    part = next(part for part in index.parts if part.name == path.stem)
    assert part.columns["rollout_id"].tolist() != list(range(100, 140))


def test_a_file_that_is_gone_is_forgotten(run: RunDir):
    index = updated(run)
    (run.rollouts / "step-000002.jsonl").unlink()
    assert index.update()
    assert "step-000002" not in {part.name for part in index.parts}


def test_what_is_no_rollout_is_counted_and_left_out(run: RunDir):
    path = run.rollouts / "step-000000.jsonl"
    before = path.read_bytes()
    path.write_bytes(b'{"rollout_id": "x"}\nnot json\n' + before)
    part = read_part(path)
    assert part.header.num_unreadable == 2
    assert part.num_rows == before.count(b"\n")


ODD = [
    b"",
    b"   ",
    b"null",
    b"[1]",
    b"{}",
    b'{"rollout_id": "x"}',
    b'{"a": "x',
    b'x"}',
    b'{"a": [{}',
    b"{}]}",
    b"}{",
]


@pytest.mark.parametrize("seed", range(20))
def test_lines_decoded_at_once_are_those_decoded_one_by_one(tmp_path: Path, seed: int):
    """Also where lines hold two rollouts, or a piece of one."""
    chance = random.Random(seed)
    lines = [lines_of([record(i, chance)]).rstrip() for i in range(chance.randrange(1, 12))]
    for _ in range(seed % 4):
        at = chance.randrange(len(lines))
        cut = chance.randrange(len(lines[at]))
        odd = [
            [*ODD][chance.randrange(len(ODD))],
            lines[at] * 2,
            lines[at][:cut] + b"\n" + lines[at][cut:],
            lines[at] + b"\r",
        ]
        lines.insert(at, chance.choice(odd))
    data = b"\n".join(lines) + b"\n"
    path = tmp_path / "results.jsonl"
    path.write_bytes(data)
    expected = []
    for line in data.split(b"\n")[:-1]:
        with suppress(msgspec.DecodeError):
            expected.append((msgspec.json.decode(line, type=RolloutRecord).rollout_id, len(line) + 1))
    columns = read_part(path).columns
    assert list(zip(columns["rollout_id"].tolist(), columns["size"].tolist(), strict=True)) == expected
    for begin, size, rollout_id in zip(columns["offset"], columns["size"], columns["rollout_id"], strict=True):
        assert msgspec.json.decode(data[begin : begin + size], type=RolloutRecord).rollout_id == rollout_id


def test_as_many_rollouts_as_lines_do_not_prove_a_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The control: without the look at braces, a rollout behind another one is taken for the next line."""
    one, two = (lines_of([record(i, random.Random(i))]).rstrip() for i in range(2))
    path = tmp_path / "results.jsonl"
    path.write_bytes(one + two[:-1] + b"\n" + two[-1:] + b"\n")
    assert read_part(path).num_rows == 0
    monkeypatch.setattr("palestra.hub.columns._has_a_rollout_a_line", lambda *_: True)
    assert read_part(path).num_rows == 2


def test_the_second_viewer_reads_no_rollouts(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    expected = rows(updated(run))

    def never(*_):
        raise AssertionError("a file was read that is in the index")

    monkeypatch.setattr("palestra.hub.index.read_part", never)
    assert rows(updated(run)) == expected


def test_two_viewers_share_an_index(run: RunDir):
    one, other, chance = updated(run), updated(run), random.Random(4)
    for step in range(4, 8):
        write(run, f"step-{step:06d}", [record(i, chance) for i in range(step * 8, step * 8 + 8)])
        (one if step % 2 else other).update()
    one.update()
    other.update()
    assert rows(one) == rows(other) == rows(updated(run))


def test_a_viewer_that_finds_another_at_it_writes_nothing(run: RunDir):
    path = run.path / NAME
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = updated(run)
        assert path.stat().st_size == 0
    assert rows(alone) == rows(updated(run))
    assert path.stat().st_size > 0


@pytest.mark.parametrize("kept", [0, 5, 16, 17, 30, 400, 2000, -1, -9])
def test_a_torn_index_is_made_again(run: RunDir, kept: int):
    expected, path = rows(updated(run)), run.path / NAME
    path.write_bytes(path.read_bytes()[:kept])
    assert rows(updated(run)) == expected
    assert rows(updated(run)) == expected


def test_a_flipped_byte_is_noticed(run: RunDir):
    expected, path = rows(updated(run)), run.path / NAME
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    assert rows(updated(run)) == expected


def test_a_flipped_byte_matters(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    """The control: where checksums are not looked at, what is read is not what was written."""
    expected, path = rows(updated(run)), run.path / NAME
    data = bytearray(path.read_bytes())
    at = data.index(np.array([0.25], "<f8").tobytes())
    data[at] ^= 0xFF
    path.write_bytes(data)
    monkeypatch.setattr("palestra.hub.index.zlib.crc32", lambda *_: 0)
    monkeypatch.setattr("palestra.hub.index._checked", _unchecked)
    assert rows(updated(run)) != expected


def _unchecked(file: int, begin: int, size: int):
    import os

    while begin + 16 <= size:
        end = begin + 16 + int.from_bytes(os.pread(file, 4, begin), "little")
        yield begin, end
        begin = end


def test_without_the_right_to_write_it_stays_in_memory(run: RunDir):
    expected = rows(updated(run))
    (run.path / NAME).unlink()
    (run.path / NAME).mkdir()
    assert rows(updated(run)) == expected


def test_what_grows_for_long_does_not_fill_the_disk(tmp_path: Path):
    run, chance = RunDir(tmp_path), random.Random(0)
    index = RunIndex(run)
    for i in range(1500):
        with run.results.open("ab") as file:
            file.write(lines_of([record(i, chance)]))
        if i % 10 == 0:
            index.update()
    index.update()
    assert index.parts[0].num_rows == 1500
    assert (tmp_path / NAME).stat().st_size < 4 * 80 * 1500 + (1 << 20)
    assert rows(index) == rows(updated(run))


def test_what_is_given_back_is_there_again(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    """Parts go from memory to the file while the index is made, and their pages back to the kernel after a look."""
    expected = rows(updated(run))
    (run.path / NAME).unlink()
    monkeypatch.setattr("palestra.hub.index._MAP_BYTES", 1500)
    index = updated(run)
    assert rows(index) == expected
    assert all(part.held for part in index.parts[-2:])
    for part in index.parts:
        part.relax()
    assert rows(index) == expected
    write(run, "step-000009", [record(i, random.Random(3)) for i in range(200, 240)])
    index.update()
    assert rows(index) == rows(updated(run))


def test_on_a_full_disk_all_is_read_and_stays_in_memory(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    expected = rows(updated(run))
    (run.path / NAME).unlink()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunIndex, "_append", full)
    assert rows(updated(run)) == expected


def test_an_index_that_cannot_be_written_anew_is_used_as_it_is(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    expected = rows(updated(run))

    def full(path, data):
        raise InfrastructureError(f"{path} cannot be written: the disk is full")

    monkeypatch.setattr(index_module, "_SLACK_BYTES", -(1 << 40))  # time to write it anew
    monkeypatch.setattr(index_module, "write_atomically", full)
    assert rows(updated(run)) == expected
