"""Examine one version of an environment: its files go into a sandbox, its laws are judged out here.

A sandbox for the build of its sdist and another for the rest, so that a build cannot prepare its own examination. Both
have the hub's Python and library, read-only, no network unless an index is allowed, and bounds on memory, processes,
disk and time. A verdict is never what a program in there said: see `palestra.env.subject`.
"""

import asyncio
import configparser
import time
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from palestra.core.errors import UserError
from palestra.env.case import Case
from palestra.env.check import Check
from palestra.env.load import GROUP
from palestra.env.subject import Boxed, Failure
from palestra.hub.registry.artefact import BadArtefactError, require_deflate
from palestra.hub.trust.verdict import MOST_LOG, Status, Verdict
from palestra.sandbox.box import Sandbox
from palestra.sandbox.records import IsolationError, Result, SandboxError, SandboxStartError, UnsupportedError

_TOOLS = ("pip", "setuptools")
_SITE = "site"
_PIP = ("python3", "-m", "pip", "--disable-pip-version-check", "--no-input", "--no-cache-dir", "-q")
_MISSING = "No matching distribution found"


@dataclass(frozen=True)
class Means:
    """`index`: where its dependencies may come from, such as https://pypi.org/simple; empty: only what is here."""

    backend: str | None = None
    index: str = ""
    index_hosts: tuple[str, ...] = ()  # beside the index's own: where its files are
    memory_mb: int = 2048
    disk_mb: int = 1024
    processes: int = 128
    num_tasks: int = 5
    install_s: float = 180.0
    answer_s: float = 60.0
    longest_s: float = 600.0


class NotRunError(Exception):
    """There is no way to look."""


class BadError(Exception):
    """What was pushed cannot be examined, through a fault of its own."""


@dataclass
class _Log:
    """The first MOST_LOG bytes of all that was said."""

    text: str = ""

    def add(self, what: str) -> None:
        self.text = (self.text + what.rstrip() + "\n")[:MOST_LOG]

    def ran(self, command: Sequence[str], result: Result) -> None:
        self.add(f"$ {' '.join(command)}\n{result.stdout}{result.stderr}[{result.status} after {result.wall_s:.1f} s]")


async def examine(files: Sequence[Path], means: Means) -> Verdict:
    """`files`: one version's wheel, or sdist, or both. Errors: SandboxError, for a failure of this machine."""
    log, began = _Log(), time.monotonic()
    cases: dict[str, list[Case]] = {}
    try:
        async with asyncio.timeout(means.longest_s):
            await _examined(files, means, log, cases)
        failed = any(case.ending == "failed" for of in cases.values() for case in of)
        status, why = (Status.FAILED, "a law does not hold") if failed else (Status.PASSED, "")
    except TimeoutError:
        status, why = Status.FAILED, f"it was not done after {means.longest_s:g} s"
    except (BadError, Failure) as error:
        status, why = Status.FAILED, str(error)
    except (NotRunError, IsolationError, SandboxStartError, UnsupportedError, UserError) as error:
        status, why = Status.NOT_RUN, str(error)
    log.add(f"{status.value}{f': {why}' if why else ''}")
    return Verdict(status=status, why=why, seconds=time.monotonic() - began, cases=cases, log=log.text)


async def _examined(files: Sequence[Path], means: Means, log: _Log, cases: dict[str, list[Case]]) -> None:
    wheel = next((file for file in files if file.suffix == ".whl"), None)
    content = await asyncio.to_thread(wheel.read_bytes) if wheel else b""
    name = wheel.name if wheel else ""
    for sdist in (file for file in files if file.suffix != ".whl"):
        built_name, built = await _build(sdist, means, log)
        cases["build"] = [Case(name="its sdist builds", ending="passed")]
        if wheel is None:
            name, content = built_name, built
    ids = _offered(name, content)
    async with _sandbox(means) as box:
        env = await _install(box, name, content, means, log)
        for id in ids:
            cases[id] = []
            await _judge(box, id, env, means, log, cases[id])


def _sandbox(means: Means):
    egress = tuple(filter(None, (urlsplit(means.index).netloc, *means.index_hosts))) if means.index else ()
    return Sandbox.create(
        backend=means.backend,
        packages=(*library(), *_TOOLS),
        memory_mb=means.memory_mb,
        disk_mb=means.disk_mb,
        processes=means.processes,
        timeout_s=means.longest_s + 60,
        egress=egress,
        labels=("hub-check",),
    )


def library(name: str = "palestra") -> tuple[str, ...]:
    """The library and what it needs, as they are installed here. Errors: NotRunError."""
    found: dict[str, None] = {}
    left = [name]
    while left:
        known = canonicalize_name(left.pop())
        if known in found:
            continue
        try:
            requires = distribution(known).requires or []
        except PackageNotFoundError:
            if known == name:
                raise NotRunError(f"{name} is not installed here, so nothing can be examined with it") from None
            continue
        found[known] = None
        wanted = [Requirement(text) for text in requires]
        left += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return tuple(sorted(found))


async def _build(sdist: Path, means: Means, log: _Log) -> tuple[str, bytes]:
    """Name and content of the wheel. Errors: BadError."""
    async with _sandbox(means) as box:
        await box.write(sdist.name, await asyncio.to_thread(sdist.read_bytes))
        command = [*_PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", "built", sdist.name]
        result = await box.exec(command, timeout_s=means.install_s)
        log.ran(command, result)
        if result.status != "ok":
            raise BadError(f"its sdist does not build: {_last(result)}")
        built = [file.path for file in await box.list_files("built") if file.path.endswith(".whl")]
        if len(built) != 1:
            raise BadError(f"its sdist builds {len(built)} wheels; one is needed")
        return built[0], await box.read(f"built/{built[0]}", 0, means.disk_mb << 20)


def _offered(name: str, content: bytes) -> list[str]:
    """Ids of the environments that a wheel offers. Its code is not run. Errors: BadError."""
    import io

    parser = configparser.ConfigParser(delimiters=("=",), strict=False, interpolation=None)
    parser.optionxform = str  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            places = [one for one in archive.namelist() if one.count("/") == 1 and one.endswith("/entry_points.txt")]
            for place in places:
                require_deflate(archive.getinfo(place))
                with archive.open(place) as file:
                    parser.read_string(file.read(1 << 20).decode("utf-8", "replace"))
    except (zipfile.BadZipFile, zlib.error, configparser.Error, OSError, ValueError, BadArtefactError) as error:
        raise BadError(f"{name} cannot be read: {error}") from None
    found = list(parser[GROUP]) if parser.has_section(GROUP) else []
    if not found:
        raise BadError(f"it offers no environment: add [project.entry-points.{GROUP!r}] to its pyproject.toml")
    return found[:20]


async def _install(box: Sandbox, name: str, content: bytes, means: Means, log: _Log) -> dict[str, str]:
    """What programs must have in their environment to find it. Errors: BadError, NotRunError."""
    await box.write(name, content)
    source = ["--index-url", means.index] if means.index else ["--no-index"]
    command = [*_PIP, "install", "--prefix", _SITE, "--no-warn-script-location", *source, name]
    result = await box.exec(command, timeout_s=means.install_s)
    log.ran(command, result)
    if result.status != "ok":
        if _MISSING in result.stderr and not means.index:
            raise NotRunError(f"what it depends on is not here, and no index is allowed: {_last(result)}")
        raise BadError(f"it cannot be installed: {_last(result)}")
    found = await box.exec(["python3", "-c", _WHERE, _SITE], timeout_s=20)
    return {"PYTHONPATH": found.stdout.strip()}


_WHERE = (
    "import os, sys, sysconfig; base = os.path.abspath(sys.argv[1]); "
    "print(sysconfig.get_path('purelib', 'posix_prefix', {'base': base}) + ':' + os.environ.get('PYTHONPATH', ''))"
)


async def _judge(box: Sandbox, id: str, env: dict[str, str], means: Means, log: _Log, cases: list[Case]) -> None:
    subject = Boxed(box, id, {}, num_tasks=means.num_tasks, env=env, answer_s=means.answer_s)
    try:
        async for case in Check(subject).cases():
            cases.append(case)
            log.add(f"{id}: {case.ending}: {case.name}{f': {case.detail}' if case.detail else ''}")
    except Failure as failure:
        cases.append(Case(name="it answers", ending="failed", detail=str(failure)))
        log.add(f"{id}: failed: it answers: {failure}")
    except SandboxError as error:
        cases.append(Case(name="its sandbox stays", ending="failed", detail=str(error)))
        log.add(f"{id}: failed: its sandbox stays: {error}")
    finally:
        if subject.said:
            log.add(f"{id} printed:\n{subject.said.decode('utf-8', 'replace')}")
        await subject.close()


def _last(result: Result) -> str:
    said = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
    return f"{result.status}: {' / '.join(said[-3:])[-600:]}"
