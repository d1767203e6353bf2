"""Work that goes on beside the steps: a checkpoint's files are written while the next step is trained.

Consumes / produces: one piece of work at a time, in a thread of its own. Waits for: nothing; whoever began it finishes
it. Woken by: `begin`. Ends when: the work does, and says so through `on_end`, in its own thread.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from palestra.core.clock import unix_now
from palestra.core.errors import DeadlineError


@dataclass(frozen=True)
class Written:
    """A checkpoint's files of the trainer, whole on the disk. They were written in `write_s` from `started_at` on."""

    version: int
    directory: Path
    started_at: float
    write_s: float


class Background:
    """Writes one checkpoint at a time. Nothing of it is announced before `finish` has returned it."""

    def __init__(self, *, deadline_s: float):
        self._deadline_s = deadline_s
        self._written: Future[Written] | None = None

    def begin(self, version: int, directory: Path, write: Callable[[], None], on_end: Callable[[], None]) -> None:
        """`write` fills `directory`; then, or when it failed, `on_end` is called. The one before must be finished."""
        if self._written is not None:
            raise RuntimeError(f"checkpoint {version} is begun before the one before it is finished")
        self._written = written = Future[Written]()
        started_at = unix_now()

        def run() -> None:
            started = time.perf_counter()
            try:
                write()
            except BaseException as error:
                written.set_exception(error)
            else:
                written.set_result(Written(version, directory, started_at, time.perf_counter() - started))
            on_end()

        threading.Thread(target=run, name=f"checkpoint-{version}", daemon=True).start()

    @property
    def has_ended(self) -> bool:
        """Whether there is one that `finish` need not wait for."""
        return self._written is not None and self._written.done()

    @property
    def is_begun(self) -> bool:
        return self._written is not None

    def finish(self) -> Written | None:
        """Wait for the one that was begun; None, if there is none. Errors: those of its work; DeadlineError."""
        written, self._written = self._written, None
        if written is None:
            return None
        try:
            return written.result(timeout=self._deadline_s)
        except TimeoutError:
            if written.done():
                raise
            raise DeadlineError("the files of a checkpoint (train.batch_deadline_s)", self._deadline_s) from None
