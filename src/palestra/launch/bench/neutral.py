"""`python -m palestra.launch.bench.neutral`: keeps one core busy with arithmetic, as the loop's other side would.

On few cores a process alone runs under other conditions (clock, caches, memory) than beside another: what is measured
alone is measured beside this. Ends when its parent does, or is told to.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_WIDTH = 256
_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


@contextmanager
def neutral_load(cores: int) -> Iterator[None]:
    """While so many cores are kept busy."""
    with ExitStack() as stack:
        for _ in range(cores):
            process = subprocess.Popen([sys.executable, "-m", __name__], env={**os.environ, **_THREADS})
            stack.callback(process.wait)
            stack.callback(process.terminate)
        yield


def main() -> None:
    import numpy as np

    from palestra.core.process import die_with_parent

    die_with_parent(os.getppid())
    matrix = np.random.default_rng(0).standard_normal((_WIDTH, _WIDTH), np.float32)
    while True:
        np.tanh(matrix @ matrix)


if __name__ == "__main__":
    main()
