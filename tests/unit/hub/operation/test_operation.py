"""Health, readiness, metrics and logs; an orderly end."""

import asyncio
import base64
import io
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from palestra.hub.operation.limits import Bounds
from palestra.hub.operation.logs import JsonLines, redacted
from palestra.hub.operation.operation import Operation
from palestra.hub.registry.blobs import Directory
from palestra.hub.registry.database import Database, sqlite_url

TOKEN = "palestra_0123456789abAbCdEfGhIjKlMnOpQrStUvWxYz012345"


@pytest.fixture
def operation(tmp_path: Path) -> Iterator[Operation]:
    database = Database(sqlite_url(tmp_path / "hub.db"))
    database.migrate()
    made = Operation(
        database, Directory(tmp_path / "blobs"), Bounds(), num_waiting=lambda: {"waiting": 3, "running": 1}
    )
    yield made
    made.close()
    database.close()


@pytest.fixture
def said() -> Iterator[io.StringIO]:
    """The log, as it is written."""
    stream, logger = io.StringIO(), logging.getLogger("palestra.hub")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(level)


def client(operation: Operation) -> httpx.AsyncClient:
    async def thing(request: Request) -> Response:
        return PlainTextResponse(request.path_params["name"])

    async def broken(_: Request) -> Response:
        raise RuntimeError(f"it broke with {TOKEN}")

    routes = [*operation.routes, Route("/things/{name}", thing), Route("/broken", broken)]
    app = operation.around(Starlette(routes=routes))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://hub")


async def numbers(asking: httpx.AsyncClient) -> dict[tuple, float]:
    text = (await asking.get("/metrics")).text
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_ready_says_which_part_does_not_answer(operation: Operation):
    async with client(operation) as asking:
        assert (await asking.get("/ready")).json() == {"status": "ok"}
        operation.readiness._parts["blobs"] = lambda: (_ for _ in ()).throw(OSError("the bucket is gone"))
        answer = await asking.get("/ready")
        assert (answer.status_code, answer.json()) == (503, {"status": "failing", "blobs": "failing"})
        assert (await asking.get("/health")).status_code == 200


async def test_a_part_that_hangs_is_not_waited_for(operation: Operation, monkeypatch: pytest.MonkeyPatch):
    let, ended = threading.Event(), threading.Event()
    monkeypatch.setattr("palestra.hub.operation.ready._DEADLINE_S", 0.1)
    operation.readiness._parts["blobs"] = lambda: (let.wait(60), ended.set())
    try:
        async with client(operation) as asking:
            answer = await asyncio.wait_for(asking.get("/ready"), 30)
        assert not ended.is_set()
    finally:
        let.set()
    assert (answer.status_code, answer.json()["blobs"]) == (503, "failing")


async def test_a_hub_that_ends_is_not_ready_and_still_answers(operation: Operation):
    operation.drain()
    async with client(operation) as asking:
        assert (await asking.get("/ready")).status_code == 503
        assert (await asking.get("/things/a")).status_code == 200


async def test_metrics_count_what_was_asked_by_route(operation: Operation):
    async with client(operation) as asking:
        for name in ("a", "b", "c"):
            await asking.get(f"/things/{name}?secret=1")
        for number in range(20):
            await asking.get(f"/nowhere/{number}")
        found = await numbers(asking)
    labels = (("method", "GET"), ("route", "/things/{name}"))
    assert found[("palestra_hub_requests_total", *labels, ("status", "200"))] == 3
    assert found[("palestra_hub_request_seconds_count", *labels)] == 3
    assert found[("palestra_hub_requests_total", ("method", "GET"), ("route", "none"), ("status", "404"))] == 20
    assert found[("palestra_hub_checks", ("status", "waiting"))] == 3
    assert found[("palestra_hub_requests_open",)] == 1  # this one
    assert len({row for row in found if row[0] == "palestra_hub_requests_total"}) <= 3


async def test_every_request_has_an_id_and_a_line(operation: Operation, said: io.StringIO):
    async with client(operation) as asking:
        given = await asking.get("/things/a?b=c", headers={"x-request-id": "from-proxy-7"})
        made = await asking.get("/things/b", headers={"x-request-id": "no id " + "x" * 100})
        await asking.get("/health")
    assert given.headers["x-request-id"] == "from-proxy-7"
    assert len(made.headers["x-request-id"]) == 16
    rows = [json.loads(line) for line in said.getvalue().splitlines()]
    assert [(row["request_id"], row["path"], row["status"], row["bytes"]) for row in rows] == [
        ("from-proxy-7", "/things/a", 200, 1),
        (made.headers["x-request-id"], "/things/b", 200, 1),
    ]


@pytest.mark.parametrize("place", ["header", "query", "path", "basic", "error"])
async def test_no_line_has_a_token(operation: Operation, said: io.StringIO, place: str):
    basic = base64.b64encode(f"__token__:{TOKEN}".encode()).decode()
    async with client(operation) as asking:
        ask = {
            "header": lambda: asking.get("/things/a", headers={"authorization": f"Bearer {TOKEN}"}),
            "query": lambda: asking.get(f"/things/a?token={TOKEN}"),
            "path": lambda: asking.get(f"/things/{TOKEN}"),
            "basic": lambda: asking.get("/things/a", headers={"authorization": f"Basic {basic}"}),
            "error": lambda: asking.get("/broken"),
        }
        assert (await ask[place]()).status_code == (500 if place == "error" else 200)
    rows = [json.loads(line) for line in said.getvalue().splitlines()]
    assert len(rows) == (2 if place == "error" else 1)
    assert len({row["request_id"] for row in rows}) == 1
    assert TOKEN[20:] not in said.getvalue()
    assert basic not in said.getvalue()
    if place == "error":
        assert "it broke with [redacted]" in rows[0]["traceback"]


def test_what_is_secret_is_struck_out_and_nothing_else():
    assert redacted("palestra_hub_requests of palestra-wordle") == "palestra_hub_requests of palestra-wordle"
    assert redacted("postgresql://bob:hunter2@db/hub") == "postgresql://[redacted]@db/hub"
    assert redacted("Authorization: Bearer abcdef123") == "Authorization: [redacted]"
    assert redacted("GET /alice/wordle/simple/") == "GET /alice/wordle/simple/"
