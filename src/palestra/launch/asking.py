"""Questions that need torch and transformers, put to a process of its own: the command line loads neither."""

import subprocess
import sys

from palestra.core.errors import DeadlineError, UserError

_DEADLINE_S = 300.0


def ask(module: str, *arguments: str) -> bytes:
    """What `python -m MODULE ARGUMENTS` answers. Errors: UserError with its last line, as libraries warn before it."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_DEADLINE_S)
    except subprocess.TimeoutExpired as error:
        raise DeadlineError(f"python -m {module}, which looks at the model", _DEADLINE_S) from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(said[-1] if done.returncode == 2 else f"the model cannot be looked at: {said[-1]}")
    return done.stdout
