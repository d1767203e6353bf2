"""The rollouts of an evaluation: results.jsonl, a `RolloutRecord` a line, in the order they ended.

`environment` is the set's name, `rollout_id` the number within it: rollout i is of task i // rollouts per task.
"""

from collections.abc import Sequence

import msgspec

from palestra.core.files import AppendFile
from palestra.core.records import RolloutRecord
from palestra.wire.rundir import RunDir
from palestra.wire.runlog import cut_torn_line, read_rows

Known = dict[str, dict[int, RolloutRecord]]
"""Records by set and number."""


class ResultsFile:
    """Appends; what `append` was given is with the operating system when it returns, whole or not at all."""

    def __init__(self, run: RunDir):
        cut_torn_line(run.results)
        self._file = AppendFile(run.results)

    def append(self, records: Sequence[RolloutRecord]) -> None:
        """Errors: InfrastructureError, if the disk is full."""
        self._file.append(b"".join(msgspec.json.encode(record) + b"\n" for record in records))

    def close(self) -> None:
        self._file.close()


def read_results(run: RunDir) -> Known:
    """Of a set and number that is there twice, the later one counts."""
    known: Known = {}
    for record in read_rows(run.results, RolloutRecord):
        known.setdefault(record.environment, {})[record.rollout_id] = record
    return known
