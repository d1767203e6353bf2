"""Supervised data: every format, the mix, the mask, and a stream that resumes where it stopped."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from palestra.config.schema import SftSource
from palestra.core.errors import UserError
from palestra.env.chat import load_tokenizer
from palestra.train.data import SftStream, render, sft_batch
from palestra.train.rows import RawRow, endless, read_rows
from palestra.wire import batches

ROWS = [{"prompt": f"{a}{b}", "completion": f"{b}{a}"} for a, b in itertools.product("abcdefgh", "uvwxyz")]

SHOWN = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://there"}}]}]


@pytest.fixture(scope="module")
def tokenizer(qwen):
    return load_tokenizer(qwen)


def _jsonl(path: Path, rows=ROWS) -> SftSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SftSource(path=str(path))


def _stream(tokenizer, *sources, shuffle_rows=16, seed=0, max_tokens=64) -> SftStream:
    return SftStream(sources, tokenizer, max_tokens=max_tokens, shuffle_rows=shuffle_rows, seed=seed)


def test_the_mask_is_on_what_the_assistant_writes(tokenizer):
    row = render(RawRow("x", {"prompt": "ab", "completion": "ba"}), tokenizer)
    assert row.token_ids == [1, 4, 5, 1, 5, 4, 2]
    assert row.mask == [0, 0, 0, 0, 1, 1, 1]
    turns = [("user", "ab"), ("assistant", "ba"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    row = render(RawRow("x", {"messages": messages}), tokenizer)
    assert tokenizer.decode([i for i, m in zip(row.token_ids, row.mask, strict=True) if m]) == "ba<eos>d<eos>"


def test_every_format_gives_the_same_rows(tmp_path):
    import datasets

    jsonl = _jsonl(tmp_path / "rows.jsonl")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "saved_dict")
    others = [SftSource(path=str(tmp_path / name)) for name in ("rows.parquet", "saved", "saved_dict")]
    for source in (jsonl, *others):
        assert [row.fields for row in read_rows(source)] == ROWS


def test_shuffled_epochs_keep_every_row(tmp_path):
    source = _jsonl(tmp_path / "rows.jsonl")
    rows = [row.origin for row in itertools.islice(endless(source, shuffle_rows=10, seed=0), 3 * len(ROWS))]
    epochs = [rows[i * len(ROWS) : (i + 1) * len(ROWS)] for i in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != sorted(epochs[1])
    again = [row.origin for row in itertools.islice(endless(source, shuffle_rows=10, seed=0), 3 * len(ROWS))]
    assert again == rows


def test_without_a_buffer_the_order_stays(tmp_path):
    source = _jsonl(tmp_path / "rows.jsonl")
    assert [row.fields for row in itertools.islice(endless(source, shuffle_rows=0, seed=0), len(ROWS))] == ROWS


def test_sources_are_mixed_by_weight(tmp_path, tokenizer):
    one = _jsonl(tmp_path / "one.jsonl", [{"prompt": "a", "completion": "a"}])
    two = _jsonl(tmp_path / "two.jsonl", [{"prompt": "b", "completion": "b"}]).model_copy(update={"weight": 3.0})
    counts = Counter(row.token_ids[1] for row in _stream(tokenizer, one, two).take(2000))
    assert counts[5] / counts[4] == pytest.approx(3, rel=0.15)


def test_a_resumed_stream_goes_on_where_it_stopped(tmp_path, tokenizer):
    sources = _jsonl(tmp_path / "one.jsonl"), _jsonl(tmp_path / "two.jsonl", ROWS[:5])
    straight, first, second = (_stream(tokenizer, *sources) for _ in range(3))
    expected = straight.take(150)
    rows = first.take(70)
    second.restore(json.loads(json.dumps(first.state())))
    assert rows + second.take(80) == expected
    assert _stream(tokenizer, *sources, seed=1).take(150) != expected


def test_rows_that_cannot_be_used_are_dropped_and_counted(tmp_path, tokenizer):
    rows = [*ROWS, {"prompt": "a", "completion": "b" * 100}, {"messages": [{"role": "user", "content": "only asks"}]}]
    stream = _stream(tokenizer, _jsonl(tmp_path / "rows.jsonl", rows))
    stream.take(3 * len(ROWS))
    assert 4 <= stream.take_dropped() <= 6
    assert stream.take_dropped() == 0


def test_a_source_without_a_usable_row_says_so(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("palestra.train.data._GIVE_UP", 50)
    with pytest.raises(UserError, match=r"rows\.jsonl:\d+ with \d tokens; raise data\.max_tokens"):
        _stream(tokenizer, _jsonl(tmp_path / "rows.jsonl"), max_tokens=3).take(1)


def test_a_line_that_is_no_utf_8_is_named(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: not JSON"):
        _stream(tokenizer, SftSource(path=str(path)), shuffle_rows=0).take(2)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"rows\.jsonl:2: not JSON"),
        ("[1]", r"rows\.jsonl:2: a row is an object"),
        ('{"text": "a"}', r"rows\.jsonl:2: needs `messages`, or `prompt` and `completion`; it has text"),
        ('{"messages": "a"}', r"rows\.jsonl:2: `messages` must be a list"),
        ('{"prompt": ["a"], "completion": "b"}', r"rows\.jsonl:2: `prompt` must be a list of messages"),
        (
            json.dumps({"messages": SHOWN}),
            r"rows\.jsonl:2: .*messages\[0\] \(user\) holds an image \(at 'https://there'\)",
        ),
    ],
)
def test_errors_name_file_and_line(tmp_path, tokenizer, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=said):
        _stream(tokenizer, SftSource(path=str(path)), shuffle_rows=0).take(2)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet", "missing"])
def test_a_missing_source_is_the_users_error(tmp_path, tokenizer, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="missing"):
        _stream(tokenizer, SftSource(path=str(tmp_path / name))).take(1)


def test_an_empty_source_is_the_users_error(tmp_path, tokenizer):
    with pytest.raises(UserError, match="has no rows"):
        _stream(tokenizer, _jsonl(tmp_path / "rows.jsonl", [])).take(1)


def test_a_batch_keeps_every_token_and_mask(tmp_path, tokenizer):
    rows = _stream(tokenizer, _jsonl(tmp_path / "rows.jsonl")).take(20)
    batch = sft_batch(rows, step=3, attempt=1, max_pack_tokens=32, num_ranks=2)
    assert batch.num_tokens == sum(len(row.token_ids) for row in rows)
    assert batch.ce_weight.sum() == sum(sum(row.mask) for row in rows)
    assert batch.num_packs % 2 == 0
    assert np.bincount(batch.pack, weights=batch.lengths).max() <= 32
    assert batches.equal(batches.decode(batches.encode(batch)), batch)
