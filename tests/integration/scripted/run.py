"""A run of scripted processes: `run.py OUTPUTS CONFIG_OVERRIDES_JSON NAME:ROLE:BEHAVIOUR... [--resume]`.

Everything is the real supervisor's, but the commands of its plan.
"""

import json
import os
import sys
from pathlib import Path

from palestra.config import RunConfig
from palestra.launch.memory import Memory
from palestra.launch.outcome import exit_code
from palestra.launch.plan import Plan, Program, Role
from palestra.launch.run import run

CHILD = Path(__file__).with_name("child.py")


def program(config: RunConfig, entry: str) -> Program:
    name, role, behaviour = entry.split(":")
    is_engine = name.startswith("engine-")
    return Program(
        name=name,
        role=Role(role),
        argv=(sys.executable, str(CHILD), str(config.run_dir), name, behaviour),
        env=(("PALESTRA_INDEX", name.rpartition("-")[2]),) if is_engine else (),
        engine=int(name.rpartition("-")[2]) if is_engine else None,
        start_s=json.loads(os.environ["START_S"]).get(name, 30),
        memory=Memory(()),
    )


def main() -> int:
    outputs, overrides, *entries = [word for word in sys.argv[1:] if word != "--resume"]
    tree = {"log": {"name": "scripted", "outputs": outputs}, "model": {"path": "nowhere"}, **json.loads(overrides)}
    config = RunConfig.model_validate(tree)
    plan = Plan(programs=tuple(program(config, entry) for entry in entries))
    return exit_code(lambda: run(config, plan, resume="--resume" in sys.argv) and None)


if __name__ == "__main__":
    sys.exit(main())
