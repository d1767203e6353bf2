"""An environment worker's process: `python -m palestra.env CONFIG_JSON`, its number in PALESTRA_INDEX."""

import asyncio
import os
import sys
import traceback
from pathlib import Path

from palestra.config import RunConfig, read_resolved
from palestra.core.errors import UserError
from palestra.core.ledger import Ledger, LedgerSelector
from palestra.core.process import collect_garbage_seldom, die_with_parent, life, started_at
from palestra.core.spans import SpanLog
from palestra.env.chat import load_tokenizer
from palestra.env.environment import sandboxes
from palestra.env.sandbox import Sandboxes
from palestra.env.worker import MakeVoice, Worker, chat_voice, policy_voice, set_stages
from palestra.model.files import tokenizer_directory
from palestra.wire.channel import BlockingCaller, Caller
from palestra.wire.messages import Failed, FromWorker, Ready, ToSupervisor, ToWorker
from palestra.wire.rundir import Attempt, RunDir


def main() -> int:
    die_with_parent(os.getppid())
    name = f"env-{os.environ.get('PALESTRA_INDEX', '0')}"
    config, run = read_resolved(sys.argv[1]), RunDir(Path(sys.argv[1]).parent)
    attempt = run.read_attempt()
    collect_garbage_seldom()
    selector = LedgerSelector(Ledger(name, since=started_at()))
    try:
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
            runner.run(_run(name, config, run, attempt, selector))
    except BaseException as error:
        code = _report(name, attempt, _first(error))  # before the log, whose disk may be full
        traceback.print_exc()
        return code
    return 0


async def _run(name: str, config: RunConfig, run: RunDir, attempt: Attempt, selector: LedgerSelector) -> None:
    index = int(name.removeprefix("env-"))
    stages = set_stages(config, python=config.python_of_worker(index))
    make_voice = chat_voice if config.eval.endpoint else _policy_voice(config)
    _tell_supervisor(name, attempt, Ready(process=name))
    orchestrator: Caller[ToWorker, FromWorker] = Caller(
        attempt.orchestrator, name=name, attempt=attempt.number, receives=ToWorker, life=life()
    )
    spans = SpanLog(run.spans(name), name)
    worker = Worker(index, stages, make_voice, orchestrator=orchestrator, selector=selector, spans=spans)
    try:
        async with Sandboxes(config.env.sandbox, config.sandbox) as boxes:
            if any(sandboxes(type(stage.environment)) for stage in stages.values()):
                await boxes.open()
            await worker.run()
    finally:
        orchestrator.close()
        spans.close()


def _policy_voice(config: RunConfig) -> MakeVoice:
    return policy_voice(load_tokenizer(tokenizer_directory(config.model_dir)), config.engine.max_model_len)


def _first(error: BaseException) -> BaseException:
    """The error that made the others: task groups wrap it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _report(name: str, attempt: Attempt, error: BaseException) -> int:
    """Tell the supervisor why this process ends; returns the exit code."""
    is_user_error = isinstance(error, UserError)
    text = str(error) if is_user_error else f"{type(error).__name__}: {error}"
    _tell_supervisor(name, attempt, Failed(process=name, error=text, is_user_error=is_user_error))
    return 2 if is_user_error else 1


def _tell_supervisor(name: str, attempt: Attempt, message: ToSupervisor) -> None:
    supervisor: BlockingCaller[ToSupervisor, ToSupervisor] = BlockingCaller(
        attempt.supervisor, name=name, attempt=attempt.number, receives=ToSupervisor, life=life()
    )
    supervisor.send(message)
    supervisor.close()


if __name__ == "__main__":
    sys.exit(main())
