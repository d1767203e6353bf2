"""kill -9 during a push: the hub has the old state or the new one, and what was left over is swept away."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import select

from palestra.hub.registry import actions, publish, rights
from palestra.hub.registry.blobs import received
from palestra.hub.registry.hub import Hub, Settings
from palestra.hub.registry.publish import Wish
from palestra.hub.registry.rights import ANYBODY
from palestra.hub.registry.schema import files
from palestra.hub.registry.schema import versions as table
from tests.hubs import running
from tests.unit.hub.registry.packages import wheel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

POINTS = {  # where it dies, and whether the version is there afterwards
    "blobs.Incoming.received": False,  # the upload is on disk, half-way to its place
    "artefact.read": False,
    "blobs.Directory.put": False,  # the metadata is a blob, the file is not
    "publish._commit": False,  # both are blobs; no row
    "publish._version_id": False,  # within the transaction
    "publish.refresh": False,
    "audit.record": False,
    "publish.Pushed": True,  # committed, but nobody was told
}
DYING = """
import os, signal, sys
from pathlib import Path
from palestra.hub.registry import artefact, audit, blobs, publish, rights
from palestra.hub.registry.database import Database
from palestra.hub.registry.hub import Hub, Settings

data, url, token, file, point = sys.argv[1:]
*owner, name = point.split(".")
place = {"artefact": artefact, "audit": audit, "blobs": blobs, "publish": publish}[owner[0]]
for part in owner[1:]:
    place = getattr(place, part)
calls = []

def die(*_, **__):
    calls.append(1)
    if point != "blobs.Directory.put" or len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*_, **__)

real = getattr(place, name)
setattr(place, name, die)
hub = Hub(Database(url), blobs.Directory(Path(data) / "blobs"), Settings(data=Path(data)))
with hub.database.read() as connection:
    who = rights.who_has(connection, token)
with blobs.received([Path(file).read_bytes()], hub.settings.incoming, 1 << 20) as arrived:
    publish.push(hub, who, publish.Wish("alice", "", Path(file).name), arrived)
"""


def versions(hub: Hub) -> list[str]:
    """What the index shows; every blob that it names is whole."""
    with hub.database.read() as connection:
        for row in connection.execute(select(files)):
            with hub.blobs.open(row.sha256) as content:
                assert hashlib.sha256(content.read()).hexdigest() == row.sha256
            with hub.blobs.open(row.metadata_sha256) as content:
                assert hashlib.sha256(content.read()).hexdigest() == row.metadata_sha256
        found = select(table.c.version).join(files, files.c.version_id == table.c.id)
        shown = connection.execute(found.order_by(table.c.id)).scalars().all()
        assert connection.execute(select(table.c.version).order_by(table.c.id)).scalars().all() == shown
    return list(shown)


@pytest.mark.parametrize("point", POINTS)
def test_a_push_that_is_killed_leaves_the_old_state_or_the_new(tmp_path: Path, database_url: str, point: str):
    settings = Settings(data=tmp_path / "data")
    hub = Hub.open(settings, database_url)
    with hub.database.write() as connection:
        alice = actions.add_owner(connection, ANYBODY, "alice", "person")
        token = rights.make_token(connection, alice).token
        who = rights.who_has(connection, token)

    def push(made: tuple[str, bytes]) -> None:
        with received([made[1]], settings.incoming, 1 << 20) as arrived:
            publish.push(hub, who, Wish("alice", "", made[0]), arrived)

    push(wheel(version="1.0"))
    name, content = wheel(version="1.1")
    (tmp_path / name).write_bytes(content)
    arguments = [str(settings.data), database_url, token, str(tmp_path / name), point]
    died = subprocess.run([sys.executable, "-c", DYING, *arguments], capture_output=True, text=True, timeout=60)
    assert died.returncode == -signal.SIGKILL, died.stderr

    was_kept = POINTS[point]
    assert versions(hub) == (["1.0", "1.1"] if was_kept else ["1.0"])
    hub.sweep(blobs_older_than_s=-1, incoming_older_than_s=-1)
    assert list(settings.incoming.iterdir()) == []
    assert {name for name, _ in hub.blobs.names()} == hub.named_blobs()
    assert len(hub.named_blobs()) == (4 if was_kept else 2)
    push((name, content))
    assert versions(hub) == ["1.0", "1.1"]
    hub.close()


def test_a_hub_that_is_killed_during_an_upload_starts_again_without_its_rest(tmp_path: Path):
    data = tmp_path / "hub"
    name, content = wheel("palestra-torn")
    with running(data) as hub:
        host, port = hub.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            head = (
                f"POST /hub-admin/legacy/ HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {hub.token}\r\n"
                "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 5000000\r\n\r\n--x\r\n"
                f'content-disposition: form-data; name="content"; filename="{name}"\r\n\r\n'
            )
            connection.sendall(head.encode() + content + bytes(3_000_000))
            _until(lambda: any(file.stat().st_size for file in (data / "incoming").iterdir()))
            hub.process.kill()
            hub.process.wait(timeout=20)
    (left,) = (data / "incoming").iterdir()
    os.utime(left, (1, 1))
    with running(data, token=hub.token) as hub, hub.client() as client:
        assert list((data / "incoming").iterdir()) == []
        assert list(client.environments()) == []
        (tmp_path / name).write_bytes(content)
        assert client.push("hub-admin", tmp_path / name).is_new


def _until(holds) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
