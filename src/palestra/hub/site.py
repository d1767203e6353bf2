"""What all pages share: the library, the threads that read for them, the watcher."""

import asyncio
import contextlib
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError
from palestra.hub.library import Library, OpenRun
from palestra.hub.search import prepare_groups
from palestra.hub.watch import Changed, Watch

PATIENCE_S = 1.0  # that a page waits for the index; then it shows what there is, and how much that is
_WATCHES_S = 5.0  # that pages wait until changes are seen


class Site:
    """Open within `async with`; leaving it ends what was begun."""

    def __init__(self, outputs: Path):
        self.library = Library(outputs)
        self.watch = Watch(self.library, self._changed)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="index")
        self._updates: dict[str, Future[bool]] = {}
        self._stop = threading.Event()
        self._watching: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> "Site":
        self._loop = asyncio.get_running_loop()
        self._watching = asyncio.create_task(self.watch.run())
        with contextlib.suppress(DeadlineError):  # it goes on, and pages hear of changes later
            await within(_WATCHES_S, self.watch.begun.wait(), waiting_for="the kernel to watch the runs' directories")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        self.watch.close()
        if self._watching is not None:
            await asyncio.wait({self._watching}, timeout=5)
            self._watching.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def prepare(self, run: OpenRun) -> None:
        """Begin to bring its index up to its files: who opens a run will look at its rollouts."""
        self._update(run)

    async def ready(self, run: OpenRun) -> None:
        """Bring its index up to its files, for as long as a reader waits; the rest goes on behind."""
        update = self._update(run)
        await asyncio.wait({asyncio.wrap_future(update)}, timeout=PATIENCE_S)

    def _update(self, run: OpenRun) -> Future[bool]:
        """One at a time for each run."""
        known = self._updates.get(run.id)
        if known is None or known.done():
            known = self._updates[run.id] = self._threads.submit(self._bring_up, run)
        return known

    def _bring_up(self, run: OpenRun) -> bool:
        """Pages that did not wait for all of it hear when it is there."""
        began = time.monotonic()
        is_changed = run.index.update(should_stop=self._stop)
        if is_changed and not self._stop.is_set():
            self._threads.submit(prepare_groups, run.index.parts, run.group_size, self._stop)
            if time.monotonic() - began >= PATIENCE_S and self._loop is not None:
                self._loop.call_soon_threadsafe(self.watch.tell, {run.id: {"rollouts"}})
        return is_changed

    def _changed(self, changed: Changed) -> None:
        """Runs that somebody looks at are kept ready; the others are read when they are asked for."""
        for run in self.library.opened():
            if "rollouts" in changed.get(run.id, ()):
                self._update(run)
