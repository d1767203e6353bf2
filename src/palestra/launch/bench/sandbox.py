"""`palestra bench sandbox`: what sandboxes cost, beside an unprotected `python3 -c 'print(1)'` of the same interpreter.

Everything is interleaved with the bare program, whose interpreter looks for no installed packages (`-I -S`), so that
what this machine has installed flatters nobody. Where a sandbox is faster, ratios of times are below 1, of rates above.

first_byte_x, full_result_x  a one-shot program from the warm pool: to its first byte, to its result
warm_true_x                  `true` in a sandbox that is there already
throughput_x                 one-shot programs a second, each in fresh namespaces, on all cores
http_throughput_x            the same, asked of the service over HTTP
preloaded_x                  the same, of programs that import five large modules, which the pool has imported
idle_mb_each, idle_create_ms_each   a thousand sandboxes that do nothing
queue_failures, queue_p99_over_p50  4,000 one-shot programs, 64 of them asked for at any time
"""

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from palestra.core.deadline import within
from palestra.launch.bench.loop import state_of_machine
from palestra.launch.bench.report import say, tell_numbers
from palestra.sandbox import Host, Limits, Options, Result, SandboxError
from palestra.sandbox.backends.local import base_python
from palestra.sandbox.client import RemoteHost

HEAVY = ("asyncio", "unittest.mock", "email.mime.multipart", "http.server", "multiprocessing.pool")
LATENCIES, ROUNDS, AT_ONCE_EACH = 60, 5, 2
IDLE, QUEUED, ASKED_AT_ONCE = 1000, 4000, 64
_PROGRAM = "print(1)"
_START_S, _PAUSE_S = 60.0, 0.05


def show(*, quick: bool, as_json: bool) -> None:
    """`quick`: a fifth of everything, with wide intervals."""
    tell_numbers(asyncio.run(measure(1 / 5 if quick else 1.0)), as_json=as_json)


async def measure(share: float) -> dict[str, Any]:
    """`share` of the counts above. Errors: those of `Host.open`."""
    numbers: dict[str, Any] = {"machine": state_of_machine()}
    async with Host(Options()) as host:
        say("one program after the other")
        numbers.update(await latencies(host, int(LATENCIES * share)))
        say("programs on all cores")
        numbers["throughput_x"] = await rate(host.run_code, _PROGRAM, share)
        say(f"{int(IDLE * share)} sandboxes that do nothing")
        numbers.update(await idle(host, int(IDLE * share)))
        say(f"{int(QUEUED * share)} programs in the queue")
        numbers.update(await queue(host, int(QUEUED * share)))
    say("programs over HTTP")
    async with served() as remote:
        numbers["http_throughput_x"] = await rate(remote.run_code, _PROGRAM, share)
    say("programs with large imports")
    async with Host(Options(preload=HEAVY)) as host:
        importing = f"import {', '.join(HEAVY)}\n{_PROGRAM}"
        numbers["preloaded_x"] = await rate(host.run_code, importing, share)
    return numbers


def bare(code: str = _PROGRAM) -> None:
    subprocess.run([base_python(), "-I", "-S", "-c", code], stdout=subprocess.PIPE, check=True, timeout=_START_S)


async def latencies(host: Host, count: int) -> dict[str, float]:
    """One after the other; the pool fills in pauses."""
    seconds: dict[str, list[float]] = {"bare": [], "first": [], "full": [], "true": []}
    async with await host.create() as box:
        for _ in range(count):
            await asyncio.sleep(_PAUSE_S)
            began = time.perf_counter()
            await asyncio.to_thread(bare)
            seconds["bare"].append(time.perf_counter() - began)
            began = time.perf_counter()
            await box.exec(["true"])
            seconds["true"].append(time.perf_counter() - began)
            await asyncio.sleep(_PAUSE_S)
            first_s, full_s = await _one_shot(host)
            seconds["first"].append(first_s)
            seconds["full"].append(full_s)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "bare_ms": 1000 * medians["bare"],
        "first_byte_x": medians["first"] / medians["bare"],
        "full_result_x": medians["full"] / medians["bare"],
        "warm_true_x": medians["true"] / medians["bare"],
    }


async def _one_shot(host: Host) -> tuple[float, float]:
    """To the first byte, and to the result."""
    began, heard = time.perf_counter(), list[float]()
    _require(await host.run_code(_PROGRAM, on_output=lambda *_: heard.append(time.perf_counter())))
    return heard[0] - began, time.perf_counter() - began


async def rate(run: Callable[[str], Awaitable[Result]], code: str, share: float) -> float:
    """Programs a second over bare programs a second: the median of rounds, each with both."""
    cores = os.cpu_count() or 1
    few, ratios = max(int(100 * share), 20), []

    async def at_once(one: Callable[[], Awaitable[object]], count: int, workers: int) -> float:
        left = iter(range(count))

        async def work() -> None:
            for _ in left:
                await one()

        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(workers)))
        return count / (time.perf_counter() - began)

    async def boxed() -> None:
        _require(await run(code))

    await at_once(boxed, few, AT_ONCE_EACH * cores)
    for _ in range(ROUNDS):
        unprotected = await at_once(lambda: asyncio.to_thread(bare, code), few, cores)
        ratios.append(await at_once(boxed, 3 * few, AT_ONCE_EACH * cores) / unprotected)
    return statistics.median(ratios)


async def idle(host: Host, count: int) -> dict[str, float]:
    """What the machine's free memory loses by them, and how long each took to be made."""
    limits = Limits(memory_mb=64, disk_mb=16)
    before, began = _available_mb(), time.perf_counter()
    boxes = [await host.create(limits=limits) for _ in range(count)]
    made_s, after = time.perf_counter() - began, _available_mb()
    for box in boxes:
        await box.delete()
    return {"idle_mb_each": (before - after) / count, "idle_create_ms_each": 1000 * made_s / count}


def _available_mb() -> float:
    with open("/proc/meminfo", encoding="ascii") as meminfo:
        return next(int(line.split()[1]) for line in meminfo if line.startswith("MemAvailable")) / 1024


async def queue(host: Host, count: int) -> dict[str, float]:
    asked, seconds, failures = asyncio.Semaphore(ASKED_AT_ONCE), list[float](), 0

    async def one() -> None:
        nonlocal failures
        async with asked:
            began = time.perf_counter()
            try:
                done = await host.run_code(_PROGRAM)
                failures += done.stdout != "1\n"
            except SandboxError:
                failures += 1
            seconds.append(time.perf_counter() - began)

    await asyncio.gather(*(one() for _ in range(count)))
    seconds.sort()
    return {
        "queue_failures": failures,
        "queue_p99_over_p50": seconds[int(0.99 * len(seconds))] / seconds[len(seconds) // 2],
    }


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[RemoteHost]:
    """A service of its own, in another process: it says where it answers, and the token."""
    command = (sys.executable, "-m", "palestra.launch.cli", "serve", "sandbox", "--port", "0")
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        said = [
            await within(_START_S, process.stderr.readline(), waiting_for="the service of sandboxes to start")
            for _ in range(2)
        ]
        url, token = said[0].decode().split()[0], said[1].decode().strip().partition("=")[2]
        async with RemoteHost(url, token) as remote:
            yield remote
    finally:
        if process.returncode is None:
            process.terminate()
        await within(_START_S, process.wait(), waiting_for="the service of sandboxes to end")


def _require(done: Result) -> None:
    if done.stdout != "1\n":
        raise SandboxError(f"a sandbox answered {json.dumps(done.stdout)} to {_PROGRAM}: {done.stderr[-300:]}")
