"""`python -m palestra.train CONFIG_JSON`: one rank of the trainer, alone or under torchrun."""

import os
import sys
import traceback

from palestra.config import RunConfig, read_resolved
from palestra.core import process
from palestra.core.errors import UserError
from palestra.core.ledger import Ledger
from palestra.wire.channel import BlockingCaller
from palestra.wire.messages import Done, Failed, ToSupervisor
from palestra.wire.rundir import Attempt, RunDir


def main(config_path: str) -> int:
    process.die_with_parent(os.getppid())
    ledger = Ledger(_name_of_rank(), since=process.started_at())
    config = read_resolved(config_path)
    run = RunDir(config.run_dir)
    attempt = run.read_attempt()
    supervisor: BlockingCaller[None, ToSupervisor] = BlockingCaller(
        attempt.supervisor,
        name=f"trainer-{os.environ.get('RANK', '0')}",
        attempt=attempt.number,
        receives=None,
        life=process.life(),
    )
    try:
        _run(config, run, attempt, ledger, supervisor)
    except Exception as error:
        is_user_error = isinstance(error, UserError)
        told = str(error) if is_user_error else f"{type(error).__name__}: {error}"
        supervisor.send(
            Failed(process="trainer", error=told, is_user_error=is_user_error)
        )  # the log's disk may be full
        if is_user_error:
            print(error, file=sys.stderr)
        else:
            traceback.print_exc()
        return 2 if is_user_error else 1
    finally:
        supervisor.close()
    return 0


def _name_of_rank() -> str:
    """In the ledger: the first rank is the trainer that the others speak of."""
    rank = os.environ.get("RANK", "0")
    return "trainer" if rank == "0" else f"trainer-{rank}"


def _run(
    config: RunConfig,
    run: RunDir,
    attempt: Attempt,
    ledger: Ledger,
    supervisor: "BlockingCaller[None, ToSupervisor]",
) -> None:
    from transformers.utils.logging import disable_progress_bar

    from palestra.train import ranks as trainer_ranks
    from palestra.train.reinforce import reinforce
    from palestra.train.supervise import supervise

    disable_progress_bar()
    ranks = trainer_ranks.join(config.train, deadline_s=config.train.batch_deadline_s + 60)
    try:
        if config.is_rl:
            reinforce(config, run, attempt, ranks, ledger, supervisor.send)
        else:
            supervise(config, run, attempt, ranks, ledger, supervisor.send)
        if ranks.is_first:
            supervisor.send(Done(process="trainer"))
    finally:
        trainer_ranks.leave()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
