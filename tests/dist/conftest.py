"""A table of what was compared, at the end of the run."""

from collections.abc import Callable

import pytest

Record = Callable[[str, str, str, dict[str, float]], None]


@pytest.fixture
def record_layout(request: pytest.FixtureRequest) -> Record:
    """Notes how far a layout is from one process, by quantity."""

    def note(family: str, layout: str, precision: str, gaps: dict[str, float]) -> None:
        row = (family, layout, precision, *(f"{what} {gap:.1e}" for what, gap in gaps.items()))
        request.node.user_properties.append(("layout", row))

    return note


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    ran = [report for report in reports if getattr(report, "when", "") == "call"]
    rows = [value for report in ran for name, value in report.user_properties if name == "layout"]
    if not rows:
        return
    terminalreporter.section("layouts: largest difference of a tensor from one process, over its norm")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in sorted(map(tuple, rows)):
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
