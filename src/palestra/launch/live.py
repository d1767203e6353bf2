"""What a run shows while it runs: a live table on a terminal, otherwise a plain line every few seconds. On stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from palestra.wire.messages import Progress

_LINE_EVERY_S = 5.0
_FORMATS: dict[str, Callable[[float], str]] = {
    "reward": lambda x: f"reward {x:.3f}",
    "loss": lambda x: f"loss {x:.4f}",
    "age": lambda x: f"age {x:.2f}",
    "in_flight": lambda x: f"{x:.0f} in flight",
    "limit": lambda x: f"limit {x:.0f}",
    "tokens_per_s": lambda x: f"{x:,.0f} tokens/s",
    "trainer_idle": lambda x: f"trainer idle {100 * x:.0f} %",
}


def describe(numbers: dict[str, float]) -> str:
    """`reward 0.412  age 1.02  1,512 tokens/s  trainer idle 4 %`: known numbers first, in this order."""
    known = [form(numbers[name]) for name, form in _FORMATS.items() if name in numbers]
    return "  ".join([*known, *(f"{name} {value:.4g}" for name, value in numbers.items() if name not in _FORMATS)])


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass
class Pace:
    """How long the rest takes at the pace since a stage's first step was seen."""

    stage: str = ""
    first_step: int = 0
    since: float = 0.0

    def remaining_s(self, message: Progress, now: float) -> float | None:
        """None while no step has been seen to pass, and where nobody knows how many there are."""
        if message.stage != self.stage:
            self.stage, self.first_step, self.since = message.stage, message.step, now
        passed = message.step - self.first_step
        if passed <= 0 or not message.steps:
            return None
        return (message.steps - message.step) * (now - self.since) / passed


def line(message: Progress, remaining_s: float | None) -> str:
    """One progress message in words."""
    steps = f" {message.step}/{message.steps}" if message.steps else ""
    eta = f"ETA {duration(remaining_s)}" if remaining_s else ""
    return "  ".join(part for part in (f"{message.stage}{steps}", describe(message.numbers), eta) if part)


@dataclass
class LineView:
    """For logs and pipes: a line for each new stage, and at most one every few seconds inside a stage."""

    out: TextIO
    every_s: float = _LINE_EVERY_S
    clock: Callable[[], float] = time.monotonic
    _paces: dict[str, Pace] = field(default_factory=dict)
    _last: dict[str, tuple[str, float]] = field(default_factory=dict)
    _began: float = 0.0

    def __post_init__(self):
        self._began = self.clock()

    def say(self, text: str) -> None:
        print(f"[{duration(self.clock() - self._began):>8}] {text}", file=self.out, flush=True)

    def progress(self, message: Progress) -> None:
        now = self.clock()
        remaining_s = self._paces.setdefault(message.process, Pace()).remaining_s(message, now)
        stage, said_at = self._last.get(message.process, ("", -self.every_s))
        if message.stage == stage and now - said_at < self.every_s and message.step != message.steps:
            return
        self._last[message.process] = (message.stage, now)
        self.say(f"{message.process}: {line(message, remaining_s)}")


class LiveView:
    """For people at a terminal: a row per process that reports, redrawn in place; other news scrolls above."""

    def __init__(self, name: str, console: Console):
        self._name, self._console, self._began = name, console, time.monotonic()
        self._rows: dict[str, tuple[Progress, float | None]] = {}
        self._paces: dict[str, Pace] = {}

    def say(self, text: str) -> None:
        self._console.print(Text(text, style="dim"))

    def progress(self, message: Progress) -> None:
        pace = self._paces.setdefault(message.process, Pace())
        self._rows[message.process] = (message, pace.remaining_s(message, time.monotonic()))

    def __rich__(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for message, remaining_s in list(self._rows.values()):
            bar = ProgressBar(total=message.steps, completed=message.step, width=20) if message.steps else ""
            table.add_row(Text(message.process, style="bold"), bar, line(message, remaining_s))
        return Group(Text(f"{self._name}  {duration(time.monotonic() - self._began)}", style="bold cyan"), table)


@contextmanager
def view_of(name: str, out: TextIO) -> Iterator[LiveView | LineView]:
    """The view that suits `out`."""
    if not out.isatty():
        yield LineView(out)
        return
    console = Console(file=out)
    view = LiveView(name, console)
    with Live(view, console=console, refresh_per_second=4):
        yield view
