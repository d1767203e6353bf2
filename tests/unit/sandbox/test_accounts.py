"""Accounts: their sums are those of their lines, whatever kills the process that wrote them."""

from contextlib import closing
from pathlib import Path

import pytest

from palestra.core.errors import UserError
from palestra.sandbox.accounts import Accounts, Usage


def opened(directory: Path, **options: int) -> Accounts:
    accounts = Accounts(directory, **options)
    accounts.open()
    return accounts


async def test_sums_are_those_of_all_lines_also_for_the_next_service(tmp_path: Path):
    with closing(opened(tmp_path)) as accounts:
        accounts.add("a", Usage(sandboxes=1, sandbox_s=1.5, memory_mb_s=96.0, cpu_s=0.25, programs={"ok": 1}))
        accounts.add("b", Usage(programs={"oom": 1}))
        accounts.add("a", Usage(sandbox_s=2.5, programs={"ok": 2, "failed": 1}))
        wanted = Usage(sandboxes=1, sandbox_s=4.0, memory_mb_s=96.0, cpu_s=0.25, programs={"ok": 3, "failed": 1})
        assert accounts.of("a") == wanted
        assert accounts.of("nobody") == Usage()
    with closing(opened(tmp_path)) as later:
        assert later.of("a") == wanted
        assert later.of("b") == Usage(programs={"oom": 1})


async def test_a_line_is_in_the_file_when_add_returns(tmp_path: Path):
    with closing(opened(tmp_path)) as accounts:
        for count in (1, 2, 3):
            accounts.add("a", Usage(sandboxes=1))
            assert (tmp_path / "usage-000001.jsonl").read_bytes().count(b"\n") == count


async def test_a_torn_last_line_is_left_out_and_what_follows_is_whole(tmp_path: Path):
    with closing(opened(tmp_path)) as accounts:
        accounts.add("a", Usage(sandboxes=1))
    with (tmp_path / "usage-000001.jsonl").open("ab") as file:
        file.write(b'{"at":1.0,"tenant":"a","used":{"sandb')
    with closing(opened(tmp_path)) as later:
        assert later.of("a").sandboxes == 1
        later.add("a", Usage(sandboxes=1))
    with closing(opened(tmp_path)) as last:
        assert last.of("a").sandboxes == 2


async def test_a_line_in_the_middle_that_is_none_is_told_and_not_passed_over(tmp_path: Path):
    (tmp_path / "usage-000001.jsonl").write_bytes(b'{"at":1.0,"tenant":"a","used":{}}\nnonsense\n')
    for _ in range(2):  # the directory is free again for whoever mends it
        with pytest.raises(UserError, match="line 2 is no account"):
            Accounts(tmp_path).open()


async def test_a_long_file_is_followed_by_one_that_begins_with_the_sums(tmp_path: Path):
    with closing(opened(tmp_path, most_bytes=1000)) as accounts:
        for _ in range(100):
            accounts.add("a", Usage(sandboxes=1, programs={"ok": 1}))
    files = sorted(tmp_path.glob("usage-*.jsonl"))
    assert len(files) > 3
    assert max(file.stat().st_size for file in files) < 1500
    for file in files[:-1]:
        file.unlink()
    with closing(opened(tmp_path)) as later:
        assert later.of("a") == Usage(sandboxes=100, programs={"ok": 100})


async def test_one_directory_is_one_services(tmp_path: Path):
    with closing(opened(tmp_path)):
        with pytest.raises(UserError, match="another service's"):
            Accounts(tmp_path).open()
    opened(tmp_path).close()


async def test_without_a_directory_nothing_is_written():
    with closing(Accounts()) as accounts:
        accounts.open()
        accounts.add("a", Usage(sandboxes=2))
        assert accounts.of("a").sandboxes == 2


async def test_a_file_that_cannot_follow_counts_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The line is written; whoever added it is told nothing else."""

    def full(*_: object) -> Path:
        raise OSError(28, "No space left on device")

    with closing(opened(tmp_path, most_bytes=100)) as accounts:
        monkeypatch.setattr("palestra.sandbox.accounts.write_atomically", full)
        for _ in range(5):
            accounts.add("a", Usage(sandboxes=1))
        assert accounts.of("a").sandboxes == 5
        monkeypatch.undo()
        accounts.add("a", Usage(sandboxes=1))
        assert len(list(tmp_path.glob("usage-*.jsonl"))) == 2
    with closing(opened(tmp_path)) as later:
        assert later.of("a").sandboxes == 6
