"""`palestra replay --from weights --only infer`: an engine alone, given the recorded weights of a run, one by one.

Every publish is proved as in the run, and the replies that a version sampled are scored again by the same version:
what differs has changed in the engine, its plugin or the machine since.
"""

import json
import sys

from rich.console import Console
from rich.table import Table

from palestra.core.errors import UserError
from palestra.launch import run as training
from palestra.launch.machine import this_machine
from palestra.launch.plan import make_plan
from palestra.launch.replay import copy_of, led_by, link
from palestra.launch.start import Origin
from palestra.wire.rundir import RunDir
from palestra.wire.runlog import read_metrics
from palestra.wire.weights.manifest import recorded

_COLUMNS = {
    "publish/max_abs_logprob_gap": "probe: largest gap",
    "publish/stopped_s": "stopped, s",
    "replay/abs_logprob_difference": "replies: mean difference",
    "replay/largest_difference": "largest",
}


def show(run: RunDir, *, as_json: bool) -> None:
    """Prints a row per version. Errors: as `replay`; a version that does not arrive ends it with the numbers."""
    rows = read_metrics(replay(run))
    if as_json:
        json.dump(rows, sys.stdout, indent=2)
        print()
        return
    table = Table("version", *_COLUMNS.values(), box=None, pad_edge=False)
    for row in rows:
        cells = [f"{row[name]:.3g}" if name in row else "-" for name in _COLUMNS]
        table.add_row(str(row["step"]), *cells)
    Console(highlight=False).print(table)
    if not any("replay/largest_difference" in row for row in rows):
        print("no replies were scored: none at temperature 1 with one version from end to end", file=sys.stderr)


def replay(run: RunDir) -> RunDir:
    """Publish the recorded versions of `run` in RUN-replay; returns that run.

    Errors: UserError, if no weights were recorded, or RUN-replay exists.
    """
    if not recorded(run.published):
        raise UserError(f"{run.path} has no recorded weights; they are kept where log.keep_weights is true")
    config, copy = copy_of(run)
    for source, target in ((run.published, copy.published), (run.journal, copy.journal), (run.model, copy.model)):
        link(source, target)
    plan = make_plan(config, this_machine(), is_model_built=copy.model.exists())
    plan = led_by("palestra.launch.feed_weights", config, plan, names=("model", "engine-0"))
    training.carry_out(config, plan, Origin(run.last_attempt_number(), None))
    return copy
