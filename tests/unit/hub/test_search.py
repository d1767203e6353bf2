"""Filters, orders and pages equal a look at every line of the same files."""

import random
from itertools import chain
from pathlib import Path

import pytest
from pydantic import ValidationError

from palestra.core.errors import UserError
from palestra.hub import search
from palestra.hub.index import RunIndex
from palestra.hub.queries import Groups, Rollouts, Where
from palestra.wire.rundir import RunDir
from tests.unit.hub.written import GROUP_SIZE, Line, is_wanted, record, scan, write, write_some

SORTS = ("newest", "oldest", "reward", "-reward", "tokens", "-tokens", "turns", "-turns", "age", "-age", "-wall_s")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    write_some(RunDir(tmp_path), steps=5)
    return RunDir(tmp_path)


def index_of(run: RunDir) -> RunIndex:
    index = RunIndex(run)
    index.update()
    return index


def key(line: Line, sort: str) -> float:
    of = line.record
    values = {"reward": of.reward, "tokens": of.num_tokens, "turns": of.num_turns, "age": line.age, "wall_s": of.wall_s}
    return values.get(sort.removeprefix("-"), 0)


def expected(lines: list[Line], where: Where, sort: str) -> list[tuple[str, int]]:
    wanted = [line for line in lines if is_wanted(line, where)]
    is_down = sort.startswith("-") or sort == "newest"
    ordered = sorted(wanted, key=lambda line: (key(line, sort), line.place, line.line), reverse=is_down)
    return [(line.file, line.line) for line in ordered]


def pages(index: RunIndex, where: Where, sort: str, limit: int, *, before: bool = False) -> list[list[tuple[str, int]]]:
    """All of them from the first on; or from the last one back."""
    found, after = [], ""
    page = search.rollouts(index.parts, where, GROUP_SIZE, sort=sort, limit=limit)
    while True:
        found.append([(row.part.name, row.line) for row in page.rows])
        assert page.num_before == sum(map(len, found[:-1]))
        if not page.after:
            break
        after = page.after
        page = search.rollouts(index.parts, where, GROUP_SIZE, sort=sort, limit=limit, after=after)
    if not before:
        return found
    back = [found[-1]]
    while page.before:
        page = search.rollouts(index.parts, where, GROUP_SIZE, sort=sort, limit=limit, before=page.before)
        back.insert(0, [(row.part.name, row.line) for row in page.rows])
        assert page.num_before + sum(map(len, back)) == page.num_matching
    return back


def some_filter(chance: random.Random) -> Where:
    """Each part of it is given one time in four."""
    options = {
        "kind": ["training", "evaluation"],
        "environment": ["calc", "words", "nowhere"],
        "ending": ["ok", "truncated", "failed", "invalid"],
        "error": ["any", "none", "it broke", "it was late", "?"],
        "min_reward": [0.1, 0.25],
        "max_reward": [0.1, 0.5],
        "min_tokens": [1, 3],
        "max_tokens": [0, 2],
        "min_step": [1, 2],
        "max_step": [2, 3],
        "min_age": [0, 1],
        "max_age": [0, 1],
        "group": [0, 3, 7, 99],
        "task": ["task 0", "task 2", "no task"],
    }
    return Where(**{name: chance.choice(values) for name, values in options.items() if chance.random() < 0.25})


@pytest.mark.parametrize("seed", range(40))
def test_pages_are_a_scan_of_the_files(run: RunDir, seed: int):
    chance = random.Random(seed)
    where, sort, limit = some_filter(chance), chance.choice(SORTS), chance.choice([1, 3, 7, 50])
    index, lines = index_of(run), scan(run)
    wanted = expected(lines, where, sort)
    found = pages(index, where, sort, limit)
    assert [*chain(*found)] == wanted
    assert all(len(page) == limit for page in found[:-1])
    back = pages(index, where, sort, limit, before=True)
    assert [*chain(*back)] == wanted


@pytest.mark.parametrize("sort", SORTS)
def test_every_order_pages_over_everything_once(run: RunDir, sort: str):
    found = [*chain(*pages(index_of(run), Where(), sort, 7))]
    assert found == expected(scan(run), Where(), sort)
    assert len(set(found)) == len(found) == len(scan(run))


def test_a_filter_that_is_wrong_is_noticed(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    """The control: a bound that leaves out its own value differs from the scan."""
    where, index, lines = Where(min_reward=0.25), index_of(run), scan(run)
    assert [*chain(*pages(index, where, "newest", 7))] == expected(lines, where, "newest")

    def without_its_bound(mask, column, low, high):
        if low is not None:
            mask &= column > low

    monkeypatch.setattr(search, "_bound", without_its_bound)
    assert [*chain(*pages(index, where, "newest", 7))] != expected(lines, where, "newest")


@pytest.mark.parametrize("sort", ["newest", "oldest", "-reward", "tokens"])
def test_paging_while_the_run_grows_loses_and_repeats_nothing(run: RunDir, sort: str):
    index, chance = index_of(run), random.Random(1)
    before = set(expected(scan(run), Where(), sort))
    found, after, step = [], "", 5
    while True:
        page = search.rollouts(index.parts, Where(), GROUP_SIZE, sort=sort, limit=9, after=after)
        found += [(row.part.name, row.line) for row in page.rows]
        if not page.after or step > 40:
            break
        after = page.after
        write(run, f"step-{step:06d}", [record(i, chance) for i in range(1000 + 8 * step, 1008 + 8 * step)])
        index.update()
        step += 1
    assert len(set(found)) == len(found)
    if sort != "oldest":  # which never ends, while it grows
        assert before <= set(found)


@pytest.mark.parametrize("cursor", ["x", "[1]", '["a","b",1]', "{}", '[1,"step-000001",{}]', "[1,2,3,4]"])
def test_a_cursor_that_is_none_is_refused(run: RunDir, cursor: str):
    with pytest.raises(UserError, match="no place in a list"):
        search.rollouts(index_of(run).parts, Where(), GROUP_SIZE, sort="newest", limit=5, after=cursor)


def test_queries_refuse_what_they_do_not_know():
    for given in ({"colour": "red"}, {"limit": 100_000}, {"min_reward": "nan"}, {"sort": "random"}, {"group": -1}):
        with pytest.raises(ValidationError):
            Rollouts.model_validate(given)


# --- groups


def groups_by_scan(lines: list[Line]) -> dict[int, dict]:
    found: dict[int, dict] = {}
    for line in sorted(lines, key=lambda line: (line.place, line.line)):
        if line.is_training:
            of = found.setdefault(line.record.rollout_id // GROUP_SIZE, {"first": line, "rewards": []})
            of["rewards"].append(line.record.reward)
    return found


def all_groups(index: RunIndex, query: Groups) -> list[search.GroupRow]:
    found, page = [], search.groups(index.parts, query, GROUP_SIZE)
    while True:
        found += page.rows
        assert page.num_before + len(page.rows) <= page.num_matching
        if not page.after:
            return found
        page = search.groups(index.parts, query.model_copy(update={"after": page.after}), GROUP_SIZE)


@pytest.mark.parametrize("is_shuffled", [False, True])
@pytest.mark.parametrize("sort", ["newest", "oldest", "reward", "-reward", "-spread"])
def test_groups_are_whole_wherever_their_members_trained(run: RunDir, sort: str, is_shuffled: bool):
    if is_shuffled:
        for seed, path in enumerate(sorted(run.rollouts.glob("step-*.jsonl"))):
            mixed = path.read_bytes().splitlines(keepends=True)
            random.Random(seed).shuffle(mixed)
            path.write_bytes(b"".join(mixed))
    by_scan = groups_by_scan(scan(run))
    found = all_groups(index_of(run), Groups(sort=sort, limit=3))
    assert sorted(row.number for row in found) == sorted(by_scan)
    for row in found:
        rewards = by_scan[row.number]["rewards"]
        assert row.count == len(rewards)
        assert row.mean == pytest.approx(sum(rewards) / len(rewards))
        assert (row.low, row.high) == (min(rewards), max(rewards))
        assert (row.first.part.name, row.first.line) == (
            by_scan[row.number]["first"].file,
            by_scan[row.number]["first"].line,
        )
    values = {"reward": [row.mean for row in found], "spread": [row.high - row.low for row in found]}
    if (name := sort.removeprefix("-")) in values:
        assert values[name] == sorted(values[name], reverse=sort.startswith("-"))


def test_some_groups_trained_in_parts(run: RunDir):
    """The control: otherwise the test above would not test it."""
    files: dict[int, set[str]] = {}
    for line in scan(run):
        if line.is_training:
            files.setdefault(line.record.rollout_id // GROUP_SIZE, set()).add(line.file)
    assert any(len(of) > 1 for of in files.values())


@pytest.mark.parametrize("seed", range(12))
def test_filters_of_groups_equal_a_scan(run: RunDir, seed: int):
    chance = random.Random(seed)
    options = {
        "environment": ["calc", "words"],
        "min_reward": [0.2, 0.4],
        "max_reward": [0.3, 0.5],
        "min_step": [1, 2],
        "max_step": [2, 3],
        "signal": ["yes", "no"],
        "task": ["task 0", "task 1"],
    }
    query = Groups(**{name: chance.choice(values) for name, values in options.items() if chance.random() < 0.4})
    wanted = []
    for number, of in groups_by_scan(scan(run)).items():
        mean, first = sum(of["rewards"]) / len(of["rewards"]), of["first"]
        if (
            query.environment in ("", first.record.environment)
            and query.task in ("", first.record.task.key)
            and (query.min_reward is None or mean >= query.min_reward)
            and (query.max_reward is None or mean <= query.max_reward)
            and (query.min_step is None or first.step >= query.min_step)
            and (query.max_step is None or first.step <= query.max_step)
            and query.signal in ("", "yes" if len(set(of["rewards"])) > 1 else "no")
        ):
            wanted.append(number)
    assert sorted(row.number for row in all_groups(index_of(run), query)) == sorted(wanted)
