"""The parts a bench is made of: ordinary runs, some led by the bare client first; replays of a trainer alone.

A part that is finished in the outputs directory is read, not run again: a bench that was interrupted goes on.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from palestra.config import RunConfig, read_resolved
from palestra.core.errors import UserError
from palestra.core.files import write_atomically
from palestra.core.ledger import LedgerEntry
from palestra.launch import replay
from palestra.launch import run as training
from palestra.launch.bench.bare import Alone
from palestra.launch.bench.lead import ONLY, Pass, read_alone
from palestra.launch.bench.neutral import neutral_load
from palestra.launch.bench.others import Used
from palestra.launch.machine import this_machine
from palestra.launch.plan import Plan, config_path, make_plan
from palestra.launch.start import Origin
from palestra.wire.batches import Batch
from palestra.wire.rundir import RunDir, link_or_copy
from palestra.wire.runlog import read_ledger, read_metrics
from palestra.wire.status import State, read_status

_OTHERS = "cpu-by-others.json"


@dataclass(frozen=True)
class Part:
    """A finished run."""

    config: RunConfig
    run: RunDir

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_metrics(self.run)

    @property
    def entries(self) -> list[LedgerEntry]:
        return read_ledger(self.run)

    @property
    def spans(self) -> list[dict[str, Any]]:
        """Of the orchestrator."""
        return [json.loads(line) for line in self.run.spans("orchestrator").read_text().splitlines()]

    @property
    def cpu_by_others(self) -> float | None:
        """Share of all processors while it ran; None, where that is not known."""
        known = self.run.path / _OTHERS
        return json.loads(known.read_text()) if known.exists() else None

    @property
    def alone(self) -> list[Alone]:
        return read_alone(self.run)


@dataclass(frozen=True)
class Bench:
    """Where the parts lie and what they have in common."""

    base: RunConfig
    outputs: Path

    def variant(self, name: str, *, args: dict[str, Any] | None = None, **sections: dict[str, Any]) -> RunConfig:
        """The base with other values; `args` are the environment's."""
        tree = self.base.model_dump(mode="json")
        for section, fields in {**sections, "log": {"name": name, "outputs": str(self.outputs)}}.items():
            tree[section] |= fields
        tree["env"]["mix"][0]["args"] |= args or {}
        tree["launch"]["turns"] = False  # parts of it are measured alone, and nobody would give them turns
        return RunConfig.model_validate(tree)

    def loop(self, config: RunConfig, *, alone: Sequence[Pass] = ()) -> Part:
        """A run, after the bare client has measured its engines."""
        run = RunDir(config.run_dir)
        if not _is_finished(config):
            plan = training.plan_of(config)
            words = [part.word for part in alone]
            argv = (sys.executable, "-m", "palestra.launch.bench.lead", config_path(config), *words)
            programs = tuple(replace(p, argv=argv) if p is plan.lead else p for p in plan.programs)
            _carry_out(config, replace(plan, programs=programs))
        return Part(config, run)

    def engines_alone(self, part: Part, wanted: Pass) -> Alone:
        """The bare client once more, after a finished part: what engines do alone drifts with the machine."""
        args = part.config.env.mix[0].args
        config = self.variant(f"{part.run.name}-engine-alone", args=args, **_of_trainer(part.config))
        run = RunDir(config.run_dir)
        if not _is_finished(config):
            replay.link(part.run.model, run.model)
            plan = make_plan(config, this_machine(), is_model_built=(run.model / "config.json").exists())
            engines = [program.name for program in plan.engines]
            led = replay.led_by("palestra.launch.bench.lead", config, plan, names=("model", *engines))
            argv = (*led.lead.argv, wanted.word, ONLY)
            programs = tuple(replace(p, argv=argv) if p is led.lead else p for p in led.programs)
            _carry_out(config, replace(led, programs=programs))
        return read_alone(run)[0]

    def train_alone(self, part: Part, *, steps: int, beside: bool = True) -> Part:
        """The trainer alone, under neutral load or (not `beside`) with nothing else, on the first batches of a finished
        part."""
        config = self.variant(f"{part.run.name}-train-alone", **_of_trainer(part.config))
        run = RunDir(config.run_dir)
        if not _is_finished(config):
            replay.link(part.run.model, run.model)
            run.batches.directory.mkdir(parents=True)
            for step in part.run.batches.steps()[:steps]:
                link_or_copy(str(part.run.batches.path(step)), str(run.batches.path(step)))
            _train(config, beside=beside)
        return Part(config, run)

    def train_made(self, config: RunConfig, batches: Sequence[Batch]) -> Part:
        """The trainer alone, under neutral load, on batches that nobody sampled."""
        run = RunDir(config.run_dir)
        if not _is_finished(config):
            for batch in batches:
                run.batches.write(batch)
            _train(config, beside=True)
        return Part(config, run)


def _train(config: RunConfig, *, beside: bool) -> None:
    plan = make_plan(config, this_machine(), is_model_built=(RunDir(config.run_dir).model / "config.json").exists())
    led = replay.led_by("palestra.launch.feed", config, plan, names=("model", "trainer"))
    with _beside_trainer(config) if beside else nullcontext():
        _carry_out(config, led)


def _carry_out(config: RunConfig, plan: Plan) -> None:
    before = Used.now()
    training.carry_out(config, plan, Origin(1, None))
    after = Used.now()
    if before is not None and after is not None:
        share = after.by_others(before, this_machine().cpus)
        write_atomically(RunDir(config.run_dir).path / _OTHERS, json.dumps(share).encode())


def _of_trainer(config: RunConfig) -> dict[str, dict[str, Any]]:
    """What of a config the trainer computes by."""
    tree = config.model_dump(mode="json")
    return {section: tree[section] for section in ("algo", "train", "engine", "sampling")}


def _is_finished(config: RunConfig) -> bool:
    """Errors: UserError, for a run of another config in the same place."""
    run = RunDir(config.run_dir)
    status = read_status(run)
    if status is None or not run.config.exists():
        clear(run)  # a run that was interrupted before it began
        return False
    if read_resolved(run.config) != RunConfig.model_validate_json(config.model_dump_json()):
        raise UserError(f"{run.path} is a part of a bench with other values; give another directory by --outputs")
    if status.state is not State.FINISHED:
        clear(run)
    return status.state is State.FINISHED


def clear(run: RunDir) -> None:
    """Make room for a run that is measured from its start. Errors: UserError for one that goes on, and for what is no
    run's."""
    status = read_status(run)
    if status is not None and status.state is State.RUNNING:
        raise UserError(f"{run.path} is running; wait for its end, or give another directory by --outputs")
    is_there = run.path.is_dir() and any(run.path.iterdir())
    if is_there and status is None and not (run.config.exists() or (run.path / "lock").exists()):
        raise UserError(f"{run.path} is no run, and is left alone; give another directory by --outputs")
    shutil.rmtree(run.path, ignore_errors=True)


def trainer_cores(config: RunConfig) -> int:
    """What the trainer keeps busy of the cores that the engines compute on; none, if they compute on GPUs."""
    return 0 if this_machine().gpus else config.train.num_ranks * config.train.threads


def _beside_trainer(config: RunConfig) -> AbstractContextManager[None]:
    """What the engines keep busy of the cores that the trainer computes on."""
    if this_machine().gpus:
        return nullcontext()
    return neutral_load(config.engine.replicas * config.engine.threads)
