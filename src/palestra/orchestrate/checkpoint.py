"""The orchestrator's half of a checkpoint, the manifest that makes it exist, and what may be deleted after it."""

from palestra.config.schema import RunConfig
from palestra.orchestrate.journal import Journal, recover
from palestra.orchestrate.state import StepsSaved
from palestra.wire.messages import TrainerSaved
from palestra.wire.rundir import Manifest, RunDir, checkpoint_dir, drop_checkpoints, write_manifest

_SNAPSHOT = "orchestrator.msgpack"


def write_checkpoint(run: RunDir, journal: Journal, saved: TrainerSaved, attempt: int, config: RunConfig) -> None:
    """The trainer's part is complete: add the state, then the manifest; then drop what no kept checkpoint needs.

    Errors: InfrastructureError, if the disk is full; the checkpoints before stay whole.
    """
    journal.snapshot(checkpoint_dir(run, saved.version) / _SNAPSHOT)
    manifest = Manifest(version=saved.version, attempt=attempt, trainer="trainer", orchestrator=_SNAPSHOT)
    write_manifest(run, manifest)
    journal.record(StepsSaved(version=saved.version))
    kept = drop_checkpoints(run, keep=config.train.keep_checkpoints)
    if not config.log.keep_batches:
        run.batches.discard_before(kept[0].version)
        run.logprobs.discard_before(kept[0].version)


def recover_journal(run: RunDir, resumed_from: int | None) -> Journal:
    """The state of the attempt before, from the checkpoint the supervisor chose and the journal after it."""
    snapshot = None if resumed_from is None else checkpoint_dir(run, resumed_from) / _SNAPSHOT
    return recover(run.journal, snapshot)
