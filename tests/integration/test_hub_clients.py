"""A hub as it is started, and its real clients: pip, uv, twine, `uv publish`, and the commands of palestra."""

import asyncio
import hashlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from palestra.hub.asking import RefusedError
from tests.hubs import Running, running
from tests.unit.hub.registry.packages import sdist, wheel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

SCRIPTS = Path(sys.executable).parent
REFUSED_S = 20.0


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("hub"), "--max-upload-mb", "8") as found:
        yield found


@pytest.fixture(scope="module")
def alice(hub: Running) -> str:
    """A token of hers."""
    with hub.client() as client:
        client.new_owner("alice", kind="person")
        return client.new_token(person="alice", scope="admin").token


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The Python of a fresh virtual environment without pip."""
    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True, timeout=60)
    return place / "bin" / "python"


def push(hub: Running, token: str, directory: Path, *made: tuple[str, bytes], is_private: bool = False) -> list[Path]:
    files = []
    with hub.client(token) as client:
        for name, content in made:
            files.append(directory / name)
            files[-1].write_bytes(content)
            client.push("alice", files[-1], is_private=is_private)
    return files


class Pip:
    """Installs by pip into another Python."""

    def __init__(self, python: Path):
        self.python = python

    def install(self, index: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "--no-input", "--isolated", "install"]
        return self._run([*command, "--disable-pip-version-check", "--no-cache-dir", "--index-url", index, *words])

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL)

    def version(self, module: str) -> str:
        code = f"import {module}; print({module}.VERSION)"
        done = subprocess.run([str(self.python), "-c", code], capture_output=True, text=True, timeout=30)
        return done.stdout.strip()


class Uv(Pip):
    def install(self, index: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [str(SCRIPTS / "uv"), "pip", "install", "--no-config", "--no-cache", "--python", str(self.python)]
        return self._run([*command, "--index-url", index, *words])


@pytest.mark.parametrize("installer", [Pip, Uv])
def test_a_private_environment_is_installed_with_a_token_upgraded_and_refused_without(
    hub, alice, tmp_path, python, installer
):
    name = f"palestra-{installer.__name__.lower()}-life"
    module = name.replace("-", "_")
    index = f"/alice/{name.removeprefix('palestra-')}/simple/"
    with_token, without = hub.with_token(alice) + index, hub.url + index
    push(hub, alice, tmp_path, wheel(name, "1.0"), is_private=True)
    tool = installer(python)
    assert tool.install(without, name).returncode != 0
    assert tool.install(hub.with_token("palestra_wrong") + index, name).returncode != 0
    assert tool.version(module) == ""
    done = tool.install(with_token, name)
    assert done.returncode == 0, done.stderr
    assert tool.version(module) == "1.0"

    push(hub, alice, tmp_path, wheel(name, "1.1"), wheel(name, "1.2"))
    tool.install(with_token, name)
    assert tool.version(module) == "1.0"  # nothing is upgraded that was not asked for
    with hub.client(alice) as client:
        client.yank("alice", name.removeprefix("palestra-"), "1.2", reason="broken")
    assert tool.install(with_token, "--upgrade", name).returncode == 0
    assert tool.version(module) == "1.1"  # not the yanked one
    assert tool.install(with_token, f"{name}==1.2").returncode == 0
    assert tool.version(module) == "1.2"  # but when it is named exactly


@pytest.mark.parametrize("installer", [Pip, Uv])
def test_hashes_are_honoured(hub, alice, tmp_path, python, installer):
    name = f"palestra-{installer.__name__.lower()}-hash"
    made = wheel(name, "1.0")
    push(hub, alice, tmp_path, made)
    index = f"{hub.url}/alice/{name.removeprefix('palestra-')}/simple/"
    tool, file = installer(python), tmp_path / "requirements.txt"
    file.write_text(f"{name}==1.0 --hash=sha256:{'0' * 64}\n")
    assert tool.install(index, "--require-hashes", "-r", str(file)).returncode != 0
    file.write_text(f"{name}==1.0 --hash=sha256:{hashlib.sha256(made[1]).hexdigest()}\n")
    done = tool.install(index, "--require-hashes", "-r", str(file))
    assert done.returncode == 0, done.stderr
    assert tool.version(name.replace("-", "_")) == "1.0"


def test_uv_leaves_out_what_was_uploaded_later(hub, alice, tmp_path, python):
    push(hub, alice, tmp_path, wheel("palestra-later", "1.0"))
    tool, index = Uv(python), f"{hub.url}/alice/later/simple/"
    assert tool.install(index, "--exclude-newer", "2020-01-01", "palestra-later").returncode != 0
    assert tool.install(index, "--exclude-newer", "2100-01-01", "palestra-later").returncode == 0


def test_another_index_does_not_put_its_own_in_its_place(hub, alice, tmp_path, python):
    """An index has one project alone: a package of the same name as a public one shadows it for nobody."""
    push(hub, alice, tmp_path, wheel("palestra-narrow", "1.0"))
    done = Pip(python).install(f"{hub.url}/alice/narrow/simple/", "palestra-later")
    assert done.returncode != 0
    assert "No matching distribution" in done.stderr


def twine(hub: Running, token: str, place: str, file: Path) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPTS / "twine"), "upload", "--non-interactive", "--disable-progress-bar", "-u", "__token__"]
    command += ["-p", token, "--repository-url", hub.url + place, str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def uv_publish(hub: Running, token: str, place: str, file: Path) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPTS / "uv"), "publish", "--no-config", "--publish-url", hub.url + place, "--token", token]
    return subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("tool", [twine, uv_publish])
def test_what_uploads_elsewhere_uploads_here(hub, alice, tmp_path, tool):
    name = f"palestra-by-{tool.__name__.replace('_', '-')}"
    environment = name.removeprefix("palestra-")
    for make in (wheel, sdist):
        filename, content = make(name, "1.0")
        (tmp_path / filename).write_bytes(content)
        refused = tool(hub, "palestra_wrong", "/alice/legacy/", tmp_path / filename)
        assert refused.returncode != 0
        assert "401" in refused.stdout + refused.stderr
        done = tool(hub, alice, f"/alice/{environment}/legacy/", tmp_path / filename)
        assert done.returncode == 0, done.stdout + done.stderr
    with hub.client() as client:
        (version,) = client.environment("alice", environment).versions
    assert [file.kind for file in version.files] == ["wheel", "sdist"]
    other, content = wheel(name, "1.0", files={"x": b"other"})
    (tmp_path / other).write_bytes(content)
    refused = tool(hub, alice, "/alice/legacy/", tmp_path / other)
    assert refused.returncode != 0
    assert "409" in refused.stdout + refused.stderr


# --- the commands of palestra


def test_log_in_push_find_and_pull(hub, alice, tmp_path, python):
    wrong = hub.palestra("hub", "login", hub.url, input="palestra_wrong\n")
    assert (wrong.returncode, "not known" in wrong.stderr) == (2, True)
    assert hub.palestra("hub", "login", hub.url, input=f"{alice}\n").returncode == 0
    kept = hub.data / "config" / "palestra" / "hub.json"
    assert kept.stat().st_mode & 0o777 == 0o600

    project = tmp_path / "project"
    (project / "src" / "palestra_pushed").mkdir(parents=True)
    (project / "src" / "palestra_pushed" / "__init__.py").write_text("VERSION = '0.1'\n")
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "palestra-pushed"\nversion = "0.1"\ndescription = "A lighthouse"\n'
    )
    done = hub.palestra("hub", "push", str(project), "--private", "--json")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["filename"] for line in done.stdout.splitlines()] == [
        "palestra_pushed-0.1.tar.gz",
        "palestra_pushed-0.1-py3-none-any.whl",
    ]
    with hub.client(alice) as client, hub.client("") as nobody:
        assert client.environment("alice", "pushed").row.visibility == "private"
        with pytest.raises(RefusedError, match="no environment"):
            nobody.environment("alice", "pushed")
    found = json.loads(hub.palestra("hub", "search", "lighthouse", "--json").stdout)
    assert [(one["owner"], one["name"]) for one in found] == [("alice", "pushed")]

    asked = hub.palestra("hub", "pull", "alice/pushed", stdin=subprocess.DEVNULL)
    assert asked.returncode == 2
    assert "+ palestra-pushed 0.1 (new)" in asked.stderr
    assert "nothing was changed" in asked.stderr
    assert hub.palestra("hub", "yank", "alice/pushed==0.1", "--reason", "no light").returncode == 0
    refused = hub.palestra("hub", "pull", "alice/pushed")
    assert (refused.returncode, "no light" in refused.stderr) == (2, True)


def test_pull_says_what_it_changes_and_then_changes_it(hub, alice, tmp_path, python):
    """In an environment of its own, which borrows the packages of this one."""
    (place,) = python.parent.parent.glob("lib/python*/site-packages")
    (place / "borrowed.pth").write_text("\n".join(path for path in sys.path if path and Path(path).is_dir()))
    environ = {**hub.environ, "PALESTRA_HUB": hub.url, "PALESTRA_HUB_TOKEN": alice, "PIP_NO_INDEX": "1"}

    def pull(what: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [str(python), "-m", "palestra.launch.cli", "hub", "pull", what, *words]
        return subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL
        )

    push(hub, alice, tmp_path, wheel("palestra-pulled", "1.0"), is_private=True)
    first = pull("alice/pulled", "--yes")
    assert first.returncode == 0, first.stderr
    assert "+ palestra-pulled 1.0 (new)" in first.stderr
    assert Pip(python).version("palestra_pulled") == "1.0"
    assert "installed already" in pull("alice/pulled", "--yes").stderr
    push(hub, alice, tmp_path, wheel("palestra-pulled", "1.1"))
    asked = pull("alice/pulled")
    assert asked.returncode == 2
    assert "! palestra-pulled 1.0 -> 1.1" in asked.stderr
    assert Pip(python).version("palestra_pulled") == "1.0"


# --- many at once, too much at once, and too slow


async def _push_all(hub: Running, token: str, made: list[tuple[str, bytes]]) -> list[int]:
    headers, data = {"authorization": f"Bearer {token}"}, {":action": "file_upload"}

    async def one(client: httpx.AsyncClient, content: tuple[str, bytes]) -> int:
        for _ in range(20):
            answer = await client.post("/alice/legacy/", data=data, files={"content": content}, headers=headers)
            if answer.status_code != 503:
                return answer.status_code
            await asyncio.sleep(0.2)
        return answer.status_code

    async with httpx.AsyncClient(base_url=hub.url, timeout=100, limits=httpx.Limits(max_connections=64)) as client:
        return await asyncio.gather(*(one(client, content) for content in made))


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_64_pushes_at_once_lose_nothing(tmp_path, request, kind):
    """While they come, every version that the index shows is whole."""
    words = ["--database", request.getfixturevalue("postgresql").empty()] if kind == "postgresql" else []
    with running(tmp_path / "data", *words) as hub:
        with hub.client() as client:
            client.new_owner("alice", kind="person")
            token = client.new_token(person="alice").token
        made = [wheel("palestra-many", f"1.{number}") for number in range(64)]
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in made}
        pushing = asyncio.create_task(_push_all(hub, token, made))
        seen = [await _whole(hub, hashes) for _ in range(5)]
        assert await pushing == [200] * 64
        assert await _whole(hub, hashes) == 64
        assert seen == sorted(seen)


async def _whole(hub: Running, hashes: dict[str, str]) -> int:
    """How many files the index shows; each is downloaded and is what it should be."""
    async with httpx.AsyncClient(base_url=hub.url, timeout=60) as client:
        accept = {"accept": "application/vnd.pypi.simple.v1+json"}
        answer = await client.get("/alice/many/simple/palestra-many/", headers=accept)
        if answer.status_code in (401, 404):
            return 0
        index = answer.json()
        assert len(index["versions"]) == len(index["files"])
        for file in index["files"][-3:]:
            content = (await client.get(file["url"])).content
            assert hashlib.sha256(content).hexdigest() == file["hashes"]["sha256"] == hashes[file["filename"]]
        return len(index["files"])


def test_2_gib_are_refused_before_they_are_sent(hub, alice):
    """By what is announced: the answer comes although nothing of the body does."""
    address = hub.url.removeprefix("http://").split(":")
    head = (
        f"POST /alice/legacy/ HTTP/1.1\r\nHost: {hub.url[7:]}\r\nAuthorization: Bearer {alice}\r\n"
        f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {2 << 30}\r\n\r\n"
    )
    with socket.create_connection((address[0], int(address[1])), timeout=REFUSED_S) as connection:
        connection.sendall(head.encode())
        answer = connection.recv(65536).decode()
    assert answer.startswith("HTTP/1.1 413")
    assert list((hub.data / "incoming").iterdir()) == []


def test_2_gib_that_are_not_announced_are_refused_at_the_bound(hub, alice):
    sent = 0
    start = (
        b'--x\r\ncontent-disposition: form-data; name="content"; filename="palestra_big-1.0-py3-none-any.whl"\r\n\r\n'
    )

    def body() -> Iterator[bytes]:
        nonlocal sent
        yield start
        while sent < 2 << 30:
            sent += 1 << 20
            yield bytes(1 << 20)

    headers = {"authorization": f"Bearer {alice}", "content-type": "multipart/form-data; boundary=x"}
    answer = httpx.post(f"{hub.url}/alice/legacy/", content=body(), headers=headers, timeout=60)
    assert answer.status_code == 413
    assert "more than 8388608 bytes" in answer.json()["error"]
    assert list((hub.data / "incoming").iterdir()) == []
    assert httpx.get(f"{hub.url}/environments.json", timeout=10).status_code == 200
