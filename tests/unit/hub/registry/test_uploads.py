"""Uploads that are slow, too many, or go away: refused with a reason, and nothing of them is kept."""

import asyncio
import json
from collections.abc import Iterable, Iterator

import pytest

from palestra.hub.registry import receive, uploads
from palestra.hub.registry.web import application
from tests.unit.hub.registry.packages import wheel

pytestmark = pytest.mark.slow

START = b'--x\r\ncontent-disposition: form-data; name="content"; filename="palestra_slow-1.0-py3-none-any.whl"\r\n\r\n'


async def upload(
    app, token: str, pieces: Iterable[bytes | asyncio.Event | None], headers: dict[str, str] | None = None
):
    """Status and text. Among the pieces an event: the next comes after it; a None: nothing more comes.

    At the end the client goes away.
    """
    given = {
        "host": "localhost",
        "authorization": f"Bearer {token}",
        "content-type": "multipart/form-data; boundary=x",
        **(headers or {}),
    }
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/alice/legacy/",
        "raw_path": b"",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "client": ("127.0.0.1", 1),
        "server": ("localhost", 80),
    }
    left, said = iter(pieces), []

    async def next_piece():
        piece = next(left, b"")
        if piece is None:
            await asyncio.sleep(60)
        if isinstance(piece, asyncio.Event):
            await piece.wait()
            return await next_piece()
        return {"type": "http.request", "body": piece, "more_body": True} if piece else {"type": "http.disconnect"}

    async def send(message):
        said.append(message)

    await asyncio.wait_for(app(scope, next_piece, send), timeout=30)
    body = b"".join(one.get("body", b"") for one in said)
    return said[0]["status"], json.loads(body)["error"]


async def test_a_client_that_falls_silent_is_not_waited_for(served, monkeypatch):
    monkeypatch.setattr(receive, "_SILENCE_S", 0.1)
    monkeypatch.setattr(uploads, "_LINGER_S", 0.1)
    status, text = await upload(application(served.hub), served.tokens["alice"], [START, b"a" * 1000, None])
    assert (status, "nothing came for 0.1 s" in text) == (408, True)
    assert list(served.hub.settings.incoming.iterdir()) == []


async def test_a_client_that_goes_away_leaves_nothing(served):
    status, text = await upload(application(served.hub), served.tokens["alice"], [START, b"a" * 1000])
    assert (status, "went away" in text) == (408, True)
    assert list(served.hub.settings.incoming.iterdir()) == []


async def test_more_uploads_than_there_are_places_are_told_to_come_again(served, monkeypatch):
    monkeypatch.setattr(uploads, "_LINGER_S", 0.1)
    app, token = application(served.hub), served.tokens["alice"]
    most = served.hub.settings.max_pushes
    num_held, are_held, let = 0, asyncio.Event(), asyncio.Event()

    def pieces() -> Iterator[bytes | asyncio.Event]:
        nonlocal num_held
        yield START
        num_held += 1
        if num_held == most:
            are_held.set()
        yield let

    held = [asyncio.create_task(upload(app, token, pieces())) for _ in range(most)]
    await asyncio.wait_for(are_held.wait(), timeout=30)
    status, text = await upload(app, token, [START])
    assert (status, "come again" in text) == (503, True)
    let.set()  # they go away
    assert {status for status, _ in await asyncio.gather(*held)} == {408}
    assert served.push(wheel()).status_code == 200  # there are places again


async def test_what_is_announced_as_too_large_is_not_read(served, monkeypatch):
    monkeypatch.setattr(uploads, "_LINGER_S", 0.1)
    headers = {"content-length": str(2 << 30)}
    status, text = await upload(application(served.hub), served.tokens["alice"], [None], headers)
    assert (status, text) == (413, f"{2 << 30} bytes; at most {4 << 20} are taken")
    assert list(served.hub.settings.incoming.iterdir()) == []
