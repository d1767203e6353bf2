"""The client of a viewer: the same records that its pages show.

with Client("http://127.0.0.1:8003") as client:
    for rollout in client.rollouts("quickstart", min_reward=1, kind="training"):
        ...
"""

from collections.abc import Iterator
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from palestra.core.errors import InfrastructureError, UserError
from palestra.hub import answers

Answer = TypeVar("Answer")
Listed = TypeVar("Listed", answers.Rollouts, answers.Groups)


class Client:
    """Errors of every method: UserError for what the server refuses, InfrastructureError where it does not answer."""

    def __init__(self, url: str, *, timeout_s: float = 30.0, transport: httpx.BaseTransport | None = None):
        self._http = httpx.Client(base_url=url.rstrip("/"), timeout=timeout_s, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def runs(self) -> list[answers.RunRow]:
        return self._ask("/runs.json", answers.Runs).runs

    def run(self, run: str) -> answers.Run:
        return self._ask(f"/runs/{_segment(run)}.json", answers.Run)

    def curves(self, run: str, *names: str, points: int = 20_000) -> dict[str, answers.Curve]:
        """By metric; without names those of the overview."""
        given = {"names": ",".join(names), "points": points}
        found = self._ask(f"/runs/{_segment(run)}/curves.json", answers.Curves, given)
        return {curve.name: curve for curve in found.curves}

    def ledger(self, run: str) -> answers.Ledger:
        return self._ask(f"/runs/{_segment(run)}/ledger.json", answers.Ledger)

    def marks(self, run: str) -> list[answers.Mark]:
        return self._ask(f"/runs/{_segment(run)}/marks.json", answers.Marks).marks

    def rollouts(self, run: str, **where: Any) -> Iterator[answers.RolloutRow]:
        """All that match, a page at a time; `where` are the parameters of the page: `min_reward`, `ending`, `sort`."""
        for page in self._pages(f"/runs/{_segment(run)}/rollouts.json", answers.Rollouts, where):
            yield from page.rollouts

    def groups(self, run: str, **where: Any) -> Iterator[answers.GroupRow]:
        for page in self._pages(f"/runs/{_segment(run)}/groups.json", answers.Groups, where):
            yield from page.groups

    def rollout(self, run: str, file: str, line: int, *, sample: int = 0, first: int = 0) -> answers.Rollout:
        path = f"/runs/{_segment(run)}/rollouts/{_segment(file)}/{line}.json"
        return self._ask(path, answers.Rollout, {"sample": sample, "first": first})

    def task(self, run: str, key: str, *, one: int | None = None, other: int | None = None) -> answers.TaskHistory:
        """What was said at one task by two versions; by default the oldest and the newest."""
        return self._ask(
            f"/runs/{_segment(run)}/task.json", answers.TaskHistory, {"task": key, "one": one, "other": other}
        )

    def _pages(self, path: str, kind: type[Listed], where: dict[str, Any]) -> Iterator[Listed]:
        after = ""
        while True:
            page = self._ask(path, kind, {"limit": 200} | where | {"after": after})
            yield page
            if not (after := page.after):
                return

    def _ask(self, path: str, kind: type[Answer], given: dict[str, Any] | None = None) -> Answer:
        params = {name: value for name, value in (given or {}).items() if value not in (None, "")}
        try:
            response = self._http.get(path, params=params)
        except httpx.TransportError as error:
            raise InfrastructureError(f"the viewer at {self._http.base_url} does not answer: {error}") from error
        if not response.is_success:
            raise UserError(f"the viewer refused {path}: {response.status_code} {_problem(response.content)}")
        return msgspec.json.decode(response.content, type=kind)


def _problem(content: bytes) -> str:
    try:
        return str(msgspec.json.decode(content)["error"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return content[:200].decode(errors="replace")


def _segment(text: str) -> str:
    return quote(text, safe="")
