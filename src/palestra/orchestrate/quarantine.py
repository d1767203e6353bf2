"""Quarantine: tasks that are not played again, because environment workers die of them.

A worker may die of whatever its environment code was doing: nothing for the rollouts that waited for an engine. A task
that was at work at each of three deaths, and is all that these deaths share, is quarantined. Suspects are played one at
a time, so that the next death tells them apart.
"""

from collections.abc import Callable, Mapping, Set

from palestra.core.records import Task
from palestra.orchestrate.state import TaskQuarantined

_DEATHS = 3
_SUSPECT = 2  # deaths, after which a task is played alone


class Quarantine:
    """`known` tasks by `name_of`, with the reason; `record` hears of each new one."""

    def __init__(self, known: Mapping[str, str], record: Callable[[TaskQuarantined], None]):
        self._known, self._record = known, record
        self._deaths: dict[str, list[frozenset[str]]] = {}  # by task: what was at work at each death it was at work at

    def reason(self, source: str, task: Task) -> str:
        """Why the task must not be played; "" if it may."""
        return self._known.get(name_of(source, task), "")

    def is_suspect(self, source: str, task: Task) -> bool:
        """Not of a quarantined one: there is nothing to wait for."""
        name = name_of(source, task)
        return name not in self._known and len(self._deaths.get(name, [])) >= _SUSPECT

    def worker_died(self, at_work: Set[str], why: str) -> str:
        """`at_work` are the names of the tasks whose code the worker ran. Returns the one that is quarantined for it,
        "" if none is."""
        for name in at_work:
            self._deaths.setdefault(name, []).append(frozenset(at_work))
        for name in sorted(at_work):
            latest = self._deaths[name][-_DEATHS:]
            if len(latest) == _DEATHS and frozenset.intersection(*latest) == {name}:
                reason = f"{_DEATHS} environment workers died while they were at work on it; the last: {why}"
                self._record(TaskQuarantined(task=name, reason=reason))
                return name
        return ""


def name_of(source: str, task: Task) -> str:
    """Of a task, in the journal and for people."""
    return f"{source}/{task.key or task.prompt}"
