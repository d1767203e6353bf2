"""Ranks of a program of this folder as processes that are forked: what a program imports is imported once.

`python -m tests.dist.processes PROGRAM NUM_RANKS PORT ARGUMENTS` calls the program's `main` on every rank, told what
torchrun tells. Real runs are started by torchrun, here too (`orchestrated.py`).
"""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}


def run(program: str, *arguments: Path, timeout_s: float, num_ranks: int | None = None) -> None:
    """To its end; without `num_ranks` it forks its ranks itself. Errors: AssertionError with what it said."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a port that nobody else can take
    start = [__name__, program, str(num_ranks), str(store.port)] if num_ranks else [f"tests.dist.{program}"]
    command = [sys.executable, "-m", *start, *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, timeout=timeout_s, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]


def _rank(rank: int, main: Callable[..., None], arguments: list[Path], num_ranks: int, port: int) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    is_there = {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}  # no rank has to make it
    os.environ.update({name: str(value) for name, value in (places | store | is_there).items()})
    main(*arguments)


def _fork(program: str, num_ranks: int, port: int, arguments: list[Path]) -> None:
    from torch.multiprocessing import start_processes

    main = import_module(f"tests.dist.{program}").main
    start_processes(_rank, (main, arguments, num_ranks, port), nprocs=num_ranks, start_method="fork")


if __name__ == "__main__":
    _fork(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), [Path(argument) for argument in sys.argv[4:]])
