"""`palestra sandbox check`: what the sandboxes of this machine withstand, as a table or as JSON."""

import asyncio
import sys
from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.text import Text

from palestra.sandbox import Options
from palestra.sandbox.check import Outcome, Report, check

_MARKS = {True: ("passed", "green"), False: ("failed", "red"), None: ("skipped", "yellow")}


def show(options: Options, *, only: Sequence[str], as_json: bool) -> int:
    """0 if nothing failed, else 1. Outcomes are told as they come; with JSON, on stderr."""
    console = Console(file=sys.stderr if as_json else sys.stdout, highlight=False, soft_wrap=True)
    report = asyncio.run(_told(options, only, console))
    console.print(
        f"{report.backend} isolates by {report.isolation}: {', '.join(report.layers) or 'nothing'}. "
        f"{report.passed} passed, {report.failed} failed, {report.skipped} skipped."
    )
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    return int(report.failed > 0)


async def _told(options: Options, only: Sequence[str], console: Console) -> Report:
    report = None
    async for told in check(options, only=only):
        if isinstance(told, Outcome):
            console.print(_line(told))
        else:
            report = told
    assert report is not None
    return report


def _line(outcome: Outcome) -> Text:
    word, style = _MARKS[outcome.passed]
    return Text.assemble((f"{word:8}", style), f"{outcome.name:32}{outcome.wall_s:6.2f} s  {outcome.detail}")
