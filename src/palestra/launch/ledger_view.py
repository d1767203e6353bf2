"""Where the time of a run went, as a table."""

from collections.abc import Sequence

from rich.table import Table

from palestra.core.ledger import LedgerEntry
from palestra.wire.accounts import by_size, share_of


def table(account: Sequence[LedgerEntry]) -> Table:
    view = Table("process", "cause", "seconds", "share", box=None, pad_edge=False)
    for column in (2, 3):
        view.columns[column].justify = "right"
    for process in account:
        booked_s = sum(process.parts_s.values())
        closure = f"{booked_s / process.wall_s:.1%} of wall" if process.wall_s else "-"
        view.add_row(process.process, "wall", f"{process.wall_s:.1f}", closure, style="bold")
        for cause, seconds in by_size(process):
            view.add_row("", cause, f"{seconds:.1f}", f"{share_of(seconds, process.wall_s):.1%}")
    return view
