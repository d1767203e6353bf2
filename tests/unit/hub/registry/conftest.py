"""A hub on every kind of database, and a client of it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from palestra.hub.registry import actions, rights
from palestra.hub.registry.hub import Hub, Settings
from palestra.hub.registry.rights import ANYBODY
from palestra.hub.registry.web import application


@dataclass
class Served:
    """`alice` and `bob` are persons, `root` administrates the hub; each has a token of scope admin."""

    hub: Hub
    http: TestClient
    tokens: dict[str, str] = field(default_factory=dict)

    def as_(self, name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.tokens[name]}"} if name else {}

    def get(self, path: str, name: str = "", /, **more) -> httpx.Response:
        headers = self.as_(name) | more.pop("headers", {})
        return self.http.get(path, headers=headers, follow_redirects=False, **more)

    def tell(self, path: str, name: str = "", /, **body) -> httpx.Response:
        return self.http.post(path, json=body, headers=self.as_(name))

    def push(self, made: tuple[str, bytes], name: str = "alice", /, *, to: str = "", **fields) -> httpx.Response:
        data = {":action": "file_upload", "protocol_version": "1", **fields}
        place = f"/{to or name}/legacy/"
        return self.http.post(place, data=data, files={"content": made}, headers=self.as_(name))

    def versions(self, path: str, name: str = "") -> list[str]:
        return [one["version"] for one in self.get(f"{path}.json", name).json()["versions"]]


@pytest.fixture
def served(database_url: str, tmp_path: Path) -> Iterator[Served]:
    hub = Hub.open(Settings(data=tmp_path / "data", max_upload_bytes=4 << 20), database_url)
    with TestClient(application(hub), base_url="http://localhost", raise_server_exceptions=True) as http:
        found = Served(hub, http)
        with hub.database.write() as connection:
            for name in ("root", "alice", "bob"):
                id = actions.add_owner(connection, ANYBODY, name, "person", is_admin=name == "root")
                found.tokens[name] = rights.make_token(connection, id, scope="admin").token
        yield found
    hub.close()
