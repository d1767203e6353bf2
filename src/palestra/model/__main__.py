"""`python -m palestra.model CONFIG_JSON`: build the model of a run into its directory, unless it is there."""

import os

from palestra.config import read_resolved
from palestra.core.process import die_with_parent, exit_with
from palestra.wire.rundir import RunDir


def main(config_path: str) -> int:
    die_with_parent(os.getppid())
    config = read_resolved(config_path)
    directory = RunDir(config.run_dir).model
    if config.model.build is None or (directory / "config.json").exists():
        return 0
    from transformers.utils.logging import disable_progress_bar

    from palestra.model.build import build_model

    disable_progress_bar()
    directory.parent.mkdir(parents=True, exist_ok=True)
    build_model(config.model.build, directory)
    return 0


if __name__ == "__main__":
    exit_with(main)
