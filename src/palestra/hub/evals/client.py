"""The part of the client that speaks of evaluations."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from palestra.hub.asking import Asking, segment
from palestra.hub.evals import answers
from palestra.hub.registry.answers import Done

_PUSH_S = 1800.0


class EvaluationsClient(Asking):
    """Errors: as `Asking`."""

    def push_evaluation(self, owner: str, environment: str, archive: Path) -> answers.EvaluationPushed:
        with archive.open("rb") as content:
            return self._answered(
                "POST",
                _home(owner, environment),
                answers.EvaluationPushed,
                content=content,
                headers={"content-type": "application/zip", "content-length": str(archive.stat().st_size)},
                timeout=_PUSH_S,
            )

    def evaluations(self, owner: str, environment: str, **query: Any) -> Iterator[answers.EvaluationRow]:
        """All that match, a page at a time; `query` is that of the leaderboard: `sort`, `version`, `verified`."""
        number = 1
        while True:
            page = self._ask(f"{_home(owner, environment)}.json", answers.Leaderboard, query | {"page": number})
            yield from page.rows
            if page.is_last:
                return
            number += 1

    def evaluation(self, owner: str, environment: str, id: str) -> answers.EvaluationPage:
        return self._ask(f"{_home(owner, environment)}/{segment(id)}.json", answers.EvaluationPage)

    def compare_evaluations(
        self, owner: str, environment: str, one: str, other: str, **query: Any
    ) -> answers.EvaluationComparison:
        asked = {"one": one, "other": other, **query}
        return self._ask(f"{_home(owner, environment)}/compare.json", answers.EvaluationComparison, asked)

    def delete_evaluation(self, owner: str, environment: str, id: str) -> None:
        self._tell(f"/api/environments{_home(owner, environment)}/{segment(id)}/delete", Done)


def _home(owner: str, environment: str) -> str:
    return f"/{segment(owner)}/{segment(environment)}/evaluations"
