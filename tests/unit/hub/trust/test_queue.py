"""Rows are examined once, by whoever lives; of whoever died another takes over."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import insert, select, update

from palestra import __version__
from palestra.env.case import Case
from palestra.hub.registry.database import Database
from palestra.hub.registry.hub import Hub, Settings
from palestra.hub.registry.schema import checks, environments, owners, versions
from palestra.hub.trust import queue
from palestra.hub.trust.verdict import Status, Verdict
from palestra.hub.trust.worker import Worker

PASSED = Verdict(status=Status.PASSED, cases={"echo": [Case(name="gold scores 1", ending="passed")]}, log="it held")


@pytest.fixture
def hub(database_url: str, tmp_path: Path) -> Iterator[Hub]:
    opened = Hub.open(Settings(data=tmp_path / "data"), database_url)
    with opened.database.write() as connection:
        connection.execute(insert(owners).values(name="alice", kind="person", created=1.0))
        connection.execute(
            insert(environments).values(owner_id=1, name="echo", visibility="public", created=1.0, updated=1.0)
        )
        rows = [{"environment_id": 1, "version": f"0.{i}", "created": 1.0, "yanked": i == 9} for i in range(10)]
        connection.execute(insert(versions), rows)
    yield opened
    opened.close()


def statuses(database: Database) -> dict[int, str]:
    with database.read() as connection:
        return {row.version_id: row.status for row in connection.execute(select(checks))}


def test_what_is_missing_is_queued_once_for_each_library(hub: Hub):
    assert queue.enqueue_missing(hub.database, "1.0") == 9  # not the yanked one
    assert queue.enqueue_missing(hub.database, "1.0") == 0
    assert queue.enqueue_missing(hub.database, "1.1") == 9
    assert queue.counts(hub.database)["waiting"] == 18


def test_many_workers_claim_each_row_once(hub: Hub):
    queue.enqueue_missing(hub.database, "1.0")
    claimed: list[int] = []

    def work(name: str) -> None:
        while (job := queue.claim(hub.database, name, "1.0")) is not None:
            claimed.append(job.id)
            assert queue.finish(hub.database, job, PASSED, "")

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(claimed) == sorted(set(claimed))
    assert len(claimed) == 9
    assert set(statuses(hub.database).values()) == {"passed"}


def run_out(database: Database) -> None:
    with database.write() as connection:
        connection.execute(update(checks).values(claimed_until=time.time() - 1))


def test_of_a_dead_worker_another_takes_over_and_the_dead_one_changes_nothing(hub: Hub):
    with hub.database.write() as connection:
        queue.enqueue(connection, 1, "1.0")
    dead = queue.claim(hub.database, "dead", "1.0")
    assert dead is not None
    assert queue.claim(hub.database, "other", "1.0") is None  # the control: its time is not over
    assert queue.renew(hub.database, dead)
    run_out(hub.database)
    other = queue.claim(hub.database, "other", "1.0")
    assert other is not None
    assert (other.id, other.attempt) == (dead.id, 2)
    failed = Verdict(status=Status.FAILED)
    assert not queue.finish(hub.database, dead, failed, "")
    assert not queue.renew(hub.database, dead)
    assert queue.finish(hub.database, other, PASSED, "")
    assert statuses(hub.database) == {1: "passed"}


def test_what_kills_its_workers_is_given_up(hub: Hub):
    with hub.database.write() as connection:
        queue.enqueue(connection, 1, "1.0")
    for _ in range(queue.MOST_ATTEMPTS):
        assert queue.claim(hub.database, "dies", "1.0") is not None
        run_out(hub.database)
    assert queue.claim(hub.database, "dies", "1.0") is None
    assert statuses(hub.database) == {1: "error"}


def test_a_worker_takes_what_its_library_is_for(hub: Hub):
    with hub.database.write() as connection:
        queue.enqueue(connection, 1, "2.0")
    assert queue.claim(hub.database, "old", "1.0") is None


async def test_a_worker_notes_verdict_and_log(hub: Hub):
    with hub.database.write() as connection:
        queue.enqueue(connection, 1, __version__)

    async def examined(files: list[Path]) -> Verdict:
        assert files == []
        return PASSED

    worker = Worker(hub, examined)
    assert await worker.do_one()
    assert not await worker.do_one()
    with hub.database.read() as connection:
        row = connection.execute(select(checks)).one()
    assert (row.status, msgspec.json.decode(row.result)["cases"]["echo"][0]["ending"]) == ("passed", "passed")
    with hub.blobs.open(row.log_sha256) as content:
        assert content.read() == b"it held"
    assert row.log_sha256 in hub.named_blobs()


async def test_a_failure_of_the_machine_is_tried_again_and_then_told(hub: Hub):
    with hub.database.write() as connection:
        queue.enqueue(connection, 1, __version__)

    async def broken(_: list[Path]) -> Verdict:
        raise OSError("no space left")

    worker = Worker(hub, broken)
    for _ in range(queue.MOST_ATTEMPTS):
        assert await worker.do_one()
        assert statuses(hub.database) == {1: "waiting"}
    assert not await worker.do_one()
    assert statuses(hub.database) == {1: "error"}


async def test_a_worker_that_is_told_to_end_gives_back_what_it_had(hub: Hub):
    with hub.database.write() as connection:
        queue.enqueue(connection, 1, __version__)
    began = asyncio.Event()

    async def long(_: list[Path]) -> Verdict:
        began.set()
        await asyncio.sleep(60)
        return PASSED

    async with Worker(hub, long).at_work():
        await asyncio.wait_for(began.wait(), 60)
        assert statuses(hub.database) == {1: "running"}
    assert statuses(hub.database) == {1: "waiting"}


class Noting(Worker):
    """Notes that it has looked and found nothing to do."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.is_idle = asyncio.Event()

    async def do_one(self) -> bool:
        found = await super().do_one()
        if not found:
            self.is_idle.set()
        return found


async def test_a_push_wakes_the_worker(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("palestra.hub.trust.worker.LOOK_S", 1000)
    ended = asyncio.Event()

    async def examined(_: list[Path]) -> Verdict:
        ended.set()
        return PASSED

    worker = Noting(hub, examined)
    async with worker.at_work():
        await asyncio.wait_for(worker.is_idle.wait(), 60)
        with hub.database.write() as connection:
            queue.enqueue(connection, 1, __version__)
        await asyncio.to_thread(worker.wake)
        await asyncio.wait_for(ended.wait(), 60)
