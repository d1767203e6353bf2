"""`/health`: the process answers. `/ready`: so do the database and the blobs, and it is not ending. `/metrics`."""

import asyncio
import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import text
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from palestra.hub.operation.logs import log, redacted
from palestra.hub.operation.metrics import CONTENT_TYPE, Metrics
from palestra.hub.registry.blobs import Blobs
from palestra.hub.registry.database import Database

_DEADLINE_S = 3.0
_NOTHING = hashlib.sha256(b"").hexdigest()


class Readiness:
    """`drain` makes it not ready, so that balancers send no more. Its threads are its own: pages may take theirs."""

    def __init__(self, database: Database, blobs: Blobs):
        self._parts: dict[str, Callable[[], object]] = {
            "database": lambda: _asked(database),
            "blobs": lambda: blobs.exists(_NOTHING),
        }
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="ready")
        self._draining = threading.Event()

    def drain(self) -> None:
        self._draining.set()

    @property
    def is_draining(self) -> bool:
        return self._draining.is_set()

    async def problems(self) -> dict[str, str]:
        """By part; empty: none."""
        found = {"server": "it is ending"} if self.is_draining else {}
        loop = asyncio.get_running_loop()
        futures = {name: loop.run_in_executor(self._threads, part) for name, part in self._parts.items()}
        await asyncio.wait(futures.values(), timeout=_DEADLINE_S)
        for name, future in futures.items():
            if not future.done():
                found[name] = f"no answer within {_DEADLINE_S:g} s"
                future.cancel()
            elif error := future.exception():
                found[name] = redacted(f"{type(error).__name__}: {error}")
        return found

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _asked(database: Database) -> None:
    with database.read() as connection:
        connection.execute(text("SELECT 1")).one()


def routes(readiness: Readiness, metrics: Metrics) -> list[Route]:
    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_: Request) -> Response:
        """What is wrong is logged, not told to everybody: it may name hosts."""
        problems = await readiness.problems()
        if problems:
            log("not ready", parts=problems)
        parts = dict.fromkeys(problems, "failing")
        return JSONResponse({"status": "failing" if parts else "ok", **parts}, 503 if parts else 200)

    async def numbers(_: Request) -> Response:
        return Response(await asyncio.to_thread(metrics.text), media_type=CONTENT_TYPE)

    return [Route("/health", health), Route("/ready", ready), Route("/metrics", numbers)]
