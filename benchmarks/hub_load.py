"""Latency of a hub under load: `python benchmarks/hub_load.py [--database URL] [--environments 10000]`.

Fills a database with environments of five versions each, starts `palestra serve hub` on it, and asks at a fixed rate,
each request at its own time whether the one before was answered or not. Prints a JSON line for every kind of request.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from sqlalchemy import insert, select

from palestra.hub.registry import wordindex
from palestra.hub.registry.database import Database, sqlite_url
from palestra.hub.registry.schema import environments, files, owners, versions

WORDS = (
    "guess",
    "search",
    "proof",
    "market",
    "garden",
    "river",
    "engine",
    "puzzle",
    "letter",
    "number",
    "tool",
    "plan",
)
VERSIONS = 5


@dataclass(frozen=True)
class Kind:
    """`aim_ms` bounds the 99th percentile."""

    name: str
    rate: float
    aim_ms: float
    path: Callable[[random.Random], str]
    accept: str = "application/vnd.pypi.simple.v1+json"


def kinds(num: int) -> list[Kind]:
    def project(draw: random.Random) -> str:
        at = draw.randrange(num)
        return f"/owner-{at % 100}/game-{at}/simple/palestra-game-{at}/"

    return [
        Kind("index of one project", 200, 20, lambda _: "/owner-7/game-7/simple/palestra-game-7/"),
        Kind("index of any project", 200, 20, project),
        Kind("list", 20, 100, lambda draw: f"/environments.json?page={draw.randrange(1, 50)}"),
        Kind("search", 20, 100, lambda draw: f"/environments.json?words={draw.choice(WORDS)}+{draw.choice(WORDS)}"),
        Kind("page of an environment", 20, 100, lambda draw: project(draw).split("/simple/")[0]),
    ]


def fill(database: Database, num: int) -> None:
    draw = random.Random(0)
    now = time.time()
    with database.write() as connection:
        names = [{"name": f"owner-{at}", "kind": "person", "created": now} for at in range(100)]
        connection.execute(insert(owners), names)
        ids = {row.name: row.id for row in connection.execute(select(owners.c.name, owners.c.id))}
        for first in range(0, num, 1000):
            _fill_some(connection, range(first, min(num, first + 1000)), ids, draw, database.is_sqlite)


def _fill_some(connection, places: range, ids: dict[str, int], draw: random.Random, is_sqlite: bool) -> None:
    now = time.time()
    for at in places:
        summary = " ".join(draw.sample(WORDS, 4))
        row = {"owner_id": ids[f"owner-{at % 100}"], "name": f"game-{at}", "project": f"palestra-game-{at}"}
        row |= {"visibility": "public", "summary": summary, "tags": json.dumps([draw.choice(WORDS)]), "latest": "1.4"}
        made = insert(environments).values(**row, created=now, updated=now + at).returning(environments.c.id)
        id = connection.execute(made).scalar_one()
        for number in range(VERSIONS):
            of = {"environment_id": id, "version": f"1.{number}", "created": now, "readme": f"# {summary}\n" * 20}
            version = connection.execute(insert(versions).values(**of).returning(versions.c.id)).scalar_one()
            file = {"environment_id": id, "version_id": version, "kind": "wheel", "size": 1, "created": now}
            file |= {"filename": f"palestra_game_{at}-1.{number}-py3-none-any.whl"}
            connection.execute(insert(files).values(**file, sha256="0" * 64, metadata_sha256="1" * 64))
        wordindex.put(connection, id, f"{summary} " * 20, is_sqlite=is_sqlite)


async def measure(url: str, kind: Kind, seconds: float) -> dict[str, float | str]:
    draw, took_ms = random.Random(1), []
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=64)) as session:

        async def ask(path: str) -> None:
            start = time.perf_counter()
            async with session.get(path, headers={"accept": kind.accept}) as answer:
                await answer.read()
                assert answer.status == 200, (path, answer.status)
            took_ms.append(1000 * (time.perf_counter() - start))

        await ask(kind.path(draw))
        took_ms.clear()
        start = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            for number in range(int(seconds * kind.rate)):
                await asyncio.sleep(start + number / kind.rate - asyncio.get_running_loop().time())
                group.create_task(ask(kind.path(draw)))
    took_ms.sort()
    found = {f"p{share}_ms": round(took_ms[int(len(took_ms) * share / 100)], 2) for share in (50, 99)}
    return {"what": kind.name, "rate": kind.rate, "num": len(took_ms), **found, "aim_p99_ms": kind.aim_ms}


async def serve_and_measure(data: Path, words: list[str], num: int, seconds: float) -> None:
    command = [
        sys.executable,
        "-m",
        "palestra.launch.cli",
        "serve",
        "hub",
        "--no-checks",
        "--data",
        str(data),
        "--port",
        "0",
        *words,
    ]
    hub = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert hub.stdout is not None
        url = (await asyncio.wait_for(hub.stdout.readline(), timeout=60)).decode().removeprefix("hub: ").strip()
        for kind in kinds(num):
            print(json.dumps(await measure(url, kind, seconds)), flush=True)
    finally:
        hub.terminate()
        await asyncio.wait_for(hub.wait(), timeout=60)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--database", default="")
    parser.add_argument("--environments", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=10)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as data:
        database = Database(given.database or sqlite_url(Path(data) / "hub.db"))
        database.migrate()
        start = time.perf_counter()
        fill(database, given.environments)
        print(f"filled in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        database.close()
        words = ["--database", given.database] if given.database else []
        asyncio.run(serve_and_measure(Path(data), words, given.environments, given.seconds))


if __name__ == "__main__":
    main()
