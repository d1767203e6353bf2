"""Turns: which process may use the device that engine and trainer share (`launch.turns`).

    none --asked--> asks --given--> uses --over, put to sleep, ended--> none
      +------------- woken by a publish --^

Consumes: `TurnAsked` and `TurnOver`; what the publisher does to engines; processes that ended. Produces: `TurnGiven`.
Who decides is the publisher, one thing after the other: it gives turns, puts engines to sleep and wakes them.
Ends: with the loop. A run without turns has none that know of each other: whoever asks for nothing may use its own.
"""

from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum

from palestra.wire.messages import TurnGiven

TRAINER = "trainer"


class Turn(StrEnum):
    NONE = "none"  # it has left the device, or is not there
    ASKS = "asks"
    USES = "uses"  # or may do so, for all that is known


class Turns:
    """Of the processes that share one device; of none, where each has its own.

    `is_inherited`: by a loop whose predecessor knew who is at it. Each may be, until it says or is told otherwise.
    """

    def __init__(
        self,
        processes: Sequence[str],
        send: Callable[[str, TurnGiven], Awaitable[None]],
        *,
        is_inherited: bool = False,
    ):
        self._send = send
        self._turns = dict.fromkeys(processes, Turn.USES if is_inherited else Turn.NONE)

    def asked(self, process: str) -> None:
        self._move(process, Turn.ASKS)

    def over(self, process: str) -> None:
        """It has left the device, or ended."""
        self._move(process, Turn.NONE)

    def asks(self, process: str) -> bool:
        return self._turns.get(process) is Turn.ASKS

    def is_idle(self, process: str) -> bool:
        """Whether it uses nothing of the device, and will not before it is given a turn or woken."""
        return self._turns.get(process) is not Turn.USES

    def is_free_for(self, process: str) -> bool:
        """Whether nobody else uses the device."""
        return all(turn is not Turn.USES for other, turn in self._turns.items() if other != process)

    def begin(self, process: str) -> None:
        """It uses the device from now on. Errors: ValueError, if another does."""
        if process in self._turns and not self.is_free_for(process):
            raise ValueError(f"{process} cannot begin its turn: {self._turns}")
        self._move(process, Turn.USES)

    async def give(self, process: str) -> None:
        """To one that asks."""
        self.begin(process)
        await self._send(process, TurnGiven())

    def _move(self, process: str, turn: Turn) -> None:
        if process in self._turns:
            self._turns[process] = turn
