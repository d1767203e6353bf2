"""What the pages of an evaluation answer: itself, its rollouts, one of them, two evaluations beside each other."""

import json
from typing import Any

from sqlalchemy import Row

from palestra.algo.standing import duel
from palestra.core.errors import UserError
from palestra.hub import answers as of_runs
from palestra.hub import queries as of_runs_queries
from palestra.hub import search
from palestra.hub.evals import answers, board, queries
from palestra.hub.evals.opened import Opened
from palestra.hub.evals.told import Evaluation, reproduce
from palestra.hub.pages import NotFoundError as NoRolloutError
from palestra.hub.pages import rollout_of
from palestra.hub.reading import record_at, row_of
from palestra.hub.registry import rights
from palestra.hub.registry.hub import Hub
from palestra.hub.registry.rights import NotFoundError, Who

_IDLE = ("name", "started_at", "ended_at", "missing", "format", "endpoint")  # differ between any two


def evaluation(hub: Hub, who: Who, owner: str, name: str, id: str, *, url: str = "") -> answers.EvaluationPage:
    """`url`: how the hub is called, for the command that installs the environment. Errors: NotFoundError."""
    with hub.database.read() as connection:
        environment = rights.environment(connection, who, owner, name)
        row = board.evaluation_row(connection, environment, id)
        may_delete = board.may_delete(connection, who, environment, row)
    shown, told, numbers = board.row_of(row), Evaluation.model_validate_json(row.settings), json.loads(row.numbers)
    index = f"{url}/{owner}/{name}/simple/" if url and shown.is_known_version else ""
    return answers.EvaluationPage(
        owner=owner,
        environment=name,
        row=shown,
        told=json.loads(row.settings),
        reproduce=reproduce(told, index=index, project=environment.project),
        notes=_notes(shown, told),
        digest=numbers["digest"],
        num_bytes=numbers["num_bytes"],
        may_delete=may_delete,
    )


def _notes(row: answers.EvaluationRow, told: Evaluation) -> list[str]:
    """What a reader must know before they believe it."""
    found = list(told.missing)
    if row.version and not row.is_known_version:
        found.append(f"This hub has no version {row.version} of the environment: nobody can look at what was measured.")
    if not row.version:
        found.append("The version of the environment is not known.")
    if row.standing.num_errors:
        found.append(f"{row.standing.num_errors} rollouts ended by errors and are in no mean.")
    if row.note:
        found.append(row.note)
    return found


def rollouts(hub: Hub, who: Who, owner: str, name: str, id: str, query: queries.Rollouts) -> answers.EvaluationRollouts:
    """Errors: NotFoundError."""
    opened = _opened(hub, who, owner, name, id)
    where = of_runs_queries.Rollouts.model_validate(query.model_dump(exclude_defaults=True) | {"sort": query.sort})
    parts = opened.run.index.parts
    page = search.rollouts(parts, where, 1, sort=where.sort, limit=where.limit, after=where.after, before=where.before)
    found = [row_of(record_at(opened.run.run, one.part, one.line), one.part, one.line, 1) for one in page.rows]
    return answers.EvaluationRollouts(
        owner=owner,
        environment=name,
        evaluation=id,
        rollouts=found,
        num_matching=page.num_matching,
        num_before=page.num_before,
        after=page.after,
        before=page.before,
        errors=search.facets(parts)["errors"],
    )


def rollout(
    hub: Hub, who: Who, owner: str, name: str, id: str, file: str, line: str, query: of_runs_queries.Rollout
) -> of_runs.Rollout:
    """As the page of a run's rollout has it. Errors: NotFoundError."""
    opened = _opened(hub, who, owner, name, id)
    try:
        return rollout_of(opened.run, file, line, query)
    except NoRolloutError:
        raise NotFoundError(f"there is no rollout {line[:20]} in {file[:40]} of this evaluation") from None


def _opened(hub: Hub, who: Who, owner: str, name: str, id: str) -> Opened:
    row = _row(hub, who, owner, name, id)
    opened = hub.unpacked.open(row.blob_sha256)
    opened.run.index.update()
    return opened


def _row(hub: Hub, who: Who, owner: str, name: str, id: str) -> Row[Any]:
    with hub.database.read() as connection:
        return board.evaluation_row(connection, rights.environment(connection, who, owner, name), id)


# --- two beside each other


def comparison(hub: Hub, who: Who, owner: str, name: str, query: queries.Comparison) -> answers.EvaluationComparison:
    """Errors: NotFoundError; UserError, if they share no task."""
    rows = [_row(hub, who, owner, name, id) for id in (query.one, query.other)]
    one, other = (hub.unpacked.open(row.blob_sha256).task_means for row in rows)
    try:
        found = duel(one, other)
    except ValueError:
        raise UserError("no task is in both: evaluations of other splits or arguments cannot be compared") from None
    pairs = [pair for pair in found.pairs if query.which in ("", pair.outcome)]
    begin = (query.page - 1) * queries.PER_PAGE
    return answers.EvaluationComparison(
        owner=owner,
        environment=name,
        one=board.row_of(rows[0]),
        other=board.row_of(rows[1]),
        difference=found.difference,
        won=found.won,
        lost=found.lost,
        alike=found.alike,
        only_one=found.only_one,
        only_other=found.only_other,
        settings=_differences(*(json.loads(row.settings) for row in rows)),
        pairs=pairs[begin : begin + queries.PER_PAGE],
        num_pairs=len(pairs),
        page=query.page,
        is_last=begin + queries.PER_PAGE >= len(pairs),
    )


def _differences(one: dict[str, Any], other: dict[str, Any]) -> list[answers.SettingDifference]:
    keys = sorted((one.keys() | other.keys()) - set(_IDLE))
    return [
        answers.SettingDifference(key=key, one=one.get(key), other=other.get(key))
        for key in keys
        if one.get(key) != other.get(key)
    ]
