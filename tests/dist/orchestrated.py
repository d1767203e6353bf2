"""A scripted orchestrator and supervisor around a real trainer process."""

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palestra.config.schema import RunConfig
from palestra.launch.ports import free_ports
from palestra.wire.channel import Listener
from palestra.wire.messages import (
    Exported,
    Finish,
    FromTrainer,
    StepTrained,
    ToSupervisor,
    TrainBatch,
    TrainerReady,
    WeightsLoaded,
    WeightsStaged,
)
from palestra.wire.rundir import Attempt, RunDir

ROOT = Path(__file__).parents[2]


async def play(
    config: RunConfig,
    *,
    number: int = 1,
    resumed_from: int | None = None,
    save_at: Sequence[int] = (),
    deadline_s: float = 150,
) -> tuple[int, list[Any], list[Any]]:
    """Run a trainer to its end on the batches that are there: exit code, what orchestrator and supervisor heard."""
    run = RunDir(config.run_dir)
    run.path.mkdir(parents=True, exist_ok=True)
    run.config.write_text(config.model_dump_json())
    one, two = free_ports("127.0.0.1", 2)
    attempt = Attempt(
        number=number,
        resumed_from=resumed_from,
        supervisor=f"tcp://127.0.0.1:{one}",
        orchestrator=f"tcp://127.0.0.1:{two}",
        engines=(),
        staging=str(run.path / "staging"),
        started_at=time.time(),
    )
    run.write_attempt(attempt)
    orchestrator = Listener(attempt.orchestrator, attempt=number, receives=FromTrainer)
    supervisor = Listener(attempt.supervisor, attempt=number, receives=ToSupervisor)
    heard: list[Any] = []
    reported: list[Any] = []
    listening = [
        asyncio.create_task(_orchestrate(orchestrator, heard, config.train.steps, save_at)),
        asyncio.create_task(_supervise(supervisor, reported)),
    ]
    try:
        async with asyncio.timeout(deadline_s):
            code = await _trainer(run.config, config.train.num_ranks)
        await asyncio.sleep(0.2)  # the last messages are in the sockets
    finally:
        for task in listening:
            task.cancel()
        orchestrator.close()
        supervisor.close()
    for task in listening:
        if task.done() and not task.cancelled():
            task.result()
    return code, heard, reported


async def _trainer(config: Path, num_ranks: int) -> int:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", "-m"]
    start = torchrun if num_ranks > 1 else ["-m"]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *start,
        "palestra.train",
        str(config),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
    )
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.kill()


async def _orchestrate(listener: Listener, heard: list[Any], steps: int, save_at: Sequence[int]) -> None:
    """One batch after the other; every version is published and loaded at once."""
    version = 0

    async def go_on() -> None:
        await listener.send(
            "trainer",
            TrainBatch(step=version, publish=True, save=version + 1 in save_at) if version < steps else Finish(),
        )

    while True:
        _, message = await listener.receive()
        heard.append(message)
        match message:
            case TrainerReady():
                version = message.version
                await go_on()
            case StepTrained():
                version = message.step + 1
                await go_on()
            case WeightsStaged():
                await listener.send("trainer", WeightsLoaded(version=message.staged.version))
            case Exported():
                return


async def _supervise(listener: Listener, reported: list[Any]) -> None:
    while True:
        reported.append((await listener.receive())[1])


def kinds(messages: list[Any]) -> list[str]:
    return [type(message).__name__ for message in messages]


def closure(messages: list[Any], rank: int = 0) -> float:
    """Of all ledger entries of one rank together."""
    entries = [message.ledgers[rank] for message in messages if isinstance(message, StepTrained | Exported)]
    wall = sum(entry.wall_s for entry in entries)
    return abs(sum(sum(entry.parts_s.values()) for entry in entries) - wall) / wall
