"""Unix time that only goes forward, however the machine's clock is set while a process runs."""

import time

_UNIX_AT_ZERO = time.time() - time.monotonic()  # as the machine's clock stood when this process began


def unix_now() -> float:
    return _UNIX_AT_ZERO + time.monotonic()
