"""Tells pages that a run has grown. One watcher for all of them.

Consumes: the kernel's notices of what changed below `outputs` (watchfiles; inotify on Linux). Produces: for each
subscriber the runs and kinds of files that changed since it last took them. Waits for: those notices.
Ends when: it is closed; then every subscription ends.

Nothing that changes once it has begun is lost: where there are new directories, the next watch is set up before the one
until then is read for the last time, and what new directories hold by then is told. Where the kernel refuses a watch,
all that there is counts as changed once it grants one.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import watchfiles
from watchfiles import Change

from palestra.core.deadline import within
from palestra.core.errors import PalestraError
from palestra.hub.index import NAME as INDEX_NAME
from palestra.hub.library import Library
from palestra.wire.rundir import RunDir

MOST_SUBSCRIBERS = 100
_DEBOUNCE_MS, _STEP_MS = 400, 100
_SILENCE_MS = 500  # after which a watch says that nothing has changed
_AGAIN_S = 1.0
_KINDS = {
    "metrics.jsonl": "metrics",
    "ledger.jsonl": "ledger",
    "restarts.jsonl": "marks",
    "orchestrator.jsonl": "marks",
    "curriculum.jsonl": "state",
    "status.json": "state",
    "summary.json": "state",
    "config.json": "state",
    "attempt.json": "state",
    "results.jsonl": "rollouts",
}

Changed = dict[str, set[str]]
"""Kinds of what changed, by run."""

Notices = AsyncGenerator[set[tuple[Change, str]], None]
"""What changed; of silence, nothing."""


class FullError(PalestraError):
    """There are as many subscribers as there may be."""


class Subscription:
    """What changed since `next` was asked for the last time, of all runs or of one."""

    def __init__(self, run_id: str):
        self._run_id, self._changed, self._event = run_id, Changed(), asyncio.Event()
        self.is_closed = False

    def tell(self, changed: Changed) -> None:
        for run_id, kinds in changed.items():
            if not self._run_id or run_id == self._run_id:
                self._changed.setdefault(run_id, set()).update(kinds)
        if self._changed:
            self._event.set()

    def close(self) -> None:
        self.is_closed = True
        self._event.set()

    async def next(self, deadline_s: float) -> Changed:
        """Empty once it is closed. Errors: DeadlineError."""
        await within(deadline_s, self._event.wait(), waiting_for="a change of the run's files")
        self._event.clear()
        taken, self._changed = self._changed, {}
        return taken


class Watch:
    def __init__(self, library: Library, on_change: Callable[[Changed], None]):
        self._library, self._on_change = library, on_change
        self._subscriptions: set[Subscription] = set()
        self._stop = asyncio.Event()
        self.begun = asyncio.Event()  # the kernel gives notice, or was asked in vain
        self._known: set[Path] | None = None  # of which it gives notice
        self._notices: Notices | None = None
        self._is_closed = False

    @property
    def num_subscribers(self) -> int:
        return len(self._subscriptions)

    def subscribe(self, run_id: str) -> Subscription:
        """Errors: FullError."""
        if len(self._subscriptions) >= MOST_SUBSCRIBERS:
            raise FullError(f"{MOST_SUBSCRIBERS} pages listen already; close some, or load this one again by hand")
        subscription = Subscription(run_id)
        if self._is_closed:
            subscription.close()
        self._subscriptions.add(subscription)
        return subscription

    def leave(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)

    def close(self) -> None:
        self._is_closed = True
        self._stop.set()
        for subscription in self._subscriptions:
            subscription.close()

    async def run(self) -> None:
        """Watches directories, not trees: checkpoints and weights below them are of no interest, and many."""
        try:
            while not self._is_closed:
                directories = await asyncio.to_thread(self._directories)
                # called when something is waited for; the kernel is asked before
                asyncio.get_running_loop().call_soon(self.begun.set)
                try:
                    await self._until_new(directories)
                except (OSError, RuntimeError) as error:  # one of them is gone, or the kernel watches no more
                    print(f"pages are not told of changes for a moment: {error}", file=sys.stderr, flush=True)
                    await self._forget()
                    await asyncio.sleep(_AGAIN_S)
        finally:
            await self._forget()

    async def _forget(self) -> None:
        """What is watched: it may be what fills the kernel's tables."""
        earlier, self._notices, self._known = self._notices, None, set()
        if earlier is not None:
            await earlier.aclose()

    async def _until_new(self, directories: set[Path]) -> None:
        """Until there is a directory that is not watched, be it since before these were."""
        notices, is_first = self._watch(directories), True
        async for changes in notices:
            missed = await self._take_over(notices, directories) if is_first else set()
            self._tell_of({Path(path) for _, path in changes | missed})
            may_be_new = any(change is Change.added and _may_be_a_runs(Path(path)) for change, path in changes)
            if (is_first or may_be_new) and await asyncio.to_thread(self._directories) != directories:
                return
            is_first = False

    def _watch(self, directories: set[Path]) -> Notices:
        return watchfiles.awatch(
            *directories,
            watch_filter=None,
            debounce=_DEBOUNCE_MS,
            step=_STEP_MS,
            rust_timeout=_SILENCE_MS,
            yield_on_timeout=True,
            stop_event=self._stop,
            recursive=False,
            ignore_permission_denied=True,
        )

    async def _take_over(self, notices: Notices, directories: set[Path]) -> set[tuple[Change, str]]:
        """What the watch until now has noticed meanwhile. Tells what was written into directories that it had not."""
        earlier, self._notices = self._notices, notices
        missed: set[tuple[Change, str]] = set()
        if earlier is not None:
            missed = await anext(earlier, missed)
            await earlier.aclose()
        if self._known is not None:
            self._tell_of(await asyncio.to_thread(_held, directories - self._known))
        self._known = directories
        return missed

    def _tell_of(self, paths: set[Path]) -> None:
        changed = self._changed(paths) if paths else {}
        if changed:
            self._on_change(changed)
            self.tell(changed)

    def tell(self, changed: Changed) -> None:
        for subscription in self._subscriptions:
            subscription.tell(changed)

    def _directories(self) -> set[Path]:
        """Those of runs, and those in which there may be some."""
        found = {self._library.outputs.resolve(), *(path.resolve() for path in self._library.places())}
        for run in self._library.directories().values():
            found |= {path.resolve() for path in (run.path, run.path.parent, run.rollouts, run.path / "spans")}
        return {path for path in found if path.is_dir()}

    def _changed(self, paths: set[Path]) -> Changed:
        runs = {run.path.resolve(): run_id for run_id, run in self._library.directories().items()}
        changed: Changed = {}
        for path in paths:
            if path.name == INDEX_NAME or path.name.startswith("."):
                continue
            kind = _KINDS.get(path.name)
            home = path.parent
            if path.parent.name == RunDir(home).rollouts.name and path.suffix == ".jsonl":
                kind, home = "rollouts", path.parent.parent
            elif path.parent.name == "spans":
                home = path.parent.parent
            if kind is not None and home in runs:
                changed.setdefault(runs[home], set()).add(kind)
        return changed


def _held(directories: set[Path]) -> set[Path]:
    """Their files, and the one that makes a directory a run's."""
    found = {path / "config.json" for path in directories}
    for path in directories:
        with contextlib.suppress(OSError):  # it is gone
            found |= set(path.iterdir())
    return found


def _may_be_a_runs(path: Path) -> bool:
    """A directory, or the file that makes one a run's: it may come later."""
    return path.is_dir() or path.name in ("config.json", "results.jsonl")
