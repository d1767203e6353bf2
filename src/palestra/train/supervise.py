"""Supervised steps: the warm-up before version 0, and the whole of a run without environments.

Consumes: `data.sources`. Produces: a policy version per step, checkpoints, the export; rows of the run's log.
Waits for: the other ranks, and for a checkpoint's files before the next one or the end. Ends when: all steps are done.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress

from palestra.config import RunConfig
from palestra.core.clock import unix_now
from palestra.core.errors import UserError
from palestra.core.ledger import Ledger, LedgerEntry, total
from palestra.core.metrics import Metrics, Sum
from palestra.core.process import life
from palestra.env.chat import load_tokenizer
from palestra.model.files import tokenizer_directory
from palestra.train.data import SftStream, sft_batch
from palestra.train.optimizer import training_rate, warmup_rate
from palestra.train.ranks import Ranks
from palestra.train.trainer import Trainer
from palestra.wire.batches import Batch
from palestra.wire.messages import Progress
from palestra.wire.rundir import Attempt, Manifest, RunDir, drop_checkpoints, version_to_load, write_manifest
from palestra.wire.runlog import RunLog, as_rows, read_restarts


def open_stream(config: RunConfig) -> SftStream:
    if not config.data.sources:
        raise UserError("neither env.mix nor data.sources is given: there is nothing to train on; add one of them")
    return SftStream(
        config.data.sources,
        load_tokenizer(tokenizer_directory(config.model_dir)),
        max_tokens=min(config.data.max_tokens, config.train.max_pack_tokens),
        shuffle_rows=config.data.shuffle_rows,
        seed=config.train.seed,
    )


def warm_up(trainer: Trainer, config: RunConfig, ledger: Ledger, on_step: Callable[[int, Metrics], None]) -> None:
    """Take `data.warmup.steps` supervised steps; then the policy is version 0, with a fresh optimizer."""
    warmup = config.data.warmup
    if not warmup.steps:
        return
    with ledger.spend("warmup"):
        trainer.use_fresh_optimizer(warmup_rate(warmup))
        stream = open_stream(config)
        for _ in range(warmup.steps):
            batch = _next_batch(stream, trainer, config, warmup.samples_per_step, attempt=0)
            metrics = trainer.train(batch, Ledger("warmup"))  # its parts are all booked as `warmup`
            on_step(trainer.version - 1, metrics | _data_metrics(stream))
        trainer.use_fresh_optimizer(training_rate(config.train))


def supervise(
    config: RunConfig, run: RunDir, attempt: Attempt, ranks: Ranks, ledger: Ledger, tell: Callable[[Progress], None]
) -> None:
    trainer = Trainer(config, ranks, ledger)
    stream = open_stream(config)
    if (version := version_to_load(run, attempt, life())) is not None:
        with ledger.spend("load"):
            stream.restore(trainer.resume(version, ledger))
    report = Report(config, run, attempt, tell) if ranks.is_first else None
    ledger.switch("other")
    try:
        _train(trainer, stream, config, run, attempt, ledger, report)
    except Exception:
        with suppress(Exception):
            _count_saved(trainer, config, run, attempt, ledger)  # it counts, whatever ended the run
        raise
    directory = trainer.export(ledger)
    entries = ranks.to_first(ledger.close())
    if report is not None:
        report.end(str(directory), entries)


def _train(
    trainer: Trainer,
    stream: SftStream,
    config: RunConfig,
    run: RunDir,
    attempt: Attempt,
    ledger: Ledger,
    report: "Report | None",
) -> None:
    """All steps and their checkpoints."""
    for metrics in _steps(trainer, stream, config, attempt, ledger):
        entries = trainer.ranks.to_first(ledger.close())
        if report is not None:
            report.step(trainer.version - 1, metrics, entries)
        if trainer.has_saved:
            _count_saved(trainer, config, run, attempt, ledger)
        if trainer.version % config.train.checkpoint_every == 0 or trainer.version == config.train.steps:
            _count_saved(trainer, config, run, attempt, ledger)
            trainer.save(ledger, stream.state())
    _count_saved(trainer, config, run, attempt, ledger)


def _steps(
    trainer: Trainer, stream: SftStream, config: RunConfig, attempt: Attempt, ledger: Ledger
) -> Iterator[Metrics]:
    while trainer.version < config.train.steps:
        with ledger.spend("read_batch"):
            batch = _next_batch(stream, trainer, config, config.train.samples_per_step, attempt.number)
        yield trainer.train(batch, ledger) | _data_metrics(stream)


def _next_batch(stream: SftStream, trainer: Trainer, config: RunConfig, num_samples: int, attempt: int) -> Batch:
    """Every rank draws the same rows and trains its own packs of them."""
    return sft_batch(
        stream.take(num_samples),
        step=trainer.version,
        attempt=attempt,
        max_pack_tokens=config.train.max_pack_tokens,
        num_ranks=trainer.ranks.meshes.num_data,
    )


def _data_metrics(stream: SftStream) -> Metrics:
    return {"data/rows/dropped": Sum(stream.take_dropped())}


def _count_saved(trainer: Trainer, config: RunConfig, run: RunDir, attempt: Attempt, ledger: Ledger) -> None:
    """When the files are whole: the manifest, then the oldest checkpoints beyond `train.keep_checkpoints` go."""
    written = trainer.finish_save(ledger)
    if written is not None and trainer.ranks.is_first:
        manifest = Manifest(version=written.version, attempt=attempt.number, trainer="trainer", orchestrator="")
        write_manifest(run, manifest)
        drop_checkpoints(run, keep=config.train.keep_checkpoints)


class Report:
    """What a supervised run tells: rows of metrics and ledger, progress, and the summary."""

    def __init__(self, config: RunConfig, run: RunDir, attempt: Attempt, tell: Callable[[Progress], None]):
        self._started_at = attempt.started_at
        self._steps, self._tell, self._run, self._log = config.train.steps, tell, run, RunLog(run)
        self._entries: list[LedgerEntry] = []
        self._loss = float("nan")

    def step(self, step: int, metrics: Metrics, entries: list[LedgerEntry]) -> None:
        """`entries`: one of every rank, the first rank's first."""
        self._log.metrics(step, metrics)
        self._record(entries)
        self._loss = metrics["train/ce/loss"].value
        numbers = {"loss": self._loss, "tokens/s": metrics["train/tokens_per_s"].value}
        self._tell(Progress(process="trainer", stage="training", step=step + 1, steps=self._steps, numbers=numbers))

    def end(self, directory: str, entries: list[LedgerEntry]) -> None:
        self._record(entries)
        whole = total(self._entries)
        self._log.summary(
            {
                "steps": self._steps,
                "wall_s": unix_now() - self._started_at,
                **({} if math.isnan(self._loss) else {"loss": self._loss}),  # a life that only exports has none
                "weights": directory,
                "ledger_closure": whole.closure,
                "restarts": as_rows(read_restarts(self._run)),
            }
        )
        self._log.close()

    def _record(self, entries: list[LedgerEntry]) -> None:
        self._entries.append(entries[0])
        for entry in entries:
            self._log.ledger(entry)
