"""Rollouts and groups of a run by filter, in an order, a page at a time: a look at every row of few columns.

Pages go on from a place (value, file, line), not from a number of rows: while a run grows, paging neither repeats nor
loses a row that was there when it began.

Legend: R rows of one part, M of them that match, G groups.
"""

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from palestra.core.errors import UserError
from palestra.hub.columns import ENDINGS, Part, place, task_code
from palestra.hub.queries import Groups, Where


class Row(NamedTuple):
    """A line of a file."""

    part: Part
    line: int


@dataclass(frozen=True)
class Page:
    """`num_before` of `num_matching` rows come before the first one of these; cursors are empty at the ends."""

    rows: list[Any]
    num_matching: int
    num_before: int
    after: str = ""
    before: str = ""


class _Place(NamedTuple):
    """Where a row stands: `key` by the order, then file, then line."""

    key: float
    part: tuple[int, bool, str]
    line: int

    def cursor(self) -> str:
        return json.dumps([self.key, self.part[2], self.line], separators=(",", ":"))

    @classmethod
    def read(cls, cursor: str) -> "_Place":
        """Errors: UserError."""
        try:
            key, name, line = json.loads(cursor)
            return cls(float(key), place(str(name)), int(line))
        except (ValueError, TypeError, OverflowError):
            raise UserError(f"{cursor[:80]!r} is no place in a list; take `after` and `before` from a page") from None


# --- filters


def matching(part: Part, where: Where, group_size: int) -> np.ndarray | None:
    """[R] which rows match; None: no row of the part."""
    if not _may_match(part, where):
        return None
    columns, mask = part.columns, np.ones(part.num_rows, bool)
    for name, text in (("environment", where.environment), ("error", where.error)):
        if name == "error" and text in ("any", "none"):
            mask &= (columns["error"] != 0) == (text == "any")
        elif text:
            code = part.code(f"{name}s", text)
            if code is None:
                return None
            mask &= columns[name] == code
    if where.ending:
        mask &= columns["ending"] == (ENDINGS.index(where.ending) if where.ending in ENDINGS else len(ENDINGS))
    for name, low, high in (
        ("reward", where.min_reward, where.max_reward),
        ("tokens", where.min_tokens, where.max_tokens),
    ):
        _bound(mask, columns[name], low, high)
    if where.min_age is not None or where.max_age is not None:
        _bound(mask, ages(part), where.min_age, where.max_age)
    if where.group is not None:
        mask &= columns["rollout_id"] // group_size == where.group
    if where.task:
        mask &= columns["task"] == task_code(where.task)
    return mask


def _may_match(part: Part, where: Where) -> bool:
    if where.kind and part.is_training != (where.kind == "training"):
        return False
    if where.group is not None and not part.is_training:
        return False
    return not _is_outside(part.step, where.min_step, where.max_step)


def _is_outside(value: int, low: int | None, high: int | None) -> bool:
    return (low is not None and value < low) or (high is not None and value > high)


def _bound(mask: np.ndarray, column: np.ndarray, low: float | None, high: float | None) -> None:
    if low is not None:
        mask &= column >= low
    if high is not None:
        mask &= column <= high


def ages(part: Part) -> np.ndarray:
    """[R] versions between the step that trained a rollout and its oldest token; -1 where nothing was sampled."""
    version = part.columns["version"]
    return np.where(version >= 0, part.step - version, -1)


# --- pages of rows


def rollouts(
    parts: Sequence[Part], where: Where, group_size: int, *, sort: str, limit: int, after: str = "", before: str = ""
) -> Page:
    """Errors: UserError for a cursor that is none."""
    name = sort.removeprefix("-")
    is_down = sort.startswith("-") or sort == "newest"
    keys = _KEYS.get(name)
    runs = [_Run(part, partial(_rows, part, where, group_size, keys)) for part in parts]
    return _page(runs, is_down, limit, after, before)


_KEYS: dict[str, Callable[[Part], np.ndarray]] = {
    "reward": lambda part: part.columns["reward"],
    "tokens": lambda part: part.columns["tokens"],
    "turns": lambda part: part.columns["turns"],
    "wall_s": lambda part: part.columns["wall_s"],
    "age": ages,
}


def _rows(
    part: Part, where: Where, group_size: int, keys: Callable[[Part], np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    mask = matching(part, where, group_size)
    lines = np.zeros(0, np.int64) if mask is None else np.flatnonzero(mask)
    found = lines, np.zeros(len(lines)) if keys is None or not len(lines) else keys(part)[lines]
    part.relax()
    return found


class _Run(NamedTuple):
    """Rows of one part. `rows` finds the lines [M] that match, ascending, and what they are ordered by [M]: of one part
    after the other, for those of a whole run would fill memory."""

    part: Part
    rows: Callable[[], tuple[np.ndarray, np.ndarray]]


def _page(runs: list[_Run], is_down: bool, limit: int, after: str, before: str) -> Page:
    """The next `limit` rows behind `after`, or the last ones ahead of `before`."""
    is_back = bool(before) and not after
    start = _Place.read(after or before) if after or before else None
    goes_down = is_down != is_back
    chosen, num_left, total = _first(runs, goes_down, limit, start)
    if is_back:
        chosen.reverse()
    num_before = (num_left - len(chosen)) if is_back else (total - num_left)
    has_more_before = num_before > 0
    has_more_after = num_before + len(chosen) < total
    return Page(
        rows=[Row(run.part, line) for run, line, _ in chosen],
        num_matching=total,
        num_before=num_before,
        after=_cursor(chosen[-1]) if chosen and has_more_after else "",
        before=_cursor(chosen[0]) if chosen and has_more_before else "",
    )


def _cursor(chosen: tuple[_Run, int, float]) -> str:
    run, line, key = chosen
    return _Place(key, place(run.part.name), line).cursor()


def _first(
    runs: list[_Run], is_down: bool, limit: int, start: _Place | None
) -> tuple[list[tuple[_Run, int, float]], int, int]:
    """The first `limit` rows behind `start` in the order, how many there are behind it, and how many in all."""
    ordered = sorted(runs, key=lambda run: place(run.part.name), reverse=is_down)
    sign = -1.0 if is_down else 1.0
    numbers: list[np.ndarray] = []  # of a run, its lines and their keys, in order of places
    total, num_left, num_kept, worst = 0, 0, 0, np.inf
    for number, run in enumerate(ordered):
        lines, keys = run.rows()
        total += len(lines)
        if is_down:
            lines, keys = lines[::-1], -keys[::-1]
        if start is not None:
            behind = _behind(run, lines, keys, start, sign)
            lines, keys = lines[behind], keys[behind]
        num_left += len(lines)
        if num_kept >= limit:
            better = keys < worst  # those that are equal stand behind
            lines, keys = lines[better], keys[better]
        if not len(lines):
            continue
        rank = np.argsort(keys, kind="stable")[:limit]
        numbers.append(np.stack([np.full(len(rank), number), lines[rank], keys[rank]]))
        num_kept += len(rank)
        if num_kept >= limit:
            numbers = [_best(numbers, limit)]
            num_kept, worst = limit, numbers[0][2, -1]
    if not numbers:
        return [], num_left, total
    best = _best(numbers, limit)
    return [(ordered[int(n)], int(line), sign * float(key)) for n, line, key in best.T], num_left, total


def _best(numbers: list[np.ndarray], limit: int) -> np.ndarray:
    joined = np.concatenate(numbers, axis=1)
    return joined[:, np.argsort(joined[2], kind="stable")[:limit]]


def _behind(run: _Run, lines: np.ndarray, keys: np.ndarray, start: _Place, sign: float) -> np.ndarray:
    """[M] rows behind a place; lines and keys are in the order of places, keys ascending with it."""
    here, there = place(run.part.name), start.part
    key = sign * start.key
    if here == there:
        return (keys > key) | ((keys == key) & (sign * lines > sign * start.line))
    is_behind = here < there if sign < 0 else here > there
    return keys >= key if is_behind else keys > key


# --- groups


class GroupRow(NamedTuple):
    """Rollouts of one task that were compared with one another. `first` shows the task."""

    number: int
    first: Row
    count: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class _GroupColumns:
    """[G], by the first row of each in the file that has it first."""

    number: np.ndarray
    part: np.ndarray
    line: np.ndarray
    count: np.ndarray
    total: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def take(self, where: np.ndarray) -> "_GroupColumns":
        return _GroupColumns(*(column[where] for column in vars(self).values()))


def groups(parts: Sequence[Part], query: Groups, group_size: int) -> Page:
    """Errors: UserError for a cursor that is none."""
    training, found = _all_groups(tuple(parts), group_size)
    mask = _groups_matching(found, training, query)
    found = found.take(np.flatnonzero(mask))
    keys = {
        "reward": found.total / np.maximum(found.count, 1),
        "spread": found.high - found.low,
    }.get(query.sort.removeprefix("-"), np.zeros(len(found.number)))
    return _group_page(found, training, keys, query)


def prepare_groups(parts: Sequence[Part], group_size: int, should_stop: threading.Event) -> None:
    """Sum what the first list of groups will ask for; a large run's take a while."""
    for part in parts:
        if should_stop.is_set():
            return
        if part.is_training and part.num_rows:
            _of_part(part, 0, group_size)


@lru_cache(maxsize=2)
def _all_groups(parts: tuple[Part, ...], group_size: int) -> tuple[list[Part], "_GroupColumns"]:
    """Of all training, and its files. Pages of one list ask for the same again and again."""
    training = [part for part in parts if part.is_training]
    pieces = [_of_part(part, number, group_size) for number, part in enumerate(training) if part.num_rows]
    return training, _merged(pieces)


def _groups_matching(found: _GroupColumns, training: list[Part], query: Groups) -> np.ndarray:
    mask = np.ones(len(found.number), bool)
    _bound(mask, found.total / np.maximum(found.count, 1), query.min_reward, query.max_reward)
    if training:
        _bound(mask, np.array([part.step for part in training])[found.part], query.min_step, query.max_step)
    if query.signal:
        mask &= (found.high > found.low) == (query.signal == "yes")
    for name, codes in (("environment", "environments"), ("task", "")):
        if wanted := getattr(query, name):
            column = _of_firsts(found, training, name)
            if name == "task":
                mask &= column == task_code(wanted)
            else:
                code = np.array([-1 if (c := part.code(codes, wanted)) is None else c for part in training], np.int64)
                mask &= column == code[found.part]
    return mask


def _of_firsts(found: _GroupColumns, training: list[Part], name: str) -> np.ndarray:
    """[G] a column at the first row of each group; `found` goes from part to part."""
    bounds = np.searchsorted(found.part, np.arange(len(training) + 1)).tolist()
    pieces = []
    for part, begin, end in zip(training, bounds, bounds[1:], strict=False):
        if end > begin:
            pieces.append(part.columns[name][found.line[begin:end]])
            part.relax()
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


def _of_part(part: Part, number: int, group_size: int) -> _GroupColumns:
    """Groups of one file: rollouts that trained, which are all valid."""
    key = ("groups", group_size)
    if key not in part.cache:
        part.cache[key] = _summed(part, group_size)
        part.relax()
    group, line, count, total, low, high = part.cache[key]
    return _GroupColumns(group, np.full(len(group), number), line, count, total, low, high)


def _summed(part: Part, group_size: int) -> tuple[np.ndarray, ...]:
    numbers, reward = part.columns["rollout_id"] // group_size, part.columns["reward"]
    if (numbers[1:] >= numbers[:-1]).all():  # as a run writes them: groups lie beside each other
        starts = _starts(numbers)
        return _sums(numbers, reward, starts, starts)
    order = np.argsort(numbers, kind="stable")
    ordered, reward = numbers[order], reward[order]
    starts = _starts(ordered)
    line = order[starts]  # the order is stable: the first of each has the lowest line
    by_line = np.argsort(line, kind="stable")
    return tuple(column[by_line] for column in _sums(ordered, reward, starts, line))


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Where each new value begins; there is at least one."""
    return np.concatenate([[0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1])


def _sums(numbers: np.ndarray, reward: np.ndarray, starts: np.ndarray, line: np.ndarray) -> tuple[np.ndarray, ...]:
    """[G] number, line, count, total, low and high of each."""
    count = np.concatenate([starts[1:], [len(numbers)]]) - starts
    total, low, high = (f.reduceat(reward, starts) for f in (np.add, np.minimum, np.maximum))
    return numbers[starts], line, count, total, low, high


def _merged(pieces: list[_GroupColumns]) -> _GroupColumns:
    """Members of a group that trained later are added to it where it was first."""
    if not pieces:
        return _GroupColumns(*(np.zeros(0, np.int64) for _ in range(7)))
    joined = _GroupColumns(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in vars(pieces[0])))
    if (joined.number[1:] > joined.number[:-1]).all():
        return joined
    order = np.argsort(joined.number, kind="stable")
    ordered = joined.number[order]
    starts = _starts(ordered)
    if len(starts) == len(order):
        return joined
    firsts = order[starts]
    back = np.argsort(firsts, kind="stable")
    sums = {
        name: f.reduceat(getattr(joined, name)[order], starts)[back]
        for name, f in (("count", np.add), ("total", np.add), ("low", np.minimum), ("high", np.maximum))
    }
    firsts = firsts[back]
    return _GroupColumns(number=joined.number[firsts], part=joined.part[firsts], line=joined.line[firsts], **sums)


def _group_page(found: _GroupColumns, training: list[Part], keys: np.ndarray, query: Groups) -> Page:
    is_down = query.sort.startswith("-") or query.sort == "newest"
    runs = []
    bounds = np.searchsorted(found.part, np.arange(len(training) + 1))
    for number, part in enumerate(training):
        mine = slice(int(bounds[number]), int(bounds[number + 1]))
        if mine.stop > mine.start:
            runs.append(_Run(part, partial(lambda *rows: rows, found.line[mine], keys[mine])))
    page = _page(runs, is_down, query.limit, query.after, query.before)
    numbers = {part.name: number for number, part in enumerate(training)}
    rows = []
    for row in page.rows:
        begin, end = bounds[numbers[row.part.name]], bounds[numbers[row.part.name] + 1]
        at = int(begin + np.searchsorted(found.line[begin:end], row.line))
        mean = float(found.total[at] / max(int(found.count[at]), 1))
        rows.append(
            GroupRow(
                int(found.number[at]), row, int(found.count[at]), mean, float(found.low[at]), float(found.high[at])
            )
        )
    return Page(rows, page.num_matching, page.num_before, page.after, page.before)


# --- what there is to filter by


def facets(parts: Iterable[Part]) -> dict[str, list[str]]:
    environments: dict[str, None] = {}
    errors: dict[str, None] = {}
    for part in parts:
        environments |= dict.fromkeys(part.header.environments)
        errors |= dict.fromkeys(part.header.errors[1:])
    return {"environments": sorted(environments), "errors": list(errors)[:100]}
