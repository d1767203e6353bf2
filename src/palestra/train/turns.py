"""The trainer's turns on a device that it shares with an engine (`launch.turns`).

Consumes: `TurnGiven`. Produces: `TurnAsked`, `TurnOver`; memory of the device, for others. Waits for: its turn, at most
`train.batch_deadline_s`. Ends: with the process, whose turn is then over, too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from palestra.core.ledger import Ledger


class Belongings(Protocol):
    """What a trainer has on the device between two steps."""

    def put_away(self) -> None: ...

    def bring_back(self) -> None: ...


class Asking(Protocol):
    """The orchestrator, as far as it gives turns."""

    def take_turn(self) -> None: ...

    def give_turn(self) -> None: ...


class OwnDevice:
    """Nobody else uses it."""

    def keep(self, belongings: Belongings) -> None:
        """They stay where they are."""

    @contextmanager
    def taken(self) -> Iterator[None]:
        yield

    @contextmanager
    def left(self) -> Iterator[None]:
        yield


OWN_DEVICE = OwnDevice()


class SharedDevice:
    """A trainer that fails in its turn ends, and its turn with it."""

    def __init__(self, asking: Asking, ledger: Ledger):
        self._asking, self._ledger = asking, ledger
        self._belongings: Belongings | None = None  # none, until there is a trainer

    def keep(self, belongings: Belongings) -> None:
        """To be put away at the end of each turn."""
        self._belongings = belongings

    @contextmanager
    def taken(self) -> Iterator[None]:
        """What needs the device happens inside."""
        self._take()
        yield
        self._leave()

    @contextmanager
    def left(self) -> Iterator[None]:
        """Inside of a turn: others have the device meanwhile."""
        self._leave()
        yield
        self._take()

    def _take(self) -> None:
        self._asking.take_turn()
        if self._belongings is not None:
            with self._ledger.spend("bring_back"):
                self._belongings.bring_back()

    def _leave(self) -> None:
        if self._belongings is not None:
            with self._ledger.spend("put_away"):
                self._belongings.put_away()
        self._asking.give_turn()
