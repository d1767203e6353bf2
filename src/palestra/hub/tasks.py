"""One task over the versions of a policy: how often it was solved, and what was said by two of them."""

import numpy as np

from palestra.core.records import Ending
from palestra.hub.answers import Said, TaskHistory, VersionRow
from palestra.hub.columns import ENDINGS, Part
from palestra.hub.library import OpenRun
from palestra.hub.queries import OfTask, Where
from palestra.hub.reading import record_at, row_of
from palestra.hub.search import matching

_MOST_SAID = 8  # rollouts of each version
_INVALID = ENDINGS.index(Ending.INVALID.value)


def history(of: OpenRun, query: OfTask) -> TaskHistory:
    where = Where(task=query.task, environment=query.environment, kind=query.kind)
    found = _found(of.index.parts, where, of.group_size)
    versions = _versions(found)
    known = [row.version for row in versions]
    one = _nearest(known, query.one, known[0] if known else None)
    other = _nearest(known, query.other, known[-1] if known else None)
    first = [record_at(of.run, part, int(lines[0])) for part, lines in found[:1]]
    return TaskHistory(
        run=of.id,
        task=query.task,
        environment=first[0].environment if first else query.environment,
        prompt=first[0].task.prompt if first else "",
        answer=first[0].task.answer if first else None,
        versions=versions,
        one=one,
        other=other,
        rollouts_one=_said(of, found, one),
        rollouts_other=_said(of, found, other) if other != one else [],
    )


Found = list[tuple[Part, np.ndarray]]


def _found(parts: tuple[Part, ...], where: Where, group_size: int) -> Found:
    """Parts with lines that match, in which something was sampled that has a reward."""
    found = []
    for part in parts:
        mask = matching(part, where, group_size)
        if mask is not None:
            mask = mask & (part.columns["version"] >= 0) & (part.columns["ending"] != _INVALID)
            if (lines := np.flatnonzero(mask)).size:
                found.append((part, lines))
        part.relax()
    return found


def _versions(found: Found) -> list[VersionRow]:
    if not found:
        return []
    version, reward, tokens = (
        np.concatenate([part.columns[name][lines] for part, lines in found]) for name in ("version", "reward", "tokens")
    )
    return [
        VersionRow(
            version=int(v),
            num_rollouts=int((mine := version == v).sum()),
            mean_reward=float(reward[mine].mean()),
            mean_tokens=float(tokens[mine].mean()),
        )
        for v in np.unique(version)
    ]


def _nearest(known: list[int], wanted: int | None, default: int | None) -> int | None:
    return default if wanted is None or not known else min(known, key=lambda version: abs(version - wanted))


def _said(of: OpenRun, found: Found, version: int | None) -> list[Said]:
    said = []
    for part, lines in found:
        for line in lines[part.columns["version"][lines] == version].tolist():
            if len(said) < _MOST_SAID:
                record = record_at(of.run, part, line)
                said.append(Said(row=row_of(record, part, line, of.group_size), messages=record.messages))
    return said
