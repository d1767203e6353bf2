"""metrics.jsonl as it grows, row by row; and what a place is told of a metric that a resumed run measured again."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

_NOT_METRICS = ("step", "time", "phase", "rule", "text")


@dataclass(frozen=True)
class Row:
    """`number` is that of its line, from 0: the same whenever it is read. `step` of an evaluation: its version."""

    number: int
    step: int
    time: float
    values: dict[str, float]


class Place(Protocol):
    """Where metrics are told. What it raises ends its process, and nothing else."""

    def begin(self, rows: list[Row]) -> None:
        """All that there is so far. Called again, it begins anew: what was told before counts no more."""
        ...

    def tell(self, rows: list[Row]) -> None:
        """What came since."""
        ...

    def close(self) -> None:
        """What was told is kept on return."""
        ...


@dataclass
class Tail:
    """Whole lines of a file, from where the last look ended."""

    path: Path
    _offset: int = 0
    _number: int = 0

    def take(self) -> list[Row]:
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:  # nothing was measured yet
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.splitlines()
        rows = [_row(line, number) for number, line in enumerate(lines, start=self._number)]
        self._number += len(lines)
        return [row for row in rows if row is not None]


def _row(line: bytes, number: int) -> Row | None:
    """None for a line without numbers, or one that a full disk spoiled."""
    try:
        found: Any = json.loads(line)
        values = {name: float(value) for name, value in found.items() if _is_metric(name, value)}
        row = Row(number=number, step=int(found["step"]), time=float(found["time"]), values=values)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return row if values else None


def _is_metric(name: str, value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and name not in _NOT_METRICS and math.isfinite(value)


@dataclass
class Once:
    """A run that went on from a checkpoint measures steps again: of each metric and step one value is told."""

    _told: set[tuple[str, int]] = field(default_factory=set)

    def has_again(self, rows: Iterable[Row]) -> bool:
        """Whether one of them was told before."""
        return any((name, row.step) in self._told for row in rows for name in row.values)

    def new(self, rows: Iterable[Row]) -> Iterator[Row]:
        """What was not told before, the first value of each."""
        for row in rows:
            values = {name: value for name, value in row.values.items() if (name, row.step) not in self._told}
            self._told |= {(name, row.step) for name in values}
            if values:
                yield Row(row.number, row.step, row.time, values)

    def latest(self, rows: list[Row]) -> list[Row]:
        """All of them, of each metric and step the last value. Forgets what was told before."""
        self._told = set()
        return list(self.new(list(rows)[::-1]))[::-1]
