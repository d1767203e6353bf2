"""A trainer process whose policy is a table: the real loop, messages, batches and checkpoints' rules, without torch."""

import functools
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec

from palestra.config import RunConfig
from palestra.config.schema import Sync
from palestra.core.errors import InfrastructureError
from palestra.core.files import write_atomically
from palestra.core.ledger import Ledger, LedgerEntry
from palestra.core.metrics import Mean, Metrics
from palestra.core.process import life
from palestra.core.spans import SpanLog
from palestra.train import __main__ as program
from palestra.train.background import Background, Written
from palestra.train.reinforce import Loop, Orchestrator, device_of
from palestra.wire.batches import Batch
from palestra.wire.messages import Done, Ready, TrainerReady
from palestra.wire.rundir import Attempt, RunDir, checkpoint_dir, version_to_load
from palestra.wire.weights.manifest import Probe, Staged
from tests.fault.device import Device
from tests.fault.table import FILE, Table, stage
from tests.fault.witness import Witness, faults_directory

KEPT_VERSIONS, PROBE = 3, [3 + (7 * position) % 90 for position in range(48)]
_STATE = "state.json"


class OneRank:
    """The ranks of a trainer that is alone."""

    rank, num, is_first = 0, 1, True

    def from_first(self, thing):
        return thing

    def to_first(self, thing: LedgerEntry) -> list[LedgerEntry]:
        return [thing]


class TableTrainer:
    """The table at `version`. A step takes `step_s`, which stands for what a model would compute."""

    def __init__(self, config: RunConfig, ranks: OneRank, *, step_s: float):
        self._config, self._run, self.ranks = config, RunDir(config.run_dir), ranks
        self._step_s, self._witness = step_s, Witness(faults_directory())
        self.version, self.table, self.saved_version = 0, Table.load(Path(config.model_dir) / FILE), -1
        self._background = Background(deadline_s=config.train.batch_deadline_s)

    def train(self, batch: Batch, ledger: Ledger) -> Metrics:
        if batch.step != self.version:
            raise InfrastructureError(
                f"got the batch of step {batch.step}, but the trainer holds version {self.version}"
            )
        with ledger.spend("forward_backward"):
            time.sleep(self._step_s)
            self.table = self.table.trained(batch, self._config.train.lr)
        self.version += 1
        self._witness.trained(batch.step, sorted(set(batch.rollout.tolist())))
        return {"train/tokens": Mean(batch.num_tokens)}

    def save(self, ledger: Ledger, *, on_end: Callable[[], None]) -> None:
        directory = checkpoint_dir(self._run, self.version) / "trainer"
        with ledger.spend("checkpoint"):
            write = functools.partial(self.write, self.table, self.version, directory)
            self._background.begin(self.version, directory, write, on_end)
        self.saved_version = self.version

    def write(self, table: Table, version: int, directory: Path) -> None:
        """In the thread; a step trains a new table."""
        directory.mkdir(parents=True, exist_ok=True)
        table.save(directory / FILE)
        self.go_on_writing()
        write_atomically(directory / _STATE, msgspec.json.encode({"version": version}))

    def go_on_writing(self) -> None:
        """A point to be killed at: half of the files are there."""

    def finish_save(self, ledger: Ledger) -> Written | None:
        with ledger.spend("checkpoint"):
            return self._background.finish()

    def resume(self, version: int) -> None:
        directory = checkpoint_dir(self._run, version) / "trainer"
        self.table = Table.load(directory / FILE)
        self.version = self.saved_version = msgspec.json.decode((directory / _STATE).read_bytes())["version"]

    def export(self, ledger: Ledger) -> Path:
        with ledger.spend("export"):
            self._run.export.mkdir(exist_ok=True)
            self.table.save(self._run.export / FILE)
        return self._run.export


class TableSender:
    """Says what vLLM's trainer side says; what it sends lies where its `update` tells."""

    def __init__(self, trainer: TableTrainer, directory: Path, attempt: int):
        self._trainer, self._directory, self._attempt = trainer, directory, attempt
        self.base = self.mark = ""  # of what is sent: as `wire.weights.changes` has them

    def send(self, ask: Callable, *, num_workers: int, is_new_group: bool, deadline_s: float) -> None:
        if is_new_group:
            ask("init", {"rank_offset": 1, "world_size": 1 + num_workers})
        directory, version = Path(tempfile.mkdtemp(dir=self._directory)) / "sent", self._trainer.version
        stage(self._trainer.table, directory, version, self._attempt, self.mark)
        ask("update", {"directory": str(directory), "version": version, "base": self.base})


class TablePublisher:
    """The rules of `train.publish.Publisher`: a version stays until a later one is loaded, the first one is files."""

    def __init__(self, trainer: TableTrainer, directory: Path, attempt: int, sync: Sync):
        self._trainer, self._directory, self._attempt, self._sync = trainer, directory, attempt, sync
        self.sender = TableSender(trainer, directory, attempt)
        self._previous: list[float] | None = None
        self._mark = ""
        self._staged: list[int] = []

    @property
    def is_full(self) -> bool:
        return len(self._staged) >= KEPT_VERSIONS

    def stage(self, version: int, ledger: Ledger, *, as_files: bool = False) -> Staged:
        mark = f"{self._attempt}.{life()}.{version}"
        if self._sync.is_sent and self._previous is not None and not as_files:
            self.sender.base = self._mark if self._sync.kind == "sparse_nccl" else ""
            self.sender.mark = self._mark = mark
            return Staged(
                version=version, directory="", probe=self._probe(), is_sent=True, mark=mark, base=self.sender.base
            )
        self._mark = mark
        directory = self._directory / (f"v{version:06d}" + (f".{life()}" if life() else ""))
        self._staged = [*(staged for staged in self._staged if staged != version), version]
        with ledger.spend("stage"):
            stage(self._trainer.table, directory, version, self._attempt, mark)
        return Staged(version=version, directory=str(directory), probe=self._probe(), mark=mark)

    def _probe(self) -> Probe:
        logprobs = self._trainer.table.score(PROBE)
        previous = self._previous if self._previous != logprobs else None
        self._previous = logprobs
        return Probe(token_ids=PROBE, logprobs=logprobs, previous_logprobs=previous)

    def loaded(self, version: int) -> None:
        self._staged = [staged for staged in self._staged if staged >= version]


def _run(config: RunConfig, run: RunDir, attempt: Attempt, ledger: Ledger, supervisor) -> None:
    """As `train.reinforce`, with the table in the model's place."""
    ranks, step_s = OneRank(), float(msgspec.json.decode((faults_directory() / "pace.json").read_bytes()))
    trainer = TableTrainer(config, ranks, step_s=step_s)
    supervisor.send(Ready(process="trainer"))
    orchestrator = Orchestrator(config, attempt, ranks, ledger)  # type: ignore[arg-type]
    publisher = TablePublisher(trainer, Path(attempt.staging), attempt.number, config.sync)
    device = device_of(config, orchestrator, ledger)
    device.keep(Device(Witness(faults_directory()), "trainer"))
    with closing(SpanLog(run.spans("trainer-0"), "trainer-0")) as spans:
        loop = Loop(trainer, publisher, orchestrator, run, attempt, ledger, spans, device, config.sync.deadline_s)  # type: ignore[arg-type]
        with device.taken():
            if (version := version_to_load(run, attempt, life())) is not None:
                trainer.resume(version)
            loop.stage()
        orchestrator.tell(TrainerReady(version=trainer.version))
        ledger.switch("other")
        loop.serve()
    supervisor.send(Done(process="trainer"))


def main() -> int:
    """The real program around it: what it says when it fails, and how it ends."""
    program._run = _run
    return program.main(sys.argv[1])
