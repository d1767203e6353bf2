"""Before the first process: may this run start here, from where, and at which addresses."""

import json
import re
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palestra.config import RunConfig, read_resolved
from palestra.config.load import flatten
from palestra.core.errors import UserError
from palestra.core.files import write_atomically
from palestra.core.guard import Guard
from palestra.launch.ports import free_ports, require_free
from palestra.wire.rundir import Attempt, Manifest, RunDir, newest_checkpoint
from palestra.wire.runlog import read_summary

# A resumed run may differ here: none of these changes what is trained.
_HARMLESS = (
    "log.outputs",
    "log.name",
    "log.keep_batches",
    "log.keep_rollouts",
    "log.keep_logprobs",
    "log.keep_weights",
    "log.to",
    "log.project",
    "algo.reference.max_in_flight",
    "algo.teacher.max_in_flight",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.batch_deadline_s",
    "engine.healthy_s",
    "engine.call_s",
    "engine.load_every_s",
    "engine.stream_tokens",
    "engine.kv_cache_gib",
    "engine.threads",
    "sync.staging",
    "sync.difference",
    "sync.full_every",
    "sync.local",
    "sync.deadline_s",
    "env.stall_s",
    "env.answer_s",
    "env.max_worker_gib",
    "eval.endpoint.key_env",
    "eval.endpoint.call_s",
    "eval.endpoint.max_in_flight",
)
_HARMLESS_IN_EVALUATIONS = ("engine.max_in_flight",)
_HARMLESS_SECTIONS = ("launch",)
_HARMLESS_OF_SEATS = re.compile(r"(env\.mix|eval\.sets)\.\d+\.seats\..+\.(url|key_env|call_s|max_in_flight)")
_MAX_SOCKET_PATH = 100  # the kernel's limit is 107 bytes


@dataclass(frozen=True)
class Origin:
    """Where an attempt begins: `version` of a checkpoint, or None for the beginning."""

    number: int
    version: int | None


def begin(config: RunConfig, *, resume: bool) -> Origin:
    """Where this attempt begins. Errors: UserError, if the run directory and `resume` do not go together."""
    run = RunDir(config.run_dir)
    if not run.config.exists():
        if resume:
            raise UserError(f"{run.path} has no run to resume; start it without --resume, or check log.name")
        return Origin(1, None)
    if not resume:
        raise UserError(
            f"{run.path} holds a run already: go on with it by --resume, or give another name by log.name=NAME"
        )
    as_stored = RunConfig.model_validate_json(config.model_dump_json())  # a date in TOML is a string in JSON
    _require_same(read_resolved(run.config), as_stored, run)
    newest = newest_checkpoint(run)
    _require_unfinished(run, newest, config.train.steps)
    return Origin(run.last_attempt_number() + 1, None if newest is None else newest.version)


def write_config(run: RunDir, config: RunConfig) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    write_atomically(run.config, config.model_dump_json(indent=2).encode() + b"\n")


def new_attempt(
    config: RunConfig, run: RunDir, origin: Origin, guard: Guard, *, engines: int, staging_bytes: int, started_at: float
) -> Attempt:
    """Addresses for this attempt; sockets and staged weights are removed by `guard`, however the supervisor ends.

    Errors: UserError, for a port in use or a staging directory that cannot be written.
    """
    ports = _engine_ports(config, engines)
    sockets = _private_directory()
    guard.remove(sockets)
    staging = _staging_directory(config, run, staging_bytes)
    guard.remove(staging)
    if config.sync.local is not None:
        guard.remove(config.sync.local.resolve() / staging.name)
    return Attempt(
        number=origin.number,
        resumed_from=origin.version,
        supervisor=f"ipc://{sockets}/supervisor",
        orchestrator=f"ipc://{sockets}/orchestrator",
        engines=tuple(f"http://{config.launch.host}:{port}" for port in ports),
        staging=str(staging),
        started_at=started_at,
    )


def _engine_ports(config: RunConfig, count: int) -> list[int]:
    host, first = config.launch.host, config.launch.engine_port
    if first is None:
        return free_ports(host, count)
    ports = list(range(first, first + count))
    if ports and ports[-1] > 65535:
        raise UserError(
            f"launch.engine_port={first} leaves no port for engine.replicas={count}; give {65536 - count} at most"
        )
    for port in ports:
        require_free(host, port, field="launch.engine_port")
    return ports


def _private_directory() -> Path:
    """A new directory of mode 0700 whose sockets have addresses the kernel accepts."""
    parent = tempfile.gettempdir()
    is_short = len(parent) + len("/palestra-12345678/orchestrator") < _MAX_SOCKET_PATH
    return Path(tempfile.mkdtemp(prefix="palestra-", dir=parent if is_short else "/tmp"))


def _staging_directory(config: RunConfig, run: RunDir, needed_bytes: int) -> Path:
    """`sync.staging`, or shared memory where there is room for `needed_bytes`, or beside the run."""
    shared = Path("/dev/shm")
    if config.sync.staging is not None:
        parent = config.sync.staging
    elif shared.is_dir() and shutil.disk_usage(shared).free > 2 * needed_bytes:
        parent = shared
    else:
        parent = run.path
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"palestra-{run.name}-", dir=parent))
    except OSError as error:
        raise UserError(f"sync.staging={parent} cannot be used: {error.strerror}; give a directory of yours") from error


def _require_same(stored: RunConfig, wanted: RunConfig, run: RunDir) -> None:
    before, after = _flat(stored), _flat(wanted)
    free = _HARMLESS + (_HARMLESS_IN_EVALUATIONS if stored.is_eval else ())
    differing = [key for key in {**before, **after} if before.get(key) != after.get(key) and not _may_change(key, free)]
    if wanted.train.steps >= stored.train.steps and "train.steps" in differing:
        differing.remove("train.steps")
    if differing:
        lines = [f"{key}: {_text(before.get(key))} in the run, {_text(after.get(key))} now" for key in differing]
        raise UserError(
            f"{run.path} was started with another config; give it the same one, or a new name by log.name=NAME:\n  "
            + "\n  ".join(lines)
        )


def _flat(config: RunConfig) -> dict[str, Any]:
    """Dotted keys and values, those of the models of seats too."""
    found: dict[str, Any] = {}
    for key, value in flatten(config):
        models = value.items() if key.endswith(".seats") else ()
        found |= dict(row for seat, model in models for row in flatten(model, f"{key}.{seat}.")) or {key: value}
    return found


def _may_change(key: str, free: Collection[str]) -> bool:
    is_harmless = key in free or key.split(".")[0] in _HARMLESS_SECTIONS
    return is_harmless or _HARMLESS_OF_SEATS.fullmatch(key) is not None


def _text(value: object) -> str:
    return "nothing" if value is None else json.dumps(value, default=str)


def _require_unfinished(run: RunDir, newest: Manifest | None, steps: int) -> None:
    if read_summary(run) is not None and newest is not None and newest.version >= steps:
        raise UserError(
            f"{run.path} is finished: {newest.version} of train.steps={steps} are done; raise train.steps to train "
            f"further, or look at it with `palestra runs show {run.name}`"
        )
