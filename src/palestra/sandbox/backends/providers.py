"""Who lends sandboxes: what each one's library is asked, and nothing else. They are imported when first needed.

Written against prime-sandboxes 0.5.1, e2b 2.63.0, modal 1.6.4 and daytona 0.226.1. Credentials are where each library
looks for them. A sandbox there lives `PALESTRA_REMOTE_LIFETIME_S` (3600), whatever is asked of it here: it ends by then
even if this process dies, and a longer lifetime needs a larger value, as far as the provider allows.
"""

import importlib
import math
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

from palestra.core.deadline import within
from palestra.core.errors import UserError
from palestra.sandbox.backends.remote import Place, Provider
from palestra.sandbox.records import Isolation, Limits

IMAGE = "python:3.12-slim"
_FILE_S, _LIBRARY_S, _MAKE_S = 120, 60.0, 280.0
_LEAST_S, _DAY_S = 60, 24 * 3600


def library(module: str, package: str) -> Any:
    """Errors: UserError, if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"the sandbox needs the package {package!r} ({error}); run `pip install {package}`") from None


def lifetime_s() -> int:
    """Errors: UserError."""
    text = os.environ.get("PALESTRA_REMOTE_LIFETIME_S", "3600")
    if not text.isdigit() or not _LEAST_S <= int(text) <= _DAY_S:
        raise UserError(f"PALESTRA_REMOTE_LIFETIME_S={text!r} must be whole seconds from {_LEAST_S} to {_DAY_S}")
    return int(text)


def _memory_mb(limits: Limits) -> int:
    """Beyond the programs': what they write is on a disk or in memory, as the provider has it."""
    return limits.memory_mb + limits.disk_mb


# --- prime-sandboxes: AsyncSandboxClient


class _PrimePlace:
    def __init__(self, client: Any, id: str):
        self._client, self._id = client, id

    async def run(self, line: str, deadline_s: float) -> tuple[int, str]:
        running = self._client.execute_command(self._id, line, timeout=math.ceil(deadline_s))
        answer = await within(deadline_s, running, waiting_for="a command in a sandbox of prime")
        return answer.exit_code, answer.stdout

    async def write(self, path: str, content: bytes) -> None:
        sending = self._client.upload_bytes(self._id, path, content, Path(path).name, timeout=_FILE_S)
        await within(_FILE_S, sending, waiting_for="a file to be sent to prime")

    async def read(self, path: str) -> bytes:
        with tempfile.TemporaryDirectory(prefix="palestra-") as directory:
            place = Path(directory) / "answer"
            getting = self._client.download_file(self._id, path, str(place), timeout=_FILE_S)
            await within(_FILE_S, getting, waiting_for="a file of a sandbox of prime")
            return place.read_bytes()

    async def delete(self) -> None:
        await within(_LIBRARY_S, self._client.delete(self._id), waiting_for="prime to delete a sandbox")


class Prime:
    """Containers. Every IPv4 address is on the list of those that they may not reach."""

    name, isolation = "prime", Isolation.NAMESPACES

    def __init__(self, image: str | None):
        self._library, self._image = library("prime_sandboxes", "prime-sandboxes"), image or IMAGE
        self._lifetime_s = lifetime_s()
        self._client = self._library.AsyncSandboxClient()

    async def create(self, limits: Limits) -> Place:
        request = self._library.CreateSandboxRequest(
            name=f"palestra-{secrets.token_hex(8)}",
            docker_image=self._image,
            cpu_cores=limits.cpus or 1.0,
            memory_gb=max(_memory_mb(limits) / 1024, 0.5),
            disk_size_gb=max(math.ceil(limits.disk_mb / 1024), 1),
            timeout_minutes=math.ceil(self._lifetime_s / 60),
            labels=["palestra"],
            network_denylist=["0.0.0.0/0"],
        )
        made = await within(_MAKE_S, self._client.create(request), waiting_for="prime to make a sandbox")
        place = _PrimePlace(self._client, made.id)
        try:
            waiting = self._client.wait_for_creation(made.id)
            await within(_MAKE_S, waiting, waiting_for="a sandbox of prime to run")
        except BaseException:
            await place.delete()
            raise
        return place

    async def close(self) -> None:
        await self._client.aclose()


# --- e2b: AsyncSandbox


class _E2bPlace:
    def __init__(self, library: Any, sandbox: Any):
        self._library, self._sandbox = library, sandbox

    async def run(self, line: str, deadline_s: float) -> tuple[int, str]:
        """Its library raises where a command's exit code is not 0; that error is the result."""
        running = self._sandbox.commands.run(line, timeout=deadline_s)
        try:
            answer = await within(deadline_s, running, waiting_for="a command in a sandbox of e2b")
        except self._library.CommandExitException as error:
            answer = error
        return answer.exit_code, answer.stdout

    async def write(self, path: str, content: bytes) -> None:
        sending = self._sandbox.files.write(path, content, request_timeout=_FILE_S)
        await within(_FILE_S, sending, waiting_for="a file to be sent to e2b")

    async def read(self, path: str) -> bytes:
        getting = self._sandbox.files.read(path, format="bytes", request_timeout=_FILE_S)
        return bytes(await within(_FILE_S, getting, waiting_for="a file of a sandbox of e2b"))

    async def delete(self) -> None:
        await within(_LIBRARY_S, self._sandbox.kill(), waiting_for="e2b to delete a sandbox")


class E2b:
    """Virtual machines, without a network. `image` is a template there; its memory and cores are the template's own."""

    name, isolation = "e2b", Isolation.KERNEL

    def __init__(self, image: str | None):
        self._library, self._template, self._lifetime_s = library("e2b", "e2b"), image, lifetime_s()

    async def create(self, limits: Limits) -> Place:
        making = self._library.AsyncSandbox.create(
            template=self._template,
            timeout=self._lifetime_s,
            metadata={"made-by": "palestra"},
            allow_internet_access=False,
        )
        return _E2bPlace(self._library, await within(_MAKE_S, making, waiting_for="e2b to make a sandbox"))

    async def close(self) -> None:
        """Its library keeps nothing open."""


# --- modal: Sandbox


class _ModalPlace:
    def __init__(self, sandbox: Any):
        self._sandbox = sandbox

    async def run(self, line: str, deadline_s: float) -> tuple[int, str]:
        starting = self._sandbox.exec.aio("/bin/sh", "-c", line, timeout=math.ceil(deadline_s), text=True)
        process = await within(deadline_s, starting, waiting_for="a command in a sandbox of modal")
        output = await within(deadline_s, process.stdout.read.aio(), waiting_for="the output of a command of modal")
        return await within(_LIBRARY_S, process.wait.aio(), waiting_for="a command of modal to end"), output

    async def write(self, path: str, content: bytes) -> None:
        sending = self._sandbox.filesystem.write_bytes.aio(content, path)
        await within(_FILE_S, sending, waiting_for="a file to be sent to modal")

    async def read(self, path: str) -> bytes:
        getting = self._sandbox.filesystem.read_bytes.aio(path)
        return await within(_FILE_S, getting, waiting_for="a file of a sandbox of modal")

    async def delete(self) -> None:
        await within(_LIBRARY_S, self._sandbox.terminate.aio(), waiting_for="modal to delete a sandbox")


class Modal:
    """gVisor, as the provider says, without a network. Their app there is `PALESTRA_MODAL_APP` (palestra)."""

    name, isolation = "modal", Isolation.KERNEL

    def __init__(self, image: str | None):
        self._library, self._lifetime_s = library("modal", "modal"), lifetime_s()
        self._image = self._library.Image.from_registry(image or IMAGE)

    async def create(self, limits: Limits) -> Place:
        name = os.environ.get("PALESTRA_MODAL_APP", "palestra")
        finding = self._library.App.lookup.aio(name, create_if_missing=True)
        app = await within(_LIBRARY_S, finding, waiting_for=f"the app {name!r} of modal")
        memory = _memory_mb(limits)
        making = self._library.Sandbox.create.aio(
            "sleep",
            str(self._lifetime_s),
            app=app,
            image=self._image,
            timeout=self._lifetime_s,
            cpu=limits.cpus,
            memory=(memory, memory),
            block_network=True,
        )
        return _ModalPlace(await within(_MAKE_S, making, waiting_for="modal to make a sandbox"))

    async def close(self) -> None:
        """Its library closes its client at the end of the process."""


# --- daytona: AsyncDaytona


class _DaytonaPlace:
    def __init__(self, sandbox: Any):
        self._sandbox = sandbox

    async def run(self, line: str, deadline_s: float) -> tuple[int, str]:
        running = self._sandbox.process.exec(line, timeout=math.ceil(deadline_s))
        answer = await within(deadline_s, running, waiting_for="a command in a sandbox of daytona")
        return answer.exit_code, answer.result

    async def write(self, path: str, content: bytes) -> None:
        sending = self._sandbox.fs.upload_file(content, path, _FILE_S)
        await within(_FILE_S, sending, waiting_for="a file to be sent to daytona")

    async def read(self, path: str) -> bytes:
        getting = self._sandbox.fs.download_file(path, _FILE_S)
        return await within(_FILE_S, getting, waiting_for="a file of a sandbox of daytona")

    async def delete(self) -> None:
        await within(_LIBRARY_S, self._sandbox.delete(timeout=_LIBRARY_S), waiting_for="daytona to delete a sandbox")


class Daytona:
    """Containers, without a network. Memory and disk are in whole GiB there, and rounded up."""

    name, isolation = "daytona", Isolation.NAMESPACES

    def __init__(self, image: str | None):
        self._library, self._image, self._lifetime_s = library("daytona", "daytona"), image or IMAGE, lifetime_s()
        self._client = self._library.AsyncDaytona()

    async def create(self, limits: Limits) -> Place:
        resources = self._library.Resources(
            cpu=math.ceil(limits.cpus or 1),
            memory=math.ceil(_memory_mb(limits) / 1024),
            disk=math.ceil(limits.disk_mb / 1024),
        )
        wanted = self._library.CreateSandboxFromImageParams(
            image=self._image,
            resources=resources,
            labels={"made-by": "palestra"},
            ephemeral=True,
            ttl_minutes=math.ceil(self._lifetime_s / 60),
            network_block_all=True,
        )
        making = self._client.create(wanted, timeout=_MAKE_S)
        return _DaytonaPlace(await within(_MAKE_S, making, waiting_for="daytona to make a sandbox"))

    async def close(self) -> None:
        await self._client.close()


PROVIDERS: dict[str, type[Provider]] = {"prime": Prime, "e2b": E2b, "modal": Modal, "daytona": Daytona}
