"""`python -m palestra.launch.sinks RUN PLACE [--once]`: tell one place what metrics.jsonl says.

Consumes: metrics.jsonl; the end of its standard input. Produces: what the place keeps. Waits for: changes of the run's
directory, at most `_LOOK_S`, as a file system of the network tells none. Ends when: its input does.
"""

import argparse
import json
import os
import secrets
import sys
import threading
from pathlib import Path
from typing import Any

import watchfiles

from palestra.core.files import write_atomically
from palestra.launch.sinks.following import Place, Tail
from palestra.wire.rundir import RunDir

_LOOK_S = 5
_OUT_OF_THE_WAY = 10  # of niceness: the run goes first
_STEP_MS = 200  # rows that come at once are told at once


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("place", choices=["tensorboard", "wandb", "trackio"])
    parser.add_argument("--once", action="store_true")
    given = parser.parse_args()
    stop = threading.Event()
    if not given.once:
        os.nice(_OUT_OF_THE_WAY)
        threading.Thread(target=_until_input_ends, args=(stop,), daemon=True).start()
    follow(RunDir(given.run), given.place, stop, once=given.once)


def _until_input_ends(stop: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        continue
    stop.set()


def follow(run: RunDir, place: str, stop: threading.Event, *, once: bool = False) -> None:
    """Errors: whatever the library of the place raises."""
    config = json.loads(run.config.read_bytes()) if run.config.exists() else {}
    told, tail = place_of(run, place, config), Tail(run.metrics)
    told.begin(tail.take())
    if not once:
        changes = watchfiles.watch(
            run.path,
            watch_filter=lambda _, path: path.endswith(run.metrics.name),
            stop_event=stop,
            step=_STEP_MS,
            debounce=_STEP_MS,
            rust_timeout=_LOOK_S * 1000,
            yield_on_timeout=True,
            recursive=False,
            raise_interrupt=False,
        )
        for _ in changes:
            if rows := tail.take():
                told.tell(rows)
    if rows := tail.take():
        told.tell(rows)
    told.close()


def place_of(run: RunDir, place: str, config: dict[str, Any]) -> Place:
    """Its library is imported now. Errors: ImportError."""
    name, project = run.path.resolve().name, config.get("log", {}).get("project", "palestra")
    if place == "tensorboard":
        from palestra.launch.sinks.tensorboard import TensorBoard

        return TensorBoard(run.path / "tensorboard")
    id = _identity(run)
    if place == "wandb":
        from palestra.launch.sinks.wandb import WeightsAndBiases

        return WeightsAndBiases(run.path, project=project, name=name, id=id, config=config)
    from palestra.launch.sinks.trackio import Trackio

    return Trackio(project=project, name=f"{name}-{id}", config=config)


def _identity(run: RunDir) -> str:
    """Of this run and no other one of its name; made once."""
    path = run.path / "told-as.json"
    if not path.exists():
        write_atomically(path, json.dumps({"id": secrets.token_hex(4)}).encode() + b"\n")
    return str(json.loads(path.read_bytes())["id"])


if __name__ == "__main__":
    main()
