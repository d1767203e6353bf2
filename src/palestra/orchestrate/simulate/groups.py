"""The group buffer, as `orchestrate/state.py` and `orchestrate/buffer.py` have it, for very many groups.

The same rules, kept up to date instead of looked for: a property test holds them against the loop's own.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from heapq import heappop, heappush

from palestra.orchestrate.simulate.work import GroupWant


@dataclass(slots=True)
class Group:
    """`begun[m]` is the version that sampled member m's first token, -1 before."""

    group_id: int
    want: GroupWant
    begun: list[int]
    engine: int | None = None  # its home
    ended: int = 0

    @property
    def newest(self) -> int:
        return max(self.begun)


@dataclass(slots=True)
class Buffer:
    """Groups that are open or ready, in dispatch order."""

    window: int
    open: dict[int, Group] = field(default_factory=dict)
    _ready: dict[int, Group] = field(default_factory=dict)
    _order: list[int] = field(default_factory=list)  # ready ones
    _by_version: list[tuple[int, int]] = field(default_factory=list)  # (newest version, group) of all that were ready

    def __len__(self) -> int:
        return len(self.open) + len(self._ready)

    def close(self, group: Group) -> None:
        """All its members ended: it is ready if it has signal, and forgotten otherwise."""
        del self.open[group.group_id]
        if group.want.trains:
            self._ready[group.group_id] = group
            insort(self._order, group.group_id)
            heappush(self._by_version, (group.newest, group.group_id))

    def expire(self, step: int, max_age: int) -> int:
        """Forget ready groups no member of which may train at `step`; how many they were."""
        expired = 0
        while self._by_version and step - self._by_version[0][0] > max_age:
            _, group_id = heappop(self._by_version)
            if self._ready.pop(group_id, None) is not None:
                self._order.remove(group_id)
                expired += 1
        return expired

    def take(self, count: int) -> list[Group] | None:
        """The next batch: `count` ready groups in dispatch order, less than `window` past the oldest open one."""
        oldest_open = next(iter(self.open), None)  # they were opened in order
        allowed = len(self._order)
        if oldest_open is not None:
            allowed = bisect_left(self._order, oldest_open + max(self.window, 0))
        if allowed < count:
            return None
        taken, self._order = self._order[:count], self._order[count:]
        return [self._ready.pop(group_id) for group_id in taken]
