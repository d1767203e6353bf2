"""What an examination says."""

from enum import StrEnum

from msgspec import Struct

from palestra.env.case import Case

MOST_LOG = 256 << 10  # bytes that are kept


class Status(StrEnum):
    """WAITING and RUNNING are of the queue. NOT_RUN says nothing of the environment: there was no way to look."""

    WAITING = "waiting"
    RUNNING = "running"
    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"
    ERROR = "error"  # the hub's own failure: it is tried again

    @property
    def is_final(self) -> bool:
        return self in (Status.PASSED, Status.FAILED, Status.NOT_RUN)


class Verdict(Struct, frozen=True, kw_only=True):
    """`cases` by environment of the package. `why` where there are none: in a sentence."""

    status: Status
    why: str = ""
    seconds: float = 0.0
    cases: dict[str, list[Case]] = {}
    log: str = ""

    def count(self, ending: str) -> int:
        return sum(case.ending == ending for cases in self.cases.values() for case in cases)
