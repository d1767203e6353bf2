"""An engine's turn on a device that it shares with the trainer (`launch.turns`): asked for before vLLM takes memory.

Consumes: `TurnGiven`. Produces: `TurnAsked`. Waits for: its turn, at most `train.batch_deadline_s`. From then on the
orchestrator puts the engine to sleep and wakes it; its turn ends with its process.
"""

import os

from palestra.config import read_resolved
from palestra.core.errors import DeadlineError
from palestra.core.process import life
from palestra.wire.channel import BlockingCaller, Reconnected
from palestra.wire.messages import FromTrainer, TurnAsked, TurnGiven
from palestra.wire.rundir import RunDir


def wait_for_turn(config_path: str) -> None:
    """Until the device is this engine's; at once, where it has its own. Errors: SystemExit with the reason."""
    config = read_resolved(config_path)
    if not config.takes_turns:
        return
    attempt, name = RunDir(config.run_dir).read_attempt(), f"engine-{os.environ['PALESTRA_INDEX']}"
    caller: BlockingCaller[TurnGiven, FromTrainer] = BlockingCaller(
        attempt.orchestrator, name=name, attempt=attempt.number, receives=TurnGiven, life=life()
    )
    deadline_s = config.train.batch_deadline_s
    waiting_for = "its turn on the device: the trainer to leave it, or to end (train.batch_deadline_s)"
    try:
        caller.send(TurnAsked())
        while isinstance(caller.receive(deadline_s=deadline_s, waiting_for=waiting_for), Reconnected):
            caller.send(TurnAsked())  # to one that took the orchestrator's place
    except DeadlineError as late:
        raise SystemExit(str(late)) from late
    finally:
        caller.close()
