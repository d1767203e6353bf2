"""A directory of `palestra eval` as archives to push: one for each environment, with what it takes to play it again."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palestra.config import RunConfig, read_resolved
from palestra.config.load import flatten
from palestra.config.schema import Engine, Env, EvalSet, SamplingConfig, SandboxConfig
from palestra.core.errors import UserError
from palestra.core.records import RolloutRecord
from palestra.hub.evals.told import OVERRIDE, Evaluation, SeatTold, without_secrets
from palestra.launch.evaluation import METADATA, context_of
from palestra.wire.results import read_results
from palestra.wire.rundir import RunDir
from palestra.wire.status import read_status

_SECTIONS = {"engine": Engine(), "sampling": SamplingConfig(), "env": Env(), "sandbox": SandboxConfig()}
_OF_OPTIONS = ("sampling.max_tokens", "env.sandbox", "engine.max_in_flight")
_OF_AN_IMPORT = (
    "Imported from results of the verifiers library: the version of the environment, the library that scored it, seeds "
    "and how replies were judged are not in them. It cannot be scored again here."
)


@dataclass(frozen=True)
class ToPush:
    """One environment of an evaluation."""

    told: Evaluation
    records: list[RolloutRecord]


def told_by(directory: Path) -> Iterator[ToPush]:
    """Errors: UserError, if there is no evaluation, or one that was not finished."""
    run = RunDir(directory)
    if not run.results.exists():
        raise UserError(f"{directory} has no results.jsonl; give a directory that `palestra eval` wrote to")
    known = {name: list(records.values()) for name, records in read_results(run).items()}
    metadata = _metadata(run)
    if "imported" in metadata:
        for name, records in known.items():
            yield ToPush(_imported(name, metadata["imported"].get(name) or [{}], run), records)
        return
    if not run.config.exists():
        raise UserError(f"{directory} has no config.json beside its results, so nobody knows how they were made")
    config = read_resolved(run.config)
    for entry in config.eval.sets:
        records = known.get(entry.label, [])
        wanted = entry.num_tasks * entry.rollouts_per_task
        if len(records) < wanted:
            raise UserError(
                f"{directory} has {len(records)} of {wanted} rollouts of {entry.label}; finish it first: palestra eval "
                f"--resume {directory}"
            )
        yield ToPush(_told(run, config, entry, metadata), records)


def _metadata(run: RunDir) -> dict[str, Any]:
    path = run.path / METADATA
    try:
        found = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _told(run: RunDir, config: RunConfig, entry: EvalSet, metadata: dict[str, Any]) -> Evaluation:
    status, endpoint = read_status(run), config.eval.endpoint
    is_directory = endpoint is None and Path(config.model_dir).exists()
    overrides, missing = _overrides(config, entry)
    if is_directory:
        missing.append("The model was a directory: the command has its name, give it a path of yours.")
    version = metadata.get("environments", {}).get(entry.label, {}).get("version")
    return Evaluation(
        name=run.path.resolve().name[:200],
        environment=entry.label,
        environment_version=version or "",
        palestra=str(metadata.get("palestra") or ""),
        model=Path(config.model_dir).resolve().name if is_directory else config.model_dir,
        served="checkpoint" if endpoint is None else "endpoint",
        endpoint="" if endpoint is None else without_secrets(endpoint.url),
        split=entry.split,
        args=json.loads(json.dumps(entry.args, default=str)),
        seats={
            name: SeatTold(
                url=without_secrets(seat.url),
                model=seat.model,
                temperature=seat.temperature,
                max_tokens=seat.max_tokens,
            )
            for name, seat in entry.seats.items()
        },
        num_tasks=entry.num_tasks,
        rollouts_per_task=entry.rollouts_per_task,
        temperature=entry.temperature,
        top_p=entry.top_p,
        max_tokens=entry.max_tokens or config.sampling.max_tokens,
        seed=config.train.seed,
        sandbox=without_secrets(config.env.sandbox) if config.env.sandbox else None,
        overrides=tuple(overrides),
        started_at=status.started_at if status else None,
        ended_at=status.ended_at or None if status else None,
        missing=tuple(missing),
    )


def _overrides(config: RunConfig, entry: EvalSet) -> tuple[list[str], list[str]]:
    """What of the config its options do not say, as overrides; and in words what no override can say."""
    is_served_here = config.eval.endpoint is None
    plain = {f"{name}.{key}": value for name, of in _SECTIONS.items() for key, value in flatten(of)}
    if is_served_here:
        plain |= {f"engine.{key}": value for key, value in context_of(Path(config.model_dir)).items()}
    found, missing = [], []
    for key, value in flatten(config):
        if key in _OF_OPTIONS or plain.get(key, value) == value or (key.startswith("engine.") and not is_served_here):
            continue
        override = f"{key}={json.dumps(value, default=str)}"
        if re.match(OVERRIDE, override):
            found.append(override)
        else:
            missing.append(f"The command leaves out {override[:300]}.")
    if entry.top_p != 1.0:
        found.append(f"eval.sets.0.top_p={entry.top_p}")
    return found, missing


def _imported(name: str, sources: list[dict[str, Any]], run: RunDir) -> Evaluation:
    """What verifiers' metadata.json says, and in words what it does not."""
    first = sources[0]
    sampling = first.get("sampling_args")
    sampling = sampling if isinstance(sampling, dict) else {}
    return Evaluation(
        name=run.path.resolve().name[:200],
        environment=name,
        environment_version=_word(first.get("version_info", {}).get("env_version"))
        if isinstance(first.get("version_info"), dict)
        else "",
        model=str(first.get("model") or "unknown")[:500],
        served="elsewhere",
        args=first["env_args"] if isinstance(first.get("env_args"), dict) else {},
        num_tasks=_count(first.get("num_examples")),
        rollouts_per_task=_count(first.get("rollouts_per_example")),
        temperature=_amount(sampling.get("temperature")),
        max_tokens=_count(sampling.get("max_tokens")),
        imported="verifiers",
        missing=(_OF_AN_IMPORT,),
    )


def _word(value: Any) -> str:
    return value if isinstance(value, str) and len(value) <= 100 else ""


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**5 else None


def _amount(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and 0 <= value <= 100 else None
