"""The backend `kubernetes` against an API server that speaks what agent-sandbox's v1beta1 types say, and our own agent
where its pod would be: nothing here was seen on a real cluster.
"""

import asyncio
import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from palestra.core.errors import UserError
from palestra.sandbox import Host, Isolation, Limits, SandboxStartError, UnsupportedError
from palestra.sandbox import agent as agent_module
from palestra.sandbox.backends import choose, cluster, kubernetes, pods
from palestra.sandbox.backends.cluster import Access
from palestra.sandbox.backends.kubernetes import Kubernetes
from palestra.sandbox.host import Options
from palestra.sandbox.link import Link
from tests.ports import free_port

WAIT_S = 60
TOKEN = "one-of-its-own-8123"
POOL = "palestra-m512-d256"
_EXTENSIONS = "/apis/extensions.agents.x-k8s.io/v1beta1/namespaces/lab"


@contextlib.contextmanager
def pod(home: Path, *, token: str = TOKEN, port: int):
    """What the template's command starts."""
    argv = [sys.executable, "-I", "-S", agent_module.__file__, "--listen", str(port), str(home)]
    process = subprocess.Popen(argv, env={**os.environ, "PALESTRA_TOKEN": token})
    try:
        yield process
    finally:
        process.kill()
        process.wait(WAIT_S)


async def _connected(port: int) -> socket.socket:
    """As soon as it listens."""
    ends_at = time.monotonic() + WAIT_S
    while time.monotonic() < ends_at:
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
        await asyncio.sleep(0.02)
    raise AssertionError("the agent does not listen")


class ApiServer:
    """`events` are what a watch tells of a claim; `requests` what was asked, in order."""

    def __init__(self):
        self.requests, self.claims = list[str](), dict[str, Any]()
        self.runtime, self.secret, self.allowed = "gvisor", {"palestra-agent": "box-a-palestra-agent"}, "Bearer who"
        self.deleted = asyncio.Event()
        ready = {"type": "Ready", "status": "True", "reason": "Ready", "message": ""}
        waiting = {**ready, "status": "False", "reason": "DependenciesNotReady", "message": "no pod yet"}
        sandbox = {"name": "box-a", "podIPs": ["127.0.0.1"]}
        self.events = [
            {"type": "MODIFIED", "object": {"status": {"conditions": [waiting]}}},
            {"type": "MODIFIED", "object": {"status": {"conditions": [waiting], "sandbox": sandbox}}},
            {"type": "MODIFIED", "object": {"status": {"conditions": [ready], "sandbox": sandbox}}},
        ]

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._seen])
        api = "/apis/agents.x-k8s.io/v1beta1/namespaces/lab/sandboxes/{name}"
        app.router.add_get(f"{_EXTENSIONS}/sandboxwarmpools/{POOL}", self._pool)
        app.router.add_get(f"{_EXTENSIONS}/sandboxtemplates/{POOL}", self._template)
        app.router.add_post(f"{_EXTENSIONS}/sandboxclaims", self._claim)
        app.router.add_get(f"{_EXTENSIONS}/sandboxclaims", self._watch)
        app.router.add_delete(f"{_EXTENSIONS}/sandboxclaims/{{name}}", self._delete)
        app.router.add_get(api, self._sandbox)
        app.router.add_get("/api/v1/namespaces/lab/secrets/box-a-palestra-agent", self._secret)
        return app

    @web.middleware
    async def _seen(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path.rpartition('/')[2]}")
        if request.headers.get("Authorization") != self.allowed:
            return web.json_response({"kind": "Status", "code": 401, "message": "Unauthorized"}, status=401)
        return await handler(request)

    async def _pool(self, request: web.Request) -> web.Response:
        return web.json_response({"spec": {"replicas": 1, "sandboxTemplateRef": {"name": POOL}}})

    async def _template(self, request: web.Request) -> web.Response:
        return web.json_response({"spec": {"podTemplate": {"spec": {"runtimeClassName": self.runtime}}}})

    async def _claim(self, request: web.Request) -> web.Response:
        claim = await request.json()
        name = claim["metadata"]["name"]
        self.claims[name] = claim
        return web.json_response({**claim, "metadata": {"name": name, "resourceVersion": "41"}}, status=201)

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        assert request.query["watch"] == "true"
        assert request.query["resourceVersion"] == "41"
        assert request.query["fieldSelector"] == f"metadata.name={list(self.claims)[-1]}"
        answer = web.StreamResponse()
        await answer.prepare(request)
        for event in self.events:
            await answer.write(json.dumps(event).encode() + b"\n")
        return answer

    async def _delete(self, request: web.Request) -> web.Response:
        self.deleted.set()
        is_there = self.claims.pop(request.match_info["name"], None) is not None
        return web.json_response({"kind": "Status"}, status=200 if is_there else 404)

    async def _sandbox(self, request: web.Request) -> web.Response:
        told = {"extensions.agents.x-k8s.io/generated-secrets": json.dumps(self.secret)}
        return web.json_response({"metadata": {"name": request.match_info["name"], "annotations": told}})

    async def _secret(self, request: web.Request) -> web.Response:
        return web.json_response({"data": {"token": base64.b64encode(TOKEN.encode()).decode()}})


@pytest.fixture
async def api() -> AsyncIterator[tuple[ApiServer, Access]]:
    server = ApiServer()
    runner = web.AppRunner(server.app(), shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield server, Access(url=f"http://127.0.0.1:{runner.addresses[0][1]}", namespace="lab", token=lambda: "who")
    await runner.cleanup()


@contextlib.asynccontextmanager
async def opened(monkeypatch, who: Access, port: int) -> AsyncIterator[Host]:
    backend = Kubernetes(who, port=port)
    monkeypatch.setattr(kubernetes, "Kubernetes", lambda: backend)
    async with Host(Options(backend="kubernetes", min_isolation=Isolation.KERNEL)) as host:
        yield host


async def _listening(port: int) -> None:
    """Also what a probe does: a connection that says nothing takes no agent."""
    (await _connected(port)).close()


async def test_a_sandbox_is_claimed_used_and_given_back(tmp_path: Path, api, monkeypatch) -> None:
    server, who = api
    port = free_port()
    with pod(tmp_path, port=port) as process:
        await _listening(port)
        async with opened(monkeypatch, who, port) as host:
            box = await host.create()
            (claim,) = server.claims.values()
            assert claim["apiVersion"] == "extensions.agents.x-k8s.io/v1beta1"
            assert claim["kind"] == "SandboxClaim"
            assert claim["spec"]["warmPoolRef"] == {"name": POOL}
            assert "env" not in claim["spec"]  # else no pod that waits is taken
            assert claim["spec"]["lifecycle"]["shutdownPolicy"] == "Delete"
            await box.write("a/b", b"\x00\xff")
            assert await box.read("a/b") == b"\x00\xff"
            end = await box.exec("cat; echo ${PALESTRA_TOKEN:-none} >&2; exit 3", stdin="in")
            assert (end.exit_code, end.stdout, end.stderr) == (3, "in", "none\n")
            server_of_a_program = await box.background(["sleep", "60"])
            await server_of_a_program.kill()
            with socket.create_server(("127.0.0.1", 0)) as open_port:
                with pytest.raises(UnsupportedError, match="neither ports"):
                    await box.expose_port(open_port.getsockname()[1])  # a descriptor cannot come over TCP
            await box.delete()
            await asyncio.wait_for(server.deleted.wait(), WAIT_S)
        assert server.claims == {}
        assert await asyncio.to_thread(process.wait, WAIT_S) == 0
    path = [f"GET {POOL}", f"GET {POOL}", "POST sandboxclaims", "GET sandboxclaims"]
    assert server.requests[:6] == [*path, "GET box-a", "GET box-a-palestra-agent"]


async def test_an_agent_that_ends_gives_its_claim_back(tmp_path: Path, api, monkeypatch) -> None:
    server, who = api
    port = free_port()
    with pod(tmp_path, port=port) as process:
        await _listening(port)
        async with opened(monkeypatch, who, port) as host:
            await host.create()
            process.kill()
            await asyncio.wait_for(server.deleted.wait(), WAIT_S)
            assert host.boxes == {}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"runtime": "runc"}, "runtimeClassName 'runc', and not 'gvisor'"),
        ({"runtime": None}, "the node's kernel"),
        ({"events": []}, "it said: nothing"),
        ({"events": [{"type": "DELETED", "object": {}}]}, "ended while it was waited for: DELETED"),
        ({"secret": {}}, "no generated secret 'palestra-agent'"),
        ({"allowed": "Bearer another"}, "401 to GET .*: Unauthorized"),
    ],
)
async def test_what_cannot_start_says_why_and_leaves_no_claim(fault, message, api, monkeypatch) -> None:
    server, who = api
    for name, value in fault.items():
        setattr(server, name, value)
    async with opened(monkeypatch, who, 1) as host:
        with pytest.raises(SandboxStartError, match=message):
            await host.create()
    assert server.claims == {}


async def test_the_last_that_a_claim_said_is_told(api, monkeypatch) -> None:
    server, who = api
    server.events = server.events[:2]  # an address without readiness is no sandbox
    async with opened(monkeypatch, who, 1) as host:
        with pytest.raises(SandboxStartError, match="DependenciesNotReady: no pod yet"):
            await host.create()
    assert server.claims == {}


async def test_limits_without_a_pool_name_how_to_make_one(api, monkeypatch) -> None:
    _, who = api
    async with opened(monkeypatch, who, 1) as host:
        with pytest.raises(SandboxStartError, match=r"404 to GET .*palestra-m64-d256.*backends\.pods"):
            await host.create(limits=Limits(memory_mb=64))


async def test_a_pod_that_cannot_be_reached(api, monkeypatch) -> None:
    server, who = api
    async with opened(monkeypatch, who, free_port()) as host:
        with pytest.raises(SandboxStartError, match="cannot be reached"):
            await host.create()
    assert server.claims == {}


# --- the agent's side


async def test_only_the_token_gets_the_agent_and_only_once(tmp_path: Path) -> None:
    port = free_port()
    with pod(tmp_path, port=port) as process:
        for wrong in (b"", b"x" * len(TOKEN), TOKEN[:-1].encode() + b"?", b"\x00" * 4):
            with await _connected(port) as link:
                link.sendall(wrong)
                link.shutdown(socket.SHUT_WR)
                assert link.recv(1) == b"" or wrong == b""
        with await _connected(port) as link:
            link.sendall(TOKEN.encode())
            right = Link(link)
            await asyncio.wait_for(right.ready, WAIT_S)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
            right.close("the test is over")
        assert await asyncio.to_thread(process.wait, WAIT_S) == 0


def test_without_a_token_nobody_is_waited_for(tmp_path: Path) -> None:
    argv = [sys.executable, "-I", "-S", agent_module.__file__, "--listen", str(free_port()), str(tmp_path)]
    ended = subprocess.run(argv, env={}, capture_output=True, timeout=WAIT_S, check=False)
    assert ended.returncode == 1
    assert b"PALESTRA_TOKEN is empty" in ended.stderr


# --- what a cluster is told


def test_the_template_has_the_limits_and_the_walls() -> None:
    made = pods.manifests(Limits(memory_mb=300, disk_mb=100, cpus=1.5), hosts=("10.0.0.0/8",), replicas=7)
    config, template, pool = made["items"]
    assert config["data"]["agent.py"] == Path(agent_module.__file__).read_text()
    assert template["metadata"]["name"] == pool["spec"]["sandboxTemplateRef"]["name"] == "palestra-m300-d100-c1500"
    assert pool["spec"]["replicas"] == 7
    spec = template["spec"]
    assert spec["networkPolicy"]["egress"] == []
    assert spec["networkPolicy"]["ingress"][0]["from"] == [{"ipBlock": {"cidr": "10.0.0.0/8"}}]
    inside = spec["podTemplate"]["spec"]
    (container,) = inside["containers"]
    assert inside["runtimeClassName"] == "gvisor"
    assert inside["automountServiceAccountToken"] is False
    assert container["resources"]["limits"] == {"memory": "400Mi", "cpu": "1500m"}
    assert container["command"][3:] == ["/run/palestra/agent.py", "--listen", "7070", "/home/user"]
    (secret,) = spec["generatedSecrets"]
    assert container["env"][0]["valueFrom"]["secretKeyRef"] == {"name": secret["name"], "key": secret["data"][0]["key"]}


def test_the_template_is_printed_as_json(capsys) -> None:
    pods.main(["--memory-mb", "64", "--disk-mb", "8"])
    assert json.loads(capsys.readouterr().out)["items"][2]["metadata"]["name"] == "palestra-m64-d8"


def _kubeconfig(place: Path, user: dict[str, Any]) -> Path:
    named = [{"name": "a", "cluster": {"server": "http://127.0.0.1:1"}}]
    contexts = [{"name": "c", "context": {"cluster": "a", "user": "u", "namespace": "lab"}}]
    config = {"current-context": "c", "clusters": named, "contexts": contexts, "users": [{"name": "u", "user": user}]}
    place.write_text(json.dumps(config))
    return place


def test_who_we_are_is_read_from_a_kubeconfig(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(_kubeconfig(tmp_path / "config", {"token": "t"})))
    found = cluster.access()
    assert (found.url, found.namespace, found.token()) == ("http://127.0.0.1:1", "lab", "t")
    (tmp_path / "t").write_text("changed\n")
    found = cluster.of_file(_kubeconfig(tmp_path / "config", {"tokenFile": str(tmp_path / "t")}))
    assert found.token() == "changed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no whole current context"),
        (json.dumps({"current-context": "gone", "contexts": []}), "no whole current context"),
        (None, "cannot be read"),
    ],
)
def test_a_kubeconfig_that_is_none(text, message, tmp_path: Path) -> None:
    place = tmp_path / "config"
    if text is not None:
        place.write_text(text)
    with pytest.raises(UserError, match=message):
        cluster.of_file(place)


def test_programs_that_log_in_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="logs in by a program"):
        cluster.of_file(_kubeconfig(tmp_path / "config", {"exec": {"command": "aws"}}))


def test_without_yaml_a_kubeconfig_is_json(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "config").write_text("current-context: c\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(UserError, match=r"pip install pyyaml.*-o json"):
        cluster.of_file(tmp_path / "config")


async def test_it_is_never_chosen_unless_by_name(monkeypatch) -> None:
    assert choose.BACKENDS["kubernetes"][0] is Isolation.KERNEL
    called = list[str]()

    async def opener(options: Options) -> Any:
        called.append("kubernetes")
        raise SandboxStartError("not here")

    monkeypatch.setattr(choose, "BACKENDS", {"kubernetes": (Isolation.KERNEL, opener)})
    with pytest.raises(UserError, match="none does"):
        await choose.open_backend(Options(min_isolation=Isolation.KERNEL))
    assert called == []
    with pytest.raises(SandboxStartError):
        await choose.open_backend(Options(backend="kubernetes"))
    assert called == ["kubernetes"]
