"""The supervisor's process of a faulty run: `python -m tests.fault.supervised CONFIG_JSON KIND [--resume]`.

Everything is `palestra run`'s but the programs of the plan: KIND `table` puts a replaying engine and a trainer of a
table in the places of vLLM and the model's trainer, `model` leaves them; any program can be hurt at a named point.
"""

import dataclasses
import sys
from pathlib import Path

from palestra.config import RunConfig
from palestra.launch.machine import this_machine
from palestra.launch.outcome import exit_code
from palestra.launch.plan import Plan, Program, make_plan
from palestra.launch.run import run
from palestra.wire.rundir import RunDir
from tests.fault.doomed import NAME, be_doomed

_LIGHT = {"palestra.infer": "tests.fault.replaying_engine", "palestra.train": "tests.fault.table_trainer"}


def doomed(program: Program, kind: str) -> Program:
    """The same program, started by `tests.fault.doomed`."""
    python, dash_m, module, *arguments = program.argv
    found = _LIGHT.get(module, module) if kind == "table" else module
    argv = (python, dash_m, "tests.fault.doomed", found, *arguments)
    return dataclasses.replace(program, argv=argv, env=(*program.env, (NAME, program.name)))


def plan_of(config: RunConfig, kind: str) -> Plan:
    is_built = (RunDir(config.run_dir).model / "config.json").exists()
    plan = make_plan(config, this_machine(), is_model_built=is_built)
    return dataclasses.replace(plan, programs=tuple(doomed(program, kind) for program in plan.programs))


def main() -> int:
    path, kind, *words = sys.argv[1:]
    config = RunConfig.model_validate_json(Path(path).read_text())
    be_doomed("supervisor", attempt=RunDir(config.run_dir).last_attempt_number() + 1)
    return exit_code(lambda: run(config, plan_of(config, kind), resume="--resume" in words) and None)


if __name__ == "__main__":
    sys.exit(main())
