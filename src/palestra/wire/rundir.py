"""The run directory: where everything of a run lies, and the attempt that is running."""

import os
import shutil
from pathlib import Path

import msgspec
from msgspec import Struct

from palestra.core.errors import InfrastructureError, UserError
from palestra.core.files import write_atomically
from palestra.wire.batches import BatchFiles
from palestra.wire.logprobs import LogprobFiles


class Attempt(Struct, frozen=True, kw_only=True):
    """One start of the run; messages of a lower `number` are refused. The supervisor writes it before others start."""

    number: int
    resumed_from: int | None  # policy version of the checkpoint, None for a fresh start
    supervisor: str  # ZeroMQ addresses
    orchestrator: str
    engines: tuple[str, ...]  # base URLs
    staging: str  # directory for weights on their way to the engines
    started_at: float


class RunDir:
    """Paths of one run; nothing is created by asking for a path."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def model(self) -> Path:
        """A model built from the config, in Hugging Face layout."""
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def restarts(self) -> Path:
        """Every process that died and was started again."""
        return self.path / "restarts.jsonl"

    @property
    def moves(self) -> Path:
        """Tasks that went from one pool of the curriculum to another, a JSON line each."""
        return self.path / "curriculum.jsonl"

    @property
    def journal(self) -> Path:
        """Everything the orchestrator decided and every engine reply, in order."""
        return self.path / "journal"

    @property
    def batches(self) -> BatchFiles:
        return BatchFiles(self.path / "batches")

    @property
    def logprobs(self) -> LogprobFiles:
        return LogprobFiles(self.path / "logprobs")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def rollouts(self) -> Path:
        """Finished rollouts, one JSON line each, a file per step; and those of evaluations."""
        return self.path / "rollouts"

    @property
    def results(self) -> Path:
        """Finished rollouts of `palestra eval`, a JSON line each."""
        return self.path / "results.jsonl"

    @property
    def published(self) -> Path:
        """Every staged version, a directory each, where `log.keep_weights` is true."""
        return self.path / "published"

    @property
    def export(self) -> Path:
        """The final weights in Hugging Face layout."""
        return self.path / "weights"

    def log(self, process: str) -> Path:
        return self.path / "logs" / f"{process}.log"

    def spans(self, process: str) -> Path:
        return self.path / "spans" / f"{process}.jsonl"

    @property
    def _attempt(self) -> Path:
        return self.path / "attempt.json"

    def write_attempt(self, attempt: Attempt) -> None:
        write_atomically(self._attempt, msgspec.json.encode(attempt))

    def read_attempt(self) -> Attempt:
        return msgspec.json.decode(self._attempt.read_bytes(), type=Attempt)

    def last_attempt_number(self) -> int:
        return self.read_attempt().number if self._attempt.exists() else 0


def link_or_copy(source: str, target: str) -> None:
    """Files of a run are replaced, never written into, so a second name for one costs nothing and risks nothing."""
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def require_run(path: Path | str) -> RunDir:
    """Errors: UserError, if there is no run in `path`."""
    run = RunDir(path)
    if not run.config.exists() and run.results.exists():
        raise UserError(
            f"{path} is an imported evaluation: it cannot be played or scored again, because its environment is not "
            "ours; `palestra eval compare` compares it with others"
        )
    if not run.config.exists():
        raise UserError(f"{path} is not a run directory: it has no config.json; `palestra runs ls` lists the runs")
    return run


class Manifest(Struct, frozen=True, kw_only=True):
    """A checkpoint. Written last: a checkpoint without its manifest does not exist."""

    version: int
    attempt: int
    trainer: str  # directories and files relative to the checkpoint's directory
    orchestrator: str


def checkpoint_dir(run: RunDir, version: int) -> Path:
    return run.checkpoints / f"{version:06d}"


def write_manifest(run: RunDir, manifest: Manifest) -> None:
    write_atomically(checkpoint_dir(run, manifest.version) / "manifest.json", msgspec.json.encode(manifest))


def read_manifests(run: RunDir) -> list[Manifest]:
    """All complete checkpoints, oldest first. Errors: InfrastructureError for a manifest that cannot be read."""
    manifests = []
    for path in sorted(run.checkpoints.glob("*/manifest.json")):
        try:
            manifests.append(msgspec.json.decode(path.read_bytes(), type=Manifest))
        except msgspec.DecodeError as error:
            raise InfrastructureError(
                f"{path} cannot be read: {error}; delete its directory to use the one before"
            ) from error
    return manifests


def newest_checkpoint(run: RunDir) -> Manifest | None:
    """The complete checkpoint of the highest version; one without its manifest does not exist."""
    return max(read_manifests(run), key=lambda manifest: manifest.version, default=None)


def version_to_load(run: RunDir, attempt: Attempt, life: int) -> int | None:
    """The checkpoint a process begins with: the attempt's, or the newest one where it has had a life in it already."""
    if life == 0:
        return attempt.resumed_from
    newest = newest_checkpoint(run)
    return None if newest is None else newest.version


def drop_checkpoints(run: RunDir, *, keep: int) -> list[Manifest]:
    """Delete all but the newest `keep`, each manifest first, so that none is half there; and what kills have left of
    older ones. Returns those kept."""
    kept = read_manifests(run)[-keep:]
    for directory in run.checkpoints.iterdir():
        if kept and directory.name.isdigit() and int(directory.name) < kept[0].version:
            (directory / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(directory)
    return kept
