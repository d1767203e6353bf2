"""Users of their own, for sandboxes that root makes: numbers that no account has, one for each sandbox."""

import os

from palestra.sandbox.records import SandboxStartError

_FIRST = 2**28 + 2**27
_EACH = 4096  # of one process: two for each sandbox, whose own root is the second


class Users:
    """Of this process. Whoever is not root has one user, 0 here: itself."""

    def __init__(self):
        self._is_root = os.geteuid() == 0
        first = _FIRST + (os.getpid() % 2**15) * _EACH
        self._free = list(range(first + _EACH - 2, first - 1, -2)) if self._is_root else []

    def take(self) -> int:
        """Errors: SandboxStartError, when all are taken."""
        if not self._is_root:
            return 0
        if not self._free:
            raise SandboxStartError(f"{_EACH // 2} sandboxes are there already; delete some")
        return self._free.pop()

    def give_back(self, uid: int) -> None:
        if uid:
            self._free.insert(0, uid)


_users: dict[int, Users] = {}


def users() -> Users:
    """Shared by all backends of this process, so that no two sandboxes are one user."""
    return _users.setdefault(os.getpid(), Users())
