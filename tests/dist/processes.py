"""Programs of this folder as processes: one, or as ranks of torchrun."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}


def run(program: str, *arguments: Path, timeout_s: float, num_ranks: int | None = None) -> None:
    """To its end; without `num_ranks` it starts its ranks itself. Errors: AssertionError with what it said."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"] if num_ranks else []
    command = [sys.executable, *torchrun, str(ROOT / "tests/dist" / program), *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, timeout=timeout_s, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
