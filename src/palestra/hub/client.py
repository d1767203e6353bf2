"""The client of a viewer and of a hub: the same records that their pages show.

with Client("http://127.0.0.1:8003") as client:
    for rollout in client.rollouts("quickstart", min_reward=1, kind="training"):
        ...
"""

from collections.abc import Iterator
from typing import Any

from palestra.hub import answers
from palestra.hub.asking import segment
from palestra.hub.registry.client import RegistryClient


class Client(RegistryClient):
    """Errors of every method: UserError for what the server refuses, InfrastructureError where it does not answer."""

    def runs(self) -> list[answers.RunRow]:
        return self._ask("/runs.json", answers.Runs).runs

    def run(self, run: str) -> answers.Run:
        return self._ask(f"/runs/{segment(run)}.json", answers.Run)

    def curves(self, run: str, *names: str, points: int = 20_000) -> dict[str, answers.Curve]:
        """By metric; without names those of the overview."""
        given = {"names": ",".join(names), "points": points}
        found = self._ask(f"/runs/{segment(run)}/curves.json", answers.Curves, given)
        return {curve.name: curve for curve in found.curves}

    def ledger(self, run: str) -> answers.Ledger:
        return self._ask(f"/runs/{segment(run)}/ledger.json", answers.Ledger)

    def marks(self, run: str) -> list[answers.Mark]:
        return self._ask(f"/runs/{segment(run)}/marks.json", answers.Marks).marks

    def rollouts(self, run: str, **where: Any) -> Iterator[answers.RolloutRow]:
        """All that match, a page at a time; `where` are the parameters of the page: `min_reward`, `ending`, `sort`."""
        for page in self._pages(f"/runs/{segment(run)}/rollouts.json", answers.Rollouts, where):
            yield from page.rollouts

    def groups(self, run: str, **where: Any) -> Iterator[answers.GroupRow]:
        for page in self._pages(f"/runs/{segment(run)}/groups.json", answers.Groups, where):
            yield from page.groups

    def rollout(self, run: str, file: str, line: int, *, sample: int = 0, first: int = 0) -> answers.Rollout:
        path = f"/runs/{segment(run)}/rollouts/{segment(file)}/{line}.json"
        return self._ask(path, answers.Rollout, {"sample": sample, "first": first})

    def task(self, run: str, key: str, *, one: int | None = None, other: int | None = None) -> answers.TaskHistory:
        """What was said at one task by two versions; by default the oldest and the newest."""
        return self._ask(
            f"/runs/{segment(run)}/task.json", answers.TaskHistory, {"task": key, "one": one, "other": other}
        )
