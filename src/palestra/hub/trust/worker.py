"""Examines what waits, one after the other.

Consumes: rows of the queue. Produces: verdicts and logs. Waits for: a push of this process, or the time after which it
looks for those of others and for what dead workers left. Ends when: it is told to; what it works at is given back.
"""

import asyncio
import os
import secrets
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy import select

from palestra import __version__
from palestra.hub.operation.logs import log
from palestra.hub.registry.blobs import put_bytes
from palestra.hub.registry.hub import Hub
from palestra.hub.registry.schema import files
from palestra.hub.trust import queue
from palestra.hub.trust.queue import Job
from palestra.hub.trust.verdict import Verdict

LOOK_S = 10.0
_PIECE = 1 << 20
Examine = Callable[[list[Path]], Awaitable[Verdict]]


class Worker:
    """`async with Worker(hub, examining).at_work():`. `wake` may be called from any thread."""

    def __init__(self, hub: Hub, examining: Examine):
        self._hub, self._examine = hub, examining
        self.name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken = asyncio.Event()

    def wake(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._woken.set)

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task}, timeout=10)
            self._loop = None

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            try:
                while await self.do_one():
                    pass
            except Exception:  # the database may be away for a while: pages say so, and it is looked for again
                log("a check could not be done")
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._woken.wait()
            except TimeoutError:
                continue

    async def do_one(self) -> bool:
        """Whether there was one. Errors: those of the database; whatever fails at it is noted there."""
        job = await asyncio.to_thread(queue.claim, self._hub.database, self.name, __version__)
        if job is None:
            return False
        keeping, is_done = asyncio.create_task(self._keep(job)), False
        try:
            with tempfile.TemporaryDirectory(prefix="palestra-check-") as directory:
                verdict = await self._examine(await asyncio.to_thread(self._files, job, Path(directory)))
            is_done = True
            await asyncio.to_thread(self._finish, job, verdict)
        except Exception:  # of this machine: another one, or a later try, may do it
            log("a check failed", check=job.id, attempt=job.attempt)
            await asyncio.to_thread(queue.give_back, self._hub.database, job, is_fault=True)
        except asyncio.CancelledError:
            if not is_done:
                await asyncio.shield(asyncio.to_thread(queue.give_back, self._hub.database, job, is_fault=False))
            raise
        finally:
            keeping.cancel()
        return True

    async def _keep(self, job: Job) -> None:
        """Makes the claim longer while it is worked at."""
        while True:
            await asyncio.sleep(queue.LEASE_S / 3)
            await asyncio.to_thread(queue.renew, self._hub.database, job)

    def _files(self, job: Job, directory: Path) -> list[Path]:
        with self._hub.database.read() as connection:
            rows = connection.execute(select(files).where(files.c.version_id == job.version_id)).all()
        found = []
        for row in rows:
            found.append(directory / row.filename)
            with self._hub.blobs.open(row.sha256) as content, found[-1].open("wb") as copy:
                while piece := content.read(_PIECE):
                    copy.write(piece)
        return found

    def _finish(self, job: Job, verdict: Verdict) -> None:
        sha256 = put_bytes(self._hub.blobs, verdict.log.encode(), self._hub.settings.incoming)
        is_mine = queue.finish(self._hub.database, job, verdict, sha256)
        log("a check has ended", check=job.id, status=verdict.status.value, why=verdict.why, was_mine=is_mine)
