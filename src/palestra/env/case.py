"""One law of an environment, looked at."""

from typing import Literal

from msgspec import Struct


class Case(Struct, frozen=True, kw_only=True):
    """One thing that must hold. `detail` says what was found where it does not, or why it was left out."""

    name: str
    ending: Literal["passed", "failed", "skipped"]
    detail: str = ""
