"""A row is verified when its rollouts, scored again in a sandbox by the version of the environment that they name, have
the same rewards. What cannot be scored again is told apart from what came out otherwise.

The sandbox sees palestra, what palestra is built on, and the environment's wheel, unpacked; no network.
"""

import importlib.metadata
import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from packaging.requirements import Requirement
from sqlalchemy import Row, select, update

import palestra
from palestra.core.errors import PalestraError, UserError
from palestra.core.records import RolloutRecord
from palestra.env.again import ASKED, ROLLOUTS, VERDICT, Asked, Verdict
from palestra.hub.evals import board
from palestra.hub.evals.told import Evaluation
from palestra.hub.registry import audit
from palestra.hub.registry.hub import Hub
from palestra.hub.registry.rights import Who
from palestra.hub.registry.schema import dependencies, environments, evaluations, files, owners
from palestra.sandbox import Host, Limits, Options, Sandbox

_MOST_BYTES = 256 << 20  # of rollouts without their tokens
_MOST_VERDICT = 1 << 20
_DEADLINE_S = 900.0
_VERIFIER = Who(name="verifier")
_SITE, _ASKED, _OWN = "environment", "asked", "library"


def waiting(hub: Hub) -> list[str]:
    """Evaluations that nobody has scored again, the oldest first."""
    with hub.database.read() as connection:
        found = select(evaluations.c.id).where(evaluations.c.status == board.NEW)
        return list(connection.execute(found.order_by(evaluations.c.created)).scalars())


async def verify(hub: Hub, id: str, *, backend: str | None, say: Callable[[str], None]) -> str:
    """Its status afterwards. Errors: UserError, for a sandbox that cannot be had here."""
    row = _row(hub, id)
    told = Evaluation.model_validate_json(row.settings)
    with tempfile.TemporaryDirectory(prefix="palestra-verify-") as place:
        verdict = _prepared(hub, row, told, Path(place))
        verdict = verdict or await _judged(Path(place), backend, _packages(_needed(hub, row)))
    status, note = _status(verdict)
    _record(hub, row, status, note)
    say(f"{row.owner}/{row.environment} {id[:8]}: {status}{f': {note}' if note else ''}")
    return status


def _row(hub: Hub, id: str) -> Row[Any]:
    columns = (evaluations, environments.c.name.label("environment"), owners.c.name.label("owner"))
    found = select(*columns).join(environments, environments.c.id == evaluations.c.environment_id)
    with hub.database.read() as connection:
        row = connection.execute(
            found.join(owners, owners.c.id == environments.c.owner_id).where(evaluations.c.id == id)
        ).first()
    if row is None:
        raise UserError(f"there is no evaluation {id[:40]}")
    return row


# --- what goes into the sandbox


def _prepared(hub: Hub, row: Row[Any], told: Evaluation, place: Path) -> Verdict | None:
    """Files for the sandbox; or why there is nothing to run."""
    if told.num_tasks is None or told.rollouts_per_task is None or told.imported:
        return Verdict(problem="It was imported: how it was played is not known well enough.")
    wheel = _wheel(hub, row)
    if wheel is None:
        return Verdict(problem=f"This hub has no wheel of version {told.environment_version or '?'} to score it with.")
    with hub.blobs.open(wheel) as blob, zipfile.ZipFile(blob) as archive:
        archive.extractall(place / _SITE)  # its names were checked when it was pushed
    asked = Asked(
        environment=told.environment,
        split=told.split or "test",
        args=told.args,
        num_tasks=told.num_tasks,
        rollouts_per_task=told.rollouts_per_task,
    )
    (place / _ASKED).mkdir()
    (place / _ASKED / ASKED).write_bytes(msgspec.json.encode(asked))
    num_bytes = _write_light(hub.unpacked.open(row.blob_sha256).run.run.results, place / _ASKED / ROLLOUTS)
    return Verdict(problem=f"Its rollouts have {num_bytes:,} bytes, which is too much.") if num_bytes else None


def _wheel(hub: Hub, row: Row[Any]) -> str | None:
    if row.version_id is None:
        return None
    with hub.database.read() as connection:
        found = select(files.c.sha256).where(files.c.version_id == row.version_id, files.c.kind == "wheel")
        return connection.execute(found.order_by(files.c.filename)).scalar()


def _write_light(source: Path, to: Path) -> int:
    """Without token ids, which no reward sees; 0, or their size if it is too much."""
    total = 0
    with source.open("rb") as lines, to.open("wb") as file:
        for line in lines:
            record = msgspec.json.decode(line, type=RolloutRecord)
            seats = tuple(msgspec.structs.replace(seat, samples=()) for seat in record.seats)
            total += file.write(msgspec.json.encode(msgspec.structs.replace(record, seats=seats)) + b"\n")
            if total > _MOST_BYTES:
                return total
    return 0


# --- the sandbox


async def _judged(place: Path, backend: str | None, packages: list[str]) -> Verdict:
    """Errors: UserError, IsolationError."""
    options = Options(backend=backend, packages=tuple(packages))
    limits = Limits(memory_mb=2048, disk_mb=1024)
    async with Host(options, warm=0) as host:
        async with await host.create(limits=limits, timeout_s=_DEADLINE_S + 60) as sandbox:
            await _upload(sandbox, place)
            search = f"{sandbox.home}/{_OWN}:{sandbox.home}/{_SITE}:/opt/site-packages"
            result = await sandbox.exec(
                ["python3", "-m", "palestra.env.again", _ASKED], env={"PYTHONPATH": search}, timeout_s=_DEADLINE_S
            )
            return await _verdict(sandbox, result)


async def _upload(sandbox: Sandbox, place: Path) -> None:
    for name in (_SITE, _ASKED):
        await sandbox.upload_dir(place / name, name)
    own = Path(palestra.__file__).parent
    for file in sorted(own.rglob("*.py")):
        if file.relative_to(own).parts[0] in ("core", "config", "wire", "env", "sandbox", "algo", "__init__.py"):
            await sandbox.write(f"{_OWN}/palestra/{file.relative_to(own).as_posix()}", file.read_bytes())


async def _verdict(sandbox: Sandbox, result: Any) -> Verdict:
    try:
        return msgspec.json.decode(await sandbox.read(f"{_ASKED}/{VERDICT}", 0, _MOST_VERDICT), type=Verdict)
    except (OSError, msgspec.MsgspecError):
        said = result.stderr.decode(errors="replace") if isinstance(result.stderr, bytes) else str(result.stderr)
        return Verdict(problem=f"Scoring it again ended with {result.status}: {said.strip()[-500:]}")


def _needed(hub: Hub, row: Row[Any]) -> list[str]:
    """What the environment says that it needs."""
    found = select(dependencies.c.name).where(dependencies.c.version_id == row.version_id)
    with hub.database.read() as connection:
        return list(connection.execute(found).scalars())


def _packages(needed: list[str]) -> list[str]:
    """Distributions that palestra is built on, and those `needed`, with all that they are built on, as far as they are
    installed here: none is fetched."""
    found: dict[str, None] = {}
    open = ["palestra", *needed]
    while open:
        name = open.pop()
        try:
            wanted = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if name in found:
            continue
        found[name] = None
        requirements = [Requirement(text) for text in wanted]
        open += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [name for name in found if name != "palestra"]


# --- what it means


def _status(verdict: Verdict) -> tuple[str, str]:
    if verdict.problem:
        return board.UNVERIFIABLE, verdict.problem[:1000]
    if verdict.is_same:
        return board.VERIFIED, ""
    failed = [other for other in verdict.others if other.now is None]
    if failed and len(failed) == len(verdict.others):
        return board.UNVERIFIABLE, f"Scoring rollout {failed[0].rollout_id} again failed: {failed[0].why}"[:1000]
    first = next(other for other in verdict.others if other.now is not None)
    num = verdict.num_rollouts - verdict.num_same
    note = (
        f"Scored again, {num} of {verdict.num_rollouts} rollouts have another reward: rollout {first.rollout_id} had "
        f"{first.before:g} and has {first.now:g}."
    )
    return board.DIFFERS, note


def _record(hub: Hub, row: Row[Any], status: str, note: str) -> None:
    numbers = json.loads(row.numbers) | {"note": note}
    values = {"status": status, "verified": status == board.VERIFIED, "numbers": json.dumps(numbers)}
    with hub.database.write() as connection:
        connection.execute(update(evaluations).where(evaluations.c.id == row.id).values(**values))
        subject = f"{row.owner}/{row.environment}"
        audit.record(connection, _VERIFIER, "evaluation.verify", subject, id=row.id, status=status, note=note)


async def verify_waiting(hub: Hub, *, backend: str | None, say: Callable[[str], None]) -> int:
    """All that wait; how many. One that fails for reasons of this machine is left waiting. Errors: as `verify`."""
    ids = waiting(hub)
    for id in ids:
        try:
            await verify(hub, id, backend=backend, say=say)
        except UserError:
            raise
        except PalestraError as error:
            say(f"{id[:8]} is left for later: {error}")
    return len(ids)
