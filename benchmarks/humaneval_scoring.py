"""The 164 canonical solutions of HumanEval scored in sandboxes, and by the same programs in bare processes.

    python benchmarks/humaneval_scoring.py [--sandbox NAME] [--at-once 2] [--rounds 3] [--json]

A bare process is `python3 -I exam.py` of the interpreter that sandboxes have, with the same input and no walls.
Rounds of both take turns; each number is the wall time of one round, in seconds. The backend is open before the first.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable

from palestra_humaneval import HumanEval, block, exam, given, passes

from palestra.core.deadline import within
from palestra.core.records import Task
from palestra.env.sandbox import Sandboxes, sandboxes_here
from palestra.sandbox.host import host_of

_TIMEOUT_S = 10.0
Passes = Callable[[Task], Awaitable[bool]]


async def in_a_sandbox(task: Task) -> bool:
    return await passes(task, block(task.gold), timeout_s=_TIMEOUT_S)


async def in_a_bare_process(task: Task) -> bool:
    password = "right"
    process = await asyncio.create_subprocess_exec(
        getattr(sys, "_base_executable", None) or sys.executable,
        *("-I", exam.__file__),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    said = given(task, block(task.gold), password).encode()
    out, _ = await within(_TIMEOUT_S, process.communicate(said), waiting_for="a bare process")
    return process.returncode == 0 and out.decode().split()[-1:] == [password]


async def wall_s(tasks: list[Task], scored: Passes, at_once: int) -> float:
    """Errors: AssertionError, for a canonical solution that does not pass."""
    turns = asyncio.Semaphore(at_once)

    async def one(task: Task) -> bool:
        async with turns:
            return await scored(task)

    began = time.perf_counter()
    results = await asyncio.gather(*map(one, tasks))
    took = time.perf_counter() - began
    wrong = [task.key for task, is_right in zip(tasks, results, strict=True) if not is_right]
    assert not wrong, f"canonical solutions that do not pass: {wrong}"
    return took


async def measure(sandbox: str | None, at_once: int, rounds: int) -> dict:
    tasks = list(HumanEval(split="test").tasks())
    walls: dict[str, list[float]] = {"sandboxes_s": [], "bare_s": []}
    async with Sandboxes(sandbox):
        backend = (await host_of(sandboxes_here()._options)).backend
        for _ in range(rounds):
            walls["sandboxes_s"].append(await wall_s(tasks, in_a_sandbox, at_once))
            walls["bare_s"].append(await wall_s(tasks, in_a_bare_process, at_once))
    ratio = statistics.median(walls["sandboxes_s"]) / statistics.median(walls["bare_s"])
    about = {"backend": backend.name, "layers": backend.layers, "programs": len(tasks), "at_once": at_once}
    return {**about, **walls, "ratio_of_medians": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sandbox", metavar="NAME", help="default: the best that works here")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    told = asyncio.run(measure(arguments.sandbox, arguments.at_once, arguments.rounds))
    if arguments.json:
        print(json.dumps(told, indent=2))
        return
    print(f"{told['programs']} programs, {told['at_once']} at once; {told['backend']}: {', '.join(told['layers'])}")
    for name in ("sandboxes_s", "bare_s"):
        print(f"{name:12} {statistics.median(told[name]):6.2f}   of {', '.join(f'{wall:.2f}' for wall in told[name])}")
    print(f"sandboxes take {told['ratio_of_medians']:.2f} times as long")


if __name__ == "__main__":
    main()
