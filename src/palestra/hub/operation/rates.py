"""How often one may ask: a bucket of tokens for each, filled at a rate. Of one process; several have one each."""

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MOST_KEYS = 20_000  # the longest silent are forgotten, which can only give them a full bucket


@dataclass(frozen=True)
class Rate:
    """`per_s` on the long run, `burst` at once."""

    per_s: float
    burst: float


class Buckets:
    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic):
        self._rate, self._clock = rate, clock
        self._known: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what is left, and when that was

    def __len__(self) -> int:
        return len(self._known)

    def left(self, key: str) -> float:
        left, at = self._known.get(key, (self._rate.burst, self._clock()))
        return min(self._rate.burst, left + (self._clock() - at) * self._rate.per_s)

    def wait_s(self, key: str) -> float:
        """Until there is one to take; 0 now."""
        return max((1.0 - self.left(key)) / self._rate.per_s, 0.0)

    def take(self, key: str) -> float:
        """Take one; or, where there is none, take nothing and say in how many seconds there is one."""
        if wait_s := self.wait_s(key):
            return wait_s
        left = self.left(key) - 1.0
        self._known.pop(key, None)
        self._known[key] = (left, self._clock())
        while len(self._known) > MOST_KEYS:
            self._known.popitem(last=False)
        return 0.0


def place_of(address: str) -> str:
    """Whose an address is: one of IPv4 itself, of IPv6 its /64, since a machine has a whole one."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))
    return str(found)
