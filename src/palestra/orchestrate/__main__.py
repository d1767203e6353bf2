"""The orchestrator process: `python -m palestra.orchestrate CONFIG_JSON`."""

import asyncio
import os
import sys
import traceback
from pathlib import Path

from palestra.config import read_resolved
from palestra.core.errors import PalestraError, UserError
from palestra.core.ledger import Ledger, LedgerSelector
from palestra.core.process import collect_garbage_seldom, die_with_parent, life, started_at
from palestra.orchestrate.checkpoint import recover_journal
from palestra.orchestrate.evaluator import Evaluator
from palestra.orchestrate.loop import Loop
from palestra.wire.channel import BlockingCaller
from palestra.wire.messages import Failed, ToSupervisor
from palestra.wire.rundir import Attempt, RunDir, version_to_load


def main() -> int:
    die_with_parent(os.getppid())
    config_path = Path(sys.argv[1])
    config, run = read_resolved(config_path), RunDir(config_path.parent)
    attempt = run.read_attempt()
    collect_garbage_seldom()
    selector = LedgerSelector(Ledger("orchestrator", since=started_at()))
    try:
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
            runner.run(_run(config, run, attempt, selector))
    except BaseException as error:
        code = _report(attempt, _first(error))  # before the log, whose disk may be full
        traceback.print_exc()
        return code
    return 0


async def _run(config, run, attempt: Attempt, selector: LedgerSelector) -> None:
    if config.is_eval:
        await Evaluator(config, run, attempt, selector, life=life()).run()
        return
    journal = recover_journal(run, version_to_load(run, attempt, life()))
    await Loop(config, run, attempt, journal, selector, life=life()).run()


def _first(error: BaseException) -> BaseException:
    """The error that made the others: task groups wrap it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _report(attempt: Attempt, error: BaseException) -> int:
    is_user_error = isinstance(error, UserError)
    text = str(error) if is_user_error else f"{type(error).__name__}: {error}"
    supervisor: BlockingCaller[ToSupervisor, ToSupervisor] = BlockingCaller(
        attempt.supervisor, name="orchestrator", attempt=attempt.number, receives=ToSupervisor, life=life()
    )
    is_final = isinstance(error, PalestraError)  # on purpose; a bug may not show again
    supervisor.send(Failed(process="orchestrator", error=text, is_user_error=is_user_error, is_final=is_final))
    supervisor.close()
    return 2 if is_user_error else 1


if __name__ == "__main__":
    sys.exit(main())
