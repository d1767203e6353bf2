"""Hubs as they are started: several on one database, examined pushes, an end in order, copies."""

import contextlib
import json
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.hubs import Running, running
from tests.unit.hub.trust.pushed import SOUND, wheel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WAIT_S = 240.0


def ended(hub: Running, version: str) -> str:
    end = time.monotonic() + WAIT_S
    with hub.client() as client:
        while time.monotonic() < end:
            row = client.checked("hub-admin", "echo", version)
            if row is not None and row.status not in ("waiting", "running"):
                return row.status
            time.sleep(0.3)
    raise AssertionError("the check did not end")


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.05)


def listens(hub: Running) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(hub.url.rsplit(":", 1)[1]))) == 0


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_two_servers_on_one_database(tmp_path: Path, kind: str, request: pytest.FixtureRequest):
    """What is pushed to one is examined by the other, and both tell."""
    data, to = tmp_path / "data", []
    if kind == "postgresql":
        to = ["--database", request.getfixturevalue("postgresql").empty()]
    with running(data, *to) as one, running(data, *to, token=one.token, is_checking=True) as other:
        with one.client() as client:
            client.push("hub-admin", wheel(tmp_path))
        assert ended(one, "0.1.0") == "passed"
        with other.client() as client:
            row = client.checked("hub-admin", "echo", "0.1.0")
            assert row is not None
            assert "echo: passed: gold scores 1" in client.check_of("hub-admin", "echo", row.id).log
            assert client.environment("hub-admin", "echo").badges == {"0.1.0": "passed"}
        assert "✓ checked" in httpx.get(f"{other.url}/hub-admin/echo/checks", timeout=WAIT_S).text
        assert httpx.get(f"{one.url}/ready", timeout=WAIT_S).json() == {"status": "ok"}
        assert 'palestra_hub_checks{status="passed"} 1.0' in httpx.get(f"{one.url}/metrics", timeout=WAIT_S).text
        rows = [json.loads(line) for line in one.log.read_text().splitlines() if line.startswith("{")]
        assert {"request_id", "status", "ms"} <= rows[0].keys()
        assert one.token not in "".join(map(json.dumps, rows))


def test_the_commands_of_who_keeps_a_hub(tmp_path: Path):
    """A copy of a running hub is another hub; a law that does not hold is told."""
    bad = SOUND.replace("rollout.reply == task.answer", "0.5")
    with running(tmp_path / "data", is_checking=True) as hub:
        with hub.client() as client:
            client.push("hub-admin", wheel(tmp_path, bad))
        hub.environ["PALESTRA_HUB_TOKEN"] = hub.token
        told = hub.palestra("hub", "check", "hub-admin/echo", "--hub", hub.url)
        assert told.returncode == 2, told.stderr
        assert "failed: gold scores 1" in told.stdout
        assert told.stderr.rstrip().endswith(": failed")
        copied = hub.palestra("hub", "backup", str(tmp_path / "copy"), "--data", str(hub.data))
        assert copied.returncode == 0, copied.stderr
        restored = hub.palestra("hub", "restore", str(tmp_path / "copy"), "--data", str(tmp_path / "new"))
        assert restored.returncode == 0, restored.stderr
    with running(tmp_path / "new", token=hub.token) as new, new.client() as client:
        assert client.environment("hub-admin", "echo").badges == {"0.1.0": "failed"}
        file = client.environment("hub-admin", "echo").versions[0].files[0]
        assert httpx.get(f"{new.url}{file.url}", timeout=WAIT_S).content == (tmp_path / file.filename).read_bytes()


def test_a_hub_that_is_told_to_end_answers_what_it_was_asked(tmp_path: Path):
    """An upload of which half came before the signal is taken; who asks then is refused; nothing is left running."""
    with running(tmp_path / "data", "--drain-s", "6") as hub, httpx.Client(timeout=WAIT_S) as asking:
        body = _upload(wheel(tmp_path))
        with socket.create_connection(("127.0.0.1", int(hub.url.rsplit(":", 1)[1])), timeout=WAIT_S) as upload:
            head = (
                "POST /hub-admin/legacy/ HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
                f"Authorization: Bearer {hub.token}\r\nContent-Type: multipart/form-data; boundary=x\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            upload.sendall(head.encode() + body[: len(body) // 2])
            until(lambda: any((hub.data / "incoming").glob("*")), "the upload to begin")

            def ask(page: str) -> int:
                return asking.get(f"{hub.url}/{page}", headers={"Connection": "close"}).status_code

            hub.process.send_signal(signal.SIGTERM)
            until(lambda: ask("ready") == 503, "the hub to be told")
            assert ask("environments.json") == 200
            until(lambda: not listens(hub), "the hub to listen no more")
            assert hub.process.poll() is None
            upload.sendall(body[len(body) // 2 :])
            answer = b""
            with contextlib.suppress(ConnectionError):
                while piece := upload.recv(65536):
                    answer += piece
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert hub.process.wait(timeout=WAIT_S) == 0
    with running(tmp_path / "data", token=hub.token) as again, again.client() as client:
        assert client.environment("hub-admin", "echo").version == "0.1.0"


def _upload(file: Path) -> bytes:
    parts = [
        b'--x\r\nContent-Disposition: form-data; name=":action"\r\n\r\nfile_upload\r\n',
        f'--x\r\nContent-Disposition: form-data; name="content"; filename="{file.name}"\r\n\r\n'.encode(),
        file.read_bytes(),
        b"\r\n--x--\r\n",
    ]
    return b"".join(parts)
