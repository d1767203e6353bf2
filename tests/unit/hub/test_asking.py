"""The client of a viewer: what it yields is all there is, or it says so."""

import httpx
import msgspec
import pytest

from palestra.core.errors import DeadlineError
from palestra.hub import asking
from palestra.hub.answers import GroupRow, Groups, Indexed
from palestra.hub.client import Client

ROWS = [
    GroupRow(
        group=number,
        step=0,
        environment="calc",
        task="t",
        num_rollouts=4,
        mean_reward=0.5,
        min_reward=0.0,
        max_reward=1.0,
    )
    for number in range(5)
]


class Viewer:
    """Has read a part of the files, more with every question; a page has two rows."""

    def __init__(self, *shares: float):
        self._shares, self.asked = list(shares), []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        share = self._shares.pop(0) if len(self._shares) > 1 else self._shares[0]
        self.asked.append(share)
        known = ROWS[: int(share * len(ROWS))]
        first = int(request.url.params.get("after", "0"))
        last = min(first + 2, len(known))
        page = Groups(
            run="run",
            groups=known[first:last],
            num_matching=len(known),
            num_before=first,
            after=str(last) if last < len(known) else "",
            before="",
            environments=["calc"],
            indexed=Indexed(share=share, num_rollouts=4 * len(known), num_training=0),
        )
        return httpx.Response(200, content=msgspec.json.encode(page))


def groups(viewer: Viewer) -> list[int]:
    with Client("http://viewer", transport=httpx.MockTransport(viewer)) as client:
        return [row.group for row in client.groups("run")]


def test_all_is_yielded_also_of_a_run_that_is_still_being_read():
    viewer = Viewer(0.2, 0.6, 1.0)
    assert groups(viewer) == [0, 1, 2, 3, 4]
    assert viewer.asked[:3] == [0.2, 0.6, 1.0]


def test_what_is_not_read_in_time_is_not_taken_for_all(monkeypatch):
    monkeypatch.setattr(asking, "_INDEXING_S", 0.0)
    with pytest.raises(DeadlineError, match=r"http://viewer to read all files of /runs/run/groups.json \(60%\)"):
        groups(Viewer(0.6))
