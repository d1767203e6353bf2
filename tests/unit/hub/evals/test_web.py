"""Evaluations over HTTP: pages, twins, the client; and archives that should not be taken."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html import unescape
from pathlib import Path

import httpx
import msgspec
import pytest
from sqlalchemy import insert, update

from palestra.core.errors import InfrastructureError
from palestra.core.records import Ending
from palestra.hub.evals import pages, uploads
from palestra.hub.evals.archive import DEFAULT, Limits, pack
from palestra.hub.registry import description, rights, server
from palestra.hub.registry.database import sqlite_url
from palestra.hub.registry.hub import Hub, Settings
from palestra.hub.registry.schema import environments, owners, versions
from palestra.hub.registry.web import application
from tests.unit.hub.evals.made import archive, record, spoiled, told
from tests.unit.hub.test_web import ATTACK, acting

BOARD = "/alice/reverse-text/evaluations"
ZIP = {"content-type": "application/zip"}


class Site:
    """A hub, and somebody's token in every request that `asks` makes."""

    def __init__(self, hub: Hub, tokens: dict[str, str]):
        self.hub, self.tokens = hub, tokens

    @asynccontextmanager
    async def asks(self, person: str = "") -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(application(self.hub), raise_app_exceptions=False)
        headers = {"authorization": f"Bearer {self.tokens[person]}"} if person else {}
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
            yield client

    async def push(self, file: Path, person: str = "bob") -> httpx.Response:
        async with self.asks(person) as client:
            return await client.post(BOARD, content=file.read_bytes(), headers=ZIP)


@pytest.fixture
def site(tmp_path: Path):
    hub = Hub.open(Settings(data=tmp_path / "data"), str(sqlite_url(tmp_path / "hub.db")))
    tokens = {}
    with hub.database.write() as connection:
        for name in ("alice", "bob"):
            made = insert(owners).values(name=name, kind="person", created=1.0).returning(owners.c.id)
            id = connection.execute(made).scalar_one()
            tokens[name] = rights.make_token(connection, id).token
            tokens[f"{name}-reads"] = rights.make_token(connection, id, scope="read").token
        values = {"owner_id": 1, "name": "reverse-text", "visibility": "public", "created": 1.0, "updated": 1.0}
        made = insert(environments).values(**values, project="palestra-reverse-text").returning(environments.c.id)
        id = connection.execute(made).scalar_one()
        connection.execute(insert(versions).values(environment_id=id, version="0.1.0", created=1.0))
    yield Site(hub, tokens)
    hub.close()


async def places(site: Site, tmp_path: Path) -> dict[str, str]:
    """An address of each page, by its path in the table."""
    one = (await site.push(archive(tmp_path / "one.zip"))).json()["id"]
    other = (await site.push(archive(tmp_path / "other.zip", rewards="111100", model="other"))).json()["id"]
    known = {"owner": "alice", "environment": "reverse-text", "evaluation": one, "file": "results", "line": 3}
    query = {f"{BOARD}/compare": f"?one={one}&other={other}"}
    found = {page.path: page.path.format(**known) for page in pages.PAGES}
    return {path: place + query.get(place, "") for path, place in found.items()}


async def test_every_page_has_its_twin_and_is_in_the_document(site: Site, tmp_path: Path):
    document = description.document()
    found = await places(site, tmp_path)
    async with site.asks() as client:
        for page in pages.PAGES:
            path, _, query = found[page.path].partition("?")
            shown, twin = await client.get(f"{path}?{query}"), await client.get(f"{path}.json?{query}")
            assert (shown.status_code, twin.status_code) == (200, 200), shown.text
            msgspec.json.decode(twin.content, type=page.answer)
            assert f"{page.path}.json" in document["paths"]
    assert {f"{one.path}" for one in pages.ACTIONS} < document["paths"].keys()
    names = [of["operationId"] for path in document["paths"].values() for of in path.values()]
    assert len(names) == len(set(names))


async def test_the_leaderboard_says_what_was_counted(site: Site, tmp_path: Path):
    found = await places(site, tmp_path)
    async with site.asks() as client:
        board = unescape((await client.get(BOARD)).text)
        one = unescape((await client.get(found[f"{pages.HOME}/{{evaluation}}"])).text)
        compared = unescape((await client.get(found[f"{pages.HOME}/compare"])).text)
        rollout = unescape((await client.get(found[f"{pages.HOME}/{{evaluation}}/rollouts/{{file}}/{{line}}"])).text)
    assert board.index(">other</a>") < board.index(">backwards</a>"), "the best first"
    assert "0.667" in board
    assert "--model backwards -n 3 -r 2 --temperature 1" in one
    assert "http://localhost/alice/reverse-text/simple/ palestra-reverse-text==0.1.0" in one
    assert "No difference is proved" in compared
    assert "1drow" in rollout
    assert f'href="{BOARD}"' in board


async def test_a_push_needs_a_token_that_may_write(site: Site, tmp_path: Path):
    content = archive(tmp_path / "a.zip").read_bytes()
    for person, status in (("", 401), ("bob-reads", 403), ("bob", 200), ("alice", 200)):
        async with site.asks(person) as client:
            answer = await client.post(BOARD, content=content, headers=ZIP)
        assert answer.status_code == status, answer.text
    async with site.asks("bob") as client:
        assert (await client.post("/alice/nothing/evaluations", content=content, headers=ZIP)).status_code == 404
        assert (await client.post(BOARD, content=content)).status_code == 400
    with site.hub.database.write() as connection:
        connection.execute(update(environments).values(visibility="private"))
    async with site.asks("bob") as client:
        private = await client.post(BOARD, content=content, headers=ZIP)
        nothing = await client.post("/alice/nothing/evaluations", content=content, headers=ZIP)
    assert (private.status_code, nothing.status_code) == (404, 404)
    assert private.json()["error"] == nothing.json()["error"].replace("nothing", "reverse-text")


async def test_of_a_private_environment_no_page_tells_whether_it_is_there(site: Site, tmp_path: Path):
    found = await places(site, tmp_path)
    with site.hub.database.write() as connection:
        connection.execute(update(environments).values(visibility="private"))
    for person, status in (("", 404), ("bob", 404), ("alice", 200)):
        async with site.asks(person) as client:
            for place in found.values():
                assert (await client.get(place)).status_code == status, place


async def test_a_cookie_alone_pushes_nothing(site: Site, tmp_path: Path):
    async with site.asks() as client:
        await client.post("/api/login", json={"token": site.tokens["bob"]})
        answer = await client.post(BOARD, content=archive(tmp_path / "a.zip").read_bytes(), headers=ZIP)
    assert answer.status_code == 401


async def test_what_is_too_large_is_refused_before_it_is_read_and_while_it_comes(site: Site, monkeypatch):
    monkeypatch.setattr(uploads, "DEFAULT", Limits(archive_bytes=1000))
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(20):
            sent += 1
            yield bytes(500)

    async with site.asks("bob") as client:
        announced = await client.post(BOARD, content=bytes(2000), headers=ZIP)
        unannounced = await client.post(BOARD, content=pieces(), headers=ZIP)
    assert (announced.status_code, unannounced.status_code) == (413, 413)
    assert list(site.hub.settings.incoming.iterdir()) == []
    assert list(site.hub.blobs.names()) == []


async def test_a_client_that_says_nothing_is_let_go(site: Site, monkeypatch):
    monkeypatch.setattr(uploads, "_SILENCE_S", 0.2)

    async def pieces() -> AsyncIterator[bytes]:
        import asyncio

        yield b"PK"
        await asyncio.sleep(60.0)
        yield b"more"

    async with site.asks("bob") as client:
        answer = await client.post(BOARD, content=pieces(), headers=ZIP)
    assert answer.status_code == 408
    assert list(site.hub.settings.incoming.iterdir()) == []


@pytest.mark.parametrize(
    ("lines", "said"),
    [(lambda rows: rows[1:], "has 5 rollouts"), (lambda rows: b"x\n", "is no rollout")],
)
async def test_what_is_wrong_with_an_archive_is_said(site: Site, tmp_path: Path, lines, said):
    answer = await site.push(spoiled(tmp_path / "a.zip", lines=lines))
    assert answer.status_code == 400
    assert said in answer.json()["error"]


@pytest.mark.parametrize(
    "place",
    [
        f"{BOARD}?page=0",
        f"{BOARD}?sort=best",
        f"{BOARD}/compare?one=x&other=y",
        f"{BOARD}/compare",
        f"{BOARD}?model={'x' * 600}",
    ],
)
async def test_questions_that_cannot_be_are_refused_in_words(site: Site, place: str):
    async with site.asks() as client:
        assert (await client.get(place)).status_code == 400
    async with site.asks() as client:
        path, _, query = place.partition("?")
        assert "error" in (await client.get(f"{path}.json?{query}")).json()


@pytest.mark.parametrize("rest", ["/0", f"/{'f' * 32}", "/%2e%2e%2f%2e%2e", "/x/rollouts", "/x/rollouts/results/0"])
async def test_what_is_not_there_is_not_found(site: Site, rest: str):
    async with site.asks() as client:
        assert (await client.get(BOARD + rest)).status_code == 404


async def test_rollouts_that_are_not_there_are_not_found(site: Site, tmp_path: Path):
    id = (await site.push(archive(tmp_path / "a.zip"))).json()["id"]
    async with site.asks() as client:
        for rest in ("results/6", "results/-1", "means/0", "%2e%2e/0", "results/x"):
            assert (await client.get(f"{BOARD}/{id}/rollouts/{rest}")).status_code == 404, rest
        assert (await client.get(f"{BOARD}/{id}/rollouts?after=nonsense")).status_code == 400


async def test_what_is_in_an_evaluation_is_text(site: Site, tmp_path: Path):
    """Everywhere that something of it is shown: settings, names, messages, errors, keys of tasks."""
    said = told(
        name=ATTACK,
        model=ATTACK,
        endpoint=ATTACK,
        split=ATTACK,
        args={ATTACK: ATTACK},
        missing=[ATTACK],
        num_tasks=2,
        seats={ATTACK: {"url": ATTACK, "model": ATTACK}},
        sandbox=ATTACK,
    )
    made = [record(number, float(number % 2)) for number in range(4)]
    task = msgspec.structs.replace(made[0].task, key=ATTACK, prompt=ATTACK)
    message = {"role": ATTACK, "content": ATTACK, "name": ATTACK}
    hostile = [msgspec.structs.replace(one, task=task, messages=[message]) for one in made[:2]]
    hostile[0] = msgspec.structs.replace(hostile[0], ending=Ending.INVALID, error=ATTACK, reward=0.0, rewards={})
    pack(said, hostile + made[2:], tmp_path / "a.zip")
    id = (await site.push(tmp_path / "a.zip")).json()["id"]
    async with site.asks() as client:
        shown = {
            rest: (await client.get(f"{BOARD}{rest}")).text
            for rest in (
                "",
                f"/{id}",
                f"/{id}/rollouts",
                f"/{id}/rollouts/results/0",
                f"/{id}/rollouts/results/1",
                f"/compare?one={id}&other={id}",
            )
        }
    for rest, text in shown.items():
        assert acting(text) == [], rest
        assert ATTACK in unescape(text), f"the control: {rest} shows it"


def test_the_client_pushes_lists_compares_and_deletes(site: Site, tmp_path: Path):
    """Over a real socket, as `palestra hub push-eval` does."""
    import uvicorn

    from palestra.hub.client import Client

    server = uvicorn.Server(uvicorn.Config(application(site.hub), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with Client(f"http://127.0.0.1:{port}", token=site.tokens["bob"]) as client:
            one = client.push_evaluation("alice", "reverse-text", archive(tmp_path / "a.zip"))
            again = client.push_evaluation("alice", "reverse-text", tmp_path / "a.zip")
            other = client.push_evaluation("alice", "reverse-text", archive(tmp_path / "b.zip", rewards="111111"))
            assert (one.is_new, again.is_new, again.id == one.id) == (True, False, True)
            assert [row.id for row in client.evaluations("alice", "reverse-text")] == [other.id, one.id]
            compared = client.compare_evaluations("alice", "reverse-text", one.id, other.id)
            assert compared.difference.value == pytest.approx(0.5)
            assert client.evaluation("alice", "reverse-text", one.id).told["seed"] == 0
            client.delete_evaluation("alice", "reverse-text", one.id)
            assert [row.id for row in client.evaluations("alice", "reverse-text", sort="newest")] == [other.id]
    finally:
        server.should_exit = True
        thread.join(60)
    with pytest.raises(InfrastructureError), Client(f"http://127.0.0.1:{port}") as client:
        list(client.evaluations("alice", "reverse-text"))


async def test_an_evaluation_that_takes_too_long_to_look_through_is_asked_to_come_again(site, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "_CHECK_S", 0.05)
    let = threading.Event()
    monkeypatch.setattr(uploads.board, "push", lambda *_: let.wait(60))
    try:
        answer = await site.push(archive(tmp_path / "a.zip"))
    finally:
        let.set()
    assert (answer.status_code, "to be looked through" in answer.text) == (503, True)


@pytest.mark.parametrize("upload_bytes", [1 << 20, 1 << 40])
def test_the_hub_takes_bodies_as_long_as_its_longest(tmp_path, upload_bytes):
    """What is bounded more tightly is so by its own route."""
    most = server.longest_body(Settings(data=tmp_path, max_upload_bytes=upload_bytes))
    assert most >= DEFAULT.archive_bytes
    assert most > upload_bytes
