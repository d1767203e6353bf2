"""The API server of a Kubernetes cluster: who we are to it, and the four requests that sandboxes need.

Who: the kubeconfig that `KUBECONFIG` names, else the service account of the pod that this runs in, else
`~/.kube/config`. Tokens and client certificates are understood; programs that log somebody in are not.
"""

import base64
import importlib
import json
import os
import ssl
import tempfile
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from palestra.core.errors import UserError
from palestra.sandbox.records import SandboxStartError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_REQUEST_S = 30.0
_MOST_LINE = 2**21  # bytes of an event of a watch


@dataclass(frozen=True)
class Access:
    """`token` is asked before each request: that of a service account is replaced every hour."""

    url: str
    namespace: str
    token: Callable[[], str]
    tls: ssl.SSLContext | bool = True


class ClusterError(SandboxStartError):
    def __init__(self, status: int, asked: str, said: str):
        self.status = status
        super().__init__(f"the cluster answers {status} to {asked}: {said[:300]}")


class Cluster:
    """Errors of all requests: ClusterError; SandboxStartError, where it cannot be reached."""

    def __init__(self, access: Access):
        self._access, self.namespace = access, access.namespace
        self._http = aiohttp.ClientSession(read_bufsize=_MOST_LINE)

    async def get(self, path: str) -> dict[str, Any]:
        return await self._asked("GET", path)

    async def create(self, path: str, wanted: dict[str, Any]) -> dict[str, Any]:
        return await self._asked("POST", path, wanted)

    async def delete(self, path: str) -> None:
        """Twice is fine."""
        try:
            await self._asked("DELETE", path)
        except ClusterError as error:
            if error.status != 404:
                raise

    async def watch(self, path: str, query: dict[str, str], *, deadline_s: float) -> AsyncGenerator[dict[str, Any]]:
        """Events as the server tells them: https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes"""
        asked = {**query, "watch": "true", "timeoutSeconds": str(int(deadline_s))}
        limit = aiohttp.ClientTimeout(total=deadline_s)
        try:
            async with self._http.get(self._url(path), params=asked, timeout=limit, **self._who()) as answer:
                await _require_success(answer, f"GET {path}")
                async for line in answer.content:
                    yield json.loads(line)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise SandboxStartError(f"the cluster's watch of {path} broke: {type(error).__name__}: {error}") from None

    async def _asked(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        limit = aiohttp.ClientTimeout(total=_REQUEST_S)
        try:
            asking = self._http.request(method, self._url(path), json=body, timeout=limit, **self._who())
            async with asking as answer:
                await _require_success(answer, f"{method} {path}")
                return await answer.json()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise SandboxStartError(
                f"the cluster at {self._access.url} cannot be asked {method} {path}: {type(error).__name__}: {error}"
            ) from None

    def _url(self, path: str) -> str:
        return self._access.url.rstrip("/") + path

    def _who(self) -> dict[str, Any]:
        token = self._access.token()
        return {"ssl": self._access.tls, "headers": {"Authorization": f"Bearer {token}"} if token else {}}

    async def close(self) -> None:
        await self._http.close()


async def _require_success(answer: aiohttp.ClientResponse, asked: str) -> None:
    if answer.status >= 400:
        said = await answer.text()
        try:
            said = str(json.loads(said)["message"])
        except (ValueError, KeyError, TypeError):
            pass  # not the server itself, but something before it
        raise ClusterError(answer.status, asked, said)


# --- who we are


def access() -> Access:
    """Errors: UserError."""
    named = os.environ.get("KUBECONFIG")
    if named:
        return of_file(Path(named))
    host = os.environ.get("KUBERNETES_SERVICE_HOST")
    if host and (ACCOUNT / "token").is_file():
        return _of_account(host)
    usual = Path.home() / ".kube" / "config"
    if usual.is_file():
        return of_file(usual)
    raise UserError(
        "the sandbox 'kubernetes' finds no cluster: this is no pod with a service account, and there is no "
        f"{usual}; set KUBECONFIG to a file"
    )


def _of_account(host: str) -> Access:
    port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    return Access(
        url=f"https://{f'[{host}]' if ':' in host else host}:{port}",
        namespace=(ACCOUNT / "namespace").read_text().strip(),
        token=lambda: (ACCOUNT / "token").read_text().strip(),
        tls=ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt")),
    )


def of_file(place: Path) -> Access:
    """Of its current context: https://kubernetes.io/docs/reference/config-api/kubeconfig.v1/. Errors: UserError."""
    config = _read(place)
    try:
        context = _named(config, "contexts", config["current-context"])["context"]
        cluster = _named(config, "clusters", context["cluster"])["cluster"]
        user = _named(config, "users", context["user"])["user"]
        namespace, url = context.get("namespace", "default"), cluster["server"]
    except (KeyError, TypeError, StopIteration) as error:
        raise UserError(f"{place} has no whole current context ({error!r}); see `kubectl config view`") from None
    if user.get("exec") or user.get("auth-provider"):
        raise UserError(
            f"{place} logs in by a program, which is not run here; write a token (`kubectl create token NAME`) there"
        )
    file, token = user.get("tokenFile"), user.get("token", "")
    return Access(
        url=url,
        namespace=namespace,
        token=(lambda: Path(file).read_text().strip()) if file else lambda: token,
        tls=_tls(cluster, user),
    )


def _read(place: Path) -> dict[str, Any]:
    try:
        text = place.read_text()
    except OSError as error:
        raise UserError(f"the kubeconfig {place} cannot be read: {error.strerror}") from None
    try:
        return json.loads(text)
    except ValueError:
        pass  # YAML then
    try:
        yaml = importlib.import_module("yaml")
    except ImportError:
        raise UserError(
            f"{place} is YAML: run `pip install pyyaml`, or write it as JSON: "
            "`kubectl config view --raw --minify --flatten -o json`"
        ) from None
    return yaml.safe_load(text)


def _named(config: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    return next(entry for entry in config[kind] if entry["name"] == name)


def _tls(cluster: dict[str, Any], user: dict[str, Any]) -> ssl.SSLContext | bool:
    if not cluster["server"].startswith("https:"):
        return True
    data = cluster.get("certificate-authority-data")
    trusted = base64.b64decode(data).decode() if data else None
    tls = ssl.create_default_context(cafile=cluster.get("certificate-authority"), cadata=trusted)
    if cluster.get("insecure-skip-tls-verify"):
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    if user.get("client-certificate-data"):
        with tempfile.TemporaryDirectory(prefix="palestra-") as directory:  # the library reads files alone
            places = [Path(directory) / name for name in ("certificate", "key")]
            for place, name in zip(places, ("client-certificate-data", "client-key-data"), strict=True):
                place.write_bytes(base64.b64decode(user[name]))
            tls.load_cert_chain(*map(str, places))
    elif user.get("client-certificate"):
        tls.load_cert_chain(user["client-certificate"], user.get("client-key"))
    return tls
