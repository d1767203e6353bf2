"""The service: whoever asks must be somebody, sees what is theirs, and says no more than can be heard."""

import contextlib
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from palestra.sandbox.check import Bench, case, require
from palestra.sandbox.host import Host
from palestra.sandbox.service import Service, Settings
from palestra.sandbox.tenants import Tenant, Tenants, digest_of

_TENANTS = ("one", "other")
_BODY_MB = 1


@dataclass(frozen=True)
class Front:
    """A service, and a client of it that is nobody."""

    session: aiohttp.ClientSession
    url: str

    async def status(self, method: str, path: str, token: str = "", **options) -> int:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with self.session.request(method, self.url + path, headers=headers, **options) as answer:
            await answer.read()
            return answer.status

    async def created(self, token: str) -> str:
        headers = {"Authorization": f"Bearer {token}"}
        async with self.session.post(f"{self.url}/v1/sandboxes", json={"timeout_s": 60}, headers=headers) as answer:
            require(answer.status in (200, 201), f"creation answers {answer.status}: {await answer.text()}")
            return str((await answer.json())["id"])


@contextlib.asynccontextmanager
async def _served(bench: Bench) -> AsyncIterator[Front]:
    """With the backend that is checked; it ends with the case. The tokens are the names of the tenants."""
    tenants = Tenants([Tenant(name=name, token_sha256=digest_of(name)) for name in _TENANTS])
    host = await Host(bench.host.options, warm=0).open()
    async with Service(Settings(most_body_mb=_BODY_MB), tenants, host) as service:
        runner = web.AppRunner(service.app())
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host_name, port = runner.addresses[0][:2]
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(30)) as session:
                yield Front(session, f"http://{host_name}:{port}")
        finally:
            await runner.cleanup()


@case()
async def http_without_token(bench: Bench) -> str:
    async with _served(bench) as front:
        mine = await front.created("one")
        paths = [("POST", "/v1/sandboxes"), ("GET", "/v1/sandboxes"), ("POST", "/v1/run"), ("GET", "/v1/usage")]
        paths += [("GET", f"/v1/sandboxes/{mine}"), ("DELETE", f"/v1/sandboxes/{mine}")]
        for token in ("", "wrong", "on"):
            seen = {path: await front.status(method, path, token) for method, path in paths}
            require(set(seen.values()) == {401}, f"with the token {token!r}: {seen}")
        require(await front.status("GET", f"/v1/sandboxes/{mine}", "one") == 200, "its owner was refused")
    return f"401 on {len(paths)} paths"


@case()
async def http_other_tenant(bench: Bench) -> str:
    async with _served(bench) as front:
        mine = await front.created("one")
        asked = [("GET", ""), ("DELETE", ""), ("GET", "/logs"), ("POST", "/exec"), ("GET", "/files/x")]
        seen = {}
        for method, path in asked:
            body = {"json": {"command": ["true"]}} if method == "POST" else {}
            seen[path or method] = await front.status(method, f"/v1/sandboxes/{mine}{path}", "other", **body)
        require(set(seen.values()) == {404}, seen)
        require(await front.status("GET", f"/v1/sandboxes/{mine}", "one") == 200, "it was harmed by another tenant")
    return f"404 on {len(asked)} paths"


@case()
async def http_oversized_body(bench: Bench) -> str:
    async with _served(bench) as front:
        code = "#" * (_BODY_MB * 2**20 + 1000) + "\nprint(1)"
        body = io.BytesIO(json.dumps({"code": code}).encode())
        status = await front.status("POST", "/v1/run", "one", data=body)
        require(status == 413, f"{len(code)} bytes were answered {status}")
        status = await front.status("POST", "/v1/run", "one", json={"code": "print(1)"})
        require(status == 200, f"a small one was answered {status}")
    return "413; a small one runs"
