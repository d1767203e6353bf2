"""`palestra run` and `palestra sft`: from a config to the end of the run."""

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from palestra.config import RunConfig
from palestra.core.clock import unix_now
from palestra.core.errors import InfrastructureError, PalestraError, UserError
from palestra.core.guard import Guard
from palestra.core.ledger import Ledger, LedgerSelector
from palestra.core.process import started_at
from palestra.env.sandbox import require_backend
from palestra.launch import start
from palestra.launch.adapters import require_adapters
from palestra.launch.layout import require_layout
from palestra.launch.live import view_of
from palestra.launch.machine import this_machine
from palestra.launch.model_path import require_model
from palestra.launch.outcome import Interrupted
from palestra.launch.plan import Plan, make_plan, require_fit
from palestra.launch.sinks.keeping import require_places, telling
from palestra.launch.start import Origin
from palestra.launch.supervisor import View, supervise
from palestra.wire.rundir import Attempt, RunDir
from palestra.wire.runlog import RunLog
from palestra.wire.status import State, Status, locked, now_running, write_status


def plan_of(config: RunConfig) -> Plan:
    """The plan on this machine. Errors: UserError, for what cannot work here."""
    require_model(config.model.path)
    for name, frozen in config.algo.frozen.items():
        require_model(frozen.path, field=f"algo.{name}.path")
    require_layout(config)
    require_adapters(config)
    require_pythons(config)
    require_keys(config)
    require_backend(config.env.sandbox)
    require_data(config)
    require_places(config.log.to)
    machine = this_machine()
    plan = make_plan(config, machine, is_model_built=(RunDir(config.run_dir).model / "config.json").exists())
    require_fit(plan, machine)
    return plan


def require_pythons(config: RunConfig) -> None:
    """Errors: UserError, naming an entry whose Python is not there."""
    for source in (*config.env.mix, *config.eval.sets):
        if source.python is not None and not (source.python.is_file() and os.access(source.python, os.X_OK)):
            raise UserError(
                f"{source.label}: python={source.python} is no program; give bin/python of a virtual environment with "
                "palestra and the environment in it"
            )


def require_data(config: RunConfig) -> None:
    """Errors: UserError, naming a file of supervised rows that would be read and is not there."""
    if config.is_rl and config.data.warmup.steps == 0:
        return
    for source in config.data.sources:
        if source.file is not None and not source.file.is_file():
            raise UserError(
                f"data.sources: there is no file {source.file}, counted from {Path.cwd()}; where it has to be made "
                "first, the lines at the head of the recipe say how"
            )


def require_keys(config: RunConfig) -> None:
    """Of endpoints, those of seats, and whatever else `args` of an environment name by `key_env`, such as a judge.

    Errors: UserError, naming the field whose variable the environment lacks.
    """
    for field, name in _key_fields(config.model_dump(mode="json"), ""):
        if not os.environ.get(name, "").strip():
            raise UserError(f"{field}={name}: the environment has no such variable, or an empty one; export {name}")


def _key_fields(tree: object, place: str) -> Iterator[tuple[str, str]]:
    """Dotted names of all fields called `key_env` that have a value, and these values."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in inner:
        field = f"{place}.{name}" if place else str(name)
        if name == "key_env" and isinstance(value, str):
            yield field, value
        else:
            yield from _key_fields(value, field)


def run(config: RunConfig, plan: Plan, *, resume: bool) -> RunDir:
    """Train to the end of the config. What can be refused is refused before a process starts.

    Errors: UserError; ProcessFailed and other infrastructure errors; Interrupted.
    """
    carry_out(config, plan, start.begin(config, resume=resume))
    return RunDir(config.run_dir)


def carry_out(config: RunConfig, plan: Plan, origin: Origin) -> None:
    """One attempt at `plan` in the config's run directory. Errors: as `run`."""
    ledger = Ledger("supervisor", since=started_at())
    directory = RunDir(config.run_dir)
    with locked(directory):
        guard = Guard()
        try:
            attempt = start.new_attempt(
                config,
                directory,
                origin,
                guard,
                engines=len(plan.engines),
                staging_bytes=plan.staging_bytes,
                started_at=unix_now(),
            )
            directory.summary.unlink(missing_ok=True)  # of an end that this attempt goes on from
            start.write_config(directory, config)
            directory.write_attempt(attempt)
            _supervise(config, plan, attempt, guard, ledger)
        finally:
            guard.close()


def _supervise(config: RunConfig, plan: Plan, attempt: Attempt, guard: Guard, ledger: Ledger) -> None:
    """The status and the supervisor's ledger are written whichever way the attempt ends."""
    run = RunDir(config.run_dir)
    status = now_running(attempt.number, attempt.started_at)
    write_status(run, status)
    state, error = State.FAILED, "a bug of the supervisor"
    try:
        with view_of(run.name, sys.stderr) as view, telling(run, config.log.to, guard, view.say):
            _say_start(view, run, attempt, plan)
            ledger.switch("work")
            with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(LedgerSelector(ledger))) as runner:
                runner.run(supervise(plan, run, attempt, guard, view, launch=config.launch))
        state, error = State.FINISHED, ""
    except (Interrupted, KeyboardInterrupt):
        state, error = State.INTERRUPTED, "interrupted"
        raise
    except PalestraError as failure:
        error = str(failure)
        raise
    finally:
        _write_end(run, status, state, error, ledger)


def _write_end(run: RunDir, status: Status, state: State, error: str, ledger: Ledger) -> None:
    """What ended the run is more than what cannot be written of it, on a full disk."""
    try:
        write_status(run, msgspec.structs.replace(status, state=state, ended_at=unix_now(), error=error))
        log = RunLog(run)
        log.ledger(ledger.close())
        log.close()
    except (OSError, InfrastructureError) as failure:
        print(f"the end of the run could not be recorded: {failure}", file=sys.stderr)


def _say_start(view: View, run: RunDir, attempt: Attempt, plan: Plan) -> None:
    if attempt.number == 1:
        where = ""
    elif attempt.resumed_from is None:
        where = f": attempt {attempt.number}, from the start"
    else:
        where = f": attempt {attempt.number}, from version {attempt.resumed_from}"
    view.say(f"run {run.name} in {run.path}{where}")
    for note in plan.notes:
        view.say(note)
