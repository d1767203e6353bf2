"""Weights & Biases: one run there for a run here, with the same id after every start.

Its own step is the number of the line, which only grows; the step of training is a metric, `step`, that charts have as
their axis: an evaluation belongs to a version that training has left behind. Online, it goes on behind what the server
has. Offline, nobody knows what a kill left in the file on its way: it is made anew from metrics.jsonl.
"""

import shutil
from pathlib import Path
from typing import Any

import wandb

from palestra.launch.sinks.following import Once, Row


class WeightsAndBiases:
    def __init__(self, directory: Path, *, project: str, name: str, id: str, config: dict[str, Any]):
        self._directory, self._id = directory, id
        self._wish = {"project": project, "name": name, "id": id, "config": config}
        self._once = Once()
        self._run: Any = None

    def begin(self, rows: list[Row]) -> None:
        self.close()
        for old in self._directory.glob(f"wandb/offline-run-*-{self._id}"):
            shutil.rmtree(old)
        settings = wandb.Settings(console="off", x_disable_stats=True, silent=True)
        self._run = wandb.init(dir=self._directory, resume="allow", settings=settings, **self._wish)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._once = Once()
        known = self._run.starting_step  # of a run that the server has: the first that it has not
        for row in self._once.new(rows):
            if row.number >= known:
                self._log(row)

    def tell(self, rows: list[Row]) -> None:
        for row in self._once.new(rows):
            self._log(row)

    def _log(self, row: Row) -> None:
        self._run.log({"step": row.step, **row.values}, step=row.number, commit=True)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
