"""The backend `kubernetes`: pods under gVisor, claimed from a pool of those that wait.

By agent-sandbox (https://github.com/kubernetes-sigs/agent-sandbox), whose controller keeps the pool. We create a
SandboxClaim, watch it until its sandbox is ready, and speak the agent's frames to the pod's own address: the API server
carries no program's output, and nobody has to be allowed `pods/exec`. Fields:
.../blob/main/extensions/api/v1beta1/sandboxclaim_types.go, whose `status.sandbox` has `name` and `podIPs`.

Each sandbox has a token of its own, which its template generates (`generatedSecrets`): a claim's own environment would
make a new pod instead of taking one that waits. Needed rights: `sandboxclaims` create, watch, delete;
`sandboxwarmpools`, `sandboxtemplates`, `sandboxes` and `secrets` get.
"""

import asyncio
import base64
import contextlib
import datetime
import json
import secrets
import socket
from typing import Any

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError
from palestra.sandbox.backends.base import Started
from palestra.sandbox.backends.cluster import Access, Cluster, ClusterError, access
from palestra.sandbox.backends.endings import Endings
from palestra.sandbox.backends.pods import GROUP, HOME, KEY, PORT, RUNTIME, SECRET, VERSION, pool_name
from palestra.sandbox.link import Link
from palestra.sandbox.records import Isolation, Limits, SandboxStartError

START_S = 180.0
_CONNECT_S = 10.0
_LIFETIME = datetime.timedelta(hours=24)
_GENERATED = "extensions.agents.x-k8s.io/generated-secrets"
_SANDBOXES = "/apis/agents.x-k8s.io/v1beta1"


class Kubernetes:
    """A claim is deleted with its sandbox; if this process dies, the agent sees its connection end, and the pod's end
    is its claim's, a minute later. Whatever happens, a claim ends after a day.
    """

    name, isolation, home = "kubernetes", Isolation.KERNEL, HOME
    grace_s = 10.0
    ends_by_programs = False  # a pod that is lost looks the same, and is no failure of a program
    layers: tuple[str, ...] = ("kernel", "network", "read_only", "no_capabilities", "cgroup")
    _cluster: Cluster

    def __init__(self, who: Access | None = None, *, port: int = PORT):
        """Errors: UserError, where no cluster is found."""
        self._who, self._port = who or access(), port
        self._known_pools, self._endings = set[str](), Endings()
        namespace = f"namespaces/{self._who.namespace}"
        self._extensions = f"/apis/{GROUP}/{VERSION}/{namespace}"
        self._sandboxes, self._secrets = f"{_SANDBOXES}/{namespace}/sandboxes", f"/api/v1/{namespace}/secrets"

    async def open(self) -> None:
        self._cluster = Cluster(self._who)

    async def start(self, limits: Limits) -> Started:
        name, waited = f"palestra-{secrets.token_hex(8)}", _Last()
        try:
            return await within(START_S, self._started(name, limits, waited), waiting_for="a pod")
        except BaseException as error:
            if waited.is_asked:
                self._endings.begin(self._cluster.delete(f"{self._extensions}/sandboxclaims/{name}"), f"claim {name}")
            if isinstance(error, DeadlineError):
                raise SandboxStartError(f"{self.name}: {error}; the claim said: {waited.said}") from None
            raise

    async def _started(self, name: str, limits: Limits, waited: "_Last") -> Started:
        pool = pool_name(limits)
        if pool not in self._known_pools:
            await self._require_walls(pool)
            self._known_pools.add(pool)
        waited.is_asked = True
        claim = await self._cluster.create(f"{self._extensions}/sandboxclaims", claim_of(name, pool))
        sandbox = await self._ready(claim, waited)
        token = await self._token(sandbox["name"])
        link = Link(await self._connected(sandbox["podIPs"][0], token))
        started = Started(link, kill=lambda: link.close("it was killed"))
        link.closed.add_done_callback(lambda _: self._endings.begin(self._deleted(name, started), f"claim {name}"))
        return started

    async def _require_walls(self, pool: str) -> None:
        """That its pods have a kernel of their own is the template's word. Errors: SandboxStartError."""
        try:
            found = await self._cluster.get(f"{self._extensions}/sandboxwarmpools/{pool}")
            template = found["spec"]["sandboxTemplateRef"]["name"]
            about = await self._cluster.get(f"{self._extensions}/sandboxtemplates/{template}")
            runtime = about["spec"]["podTemplate"]["spec"].get("runtimeClassName")
        except ClusterError as error:
            if error.status != 404:
                raise
            raise SandboxStartError(
                f"{error}; make the pool of these limits: `python -m palestra.sandbox.backends.pods --help`"
            ) from None
        if runtime != RUNTIME:
            raise SandboxStartError(
                f"the template {template!r} has runtimeClassName {runtime!r}, and not {RUNTIME!r}: its pods would have "
                "the node's kernel"
            )

    async def _ready(self, claim: dict[str, Any], waited: "_Last") -> dict[str, Any]:
        """Of its status, what it says about its sandbox. Errors: SandboxStartError."""
        about = claim["metadata"]
        query = {"fieldSelector": f"metadata.name={about['name']}", "resourceVersion": about["resourceVersion"]}
        events = self._cluster.watch(f"{self._extensions}/sandboxclaims", query, deadline_s=START_S)
        async with contextlib.aclosing(events):
            async for event in events:
                if event["type"] not in ("ADDED", "MODIFIED"):
                    raise SandboxStartError(f"the claim {about['name']} ended while it was waited for: {event['type']}")
                status = event["object"].get("status", {})
                sandbox = status.get("sandbox", {})
                if waited.is_ready(status) and sandbox.get("name") and sandbox.get("podIPs"):
                    return sandbox
        raise SandboxStartError(f"the watch of claim {about['name']} ended; it said: {waited.said}")

    async def _token(self, sandbox: str) -> bytes:
        """Errors: SandboxStartError."""
        about = await self._cluster.get(f"{self._sandboxes}/{sandbox}")
        try:
            names = json.loads(about["metadata"]["annotations"][_GENERATED])
            secret = await self._cluster.get(f"{self._secrets}/{names[SECRET]}")
            return base64.b64decode(secret["data"][KEY], validate=True)
        except (KeyError, TypeError, ValueError) as error:
            raise SandboxStartError(
                f"the sandbox {sandbox} has no generated secret {SECRET!r} with a {KEY!r} ({error!r}); "
                "apply the template of `palestra.sandbox.backends.pods`"
            ) from None

    async def _connected(self, address: str, token: bytes) -> socket.socket:
        """Errors: SandboxStartError."""
        loop = asyncio.get_running_loop()
        link = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        try:
            link.setblocking(False)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            await within(_CONNECT_S, loop.sock_connect(link, (address, self._port)), waiting_for="a pod to answer")
            await within(_CONNECT_S, loop.sock_sendall(link, token), waiting_for="a pod to listen")
        except BaseException as error:
            link.close()
            if isinstance(error, OSError | DeadlineError):
                raise SandboxStartError(
                    f"the pod at {address}:{self._port} cannot be reached: {error}; this process must be in the "
                    "cluster's network, and the template's `networkPolicy` let it in"
                ) from None
            raise
        return link

    async def _deleted(self, name: str, started: Started) -> None:
        try:
            await self._cluster.delete(f"{self._extensions}/sandboxclaims/{name}")
        finally:
            started.set_ended("its claim was deleted")

    async def interpreter(self, limits: Limits) -> None:
        """None waits: the pool's pods do."""
        return

    async def close(self) -> None:
        await self._endings.close()
        await self._cluster.close()


class _Last:
    """What was said last while a claim was waited for."""

    def __init__(self):
        self.is_asked, self.said = False, "nothing"

    def is_ready(self, status: dict[str, Any]) -> bool:
        for condition in status.get("conditions", []):
            if condition.get("type") == "Ready":
                self.said = f"{condition.get('reason')}: {condition.get('message')}"
                return condition.get("status") == "True"
        return False


def claim_of(name: str, pool: str) -> dict[str, Any]:
    ends = datetime.datetime.now(datetime.UTC) + _LIFETIME
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "SandboxClaim",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/managed-by": "palestra"}},
        "spec": {
            "warmPoolRef": {"name": pool},
            "lifecycle": {
                "shutdownTime": ends.strftime("%Y-%m-%dT%H:%M:%SZ"),
                "shutdownPolicy": "Delete",
                "ttlSecondsAfterFinished": 60,
            },
        },
    }
