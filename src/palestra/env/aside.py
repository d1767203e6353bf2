"""Work that is slow or may hang, in processes of its own: nothing of it holds up the rollouts of a worker.

The clock of a call starts when it begins, and counts the CPU time it uses: neither a queue nor a busy machine makes it
late.
"""

import asyncio
import atexit
import importlib
import os
import pickle
import resource
import signal
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pebble import ProcessExpired, ProcessPool

from palestra.core.errors import InfrastructureError, UserError
from palestra.env.load import OF_FILES

P = ParamSpec("P")
T = TypeVar("T")

_WALL_PER_CPU = 20.0  # so much longer than its CPU time may a call take on a busy machine
_MIN_WALL_S = 60.0
_AGAIN_S = 0.1  # the timer fires until the work has stopped: an `except Exception` of its own may catch the first
_CALLS_OF_A_PROCESS = 2_000  # then another takes its place, and what leaked is freed
_MOST_PROCESSES = 4
_NICE = 10
_MEMORY_BYTES = 4 << 30  # that one call may take; beyond it, MemoryError
_GONE_S = 5.0
_NEEDS = "_palestra_needs"


class TooSlowError(Exception):
    """The work used more CPU time than it may: a fact about what it was given, not about the machine."""


def needs(*modules: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Modules that the process imports before the clock of the function starts."""

    def mark(function: Callable[P, T]) -> Callable[P, T]:
        setattr(function, _NEEDS, modules)
        return function

    return mark


async def aside(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function of a module in another process; it may use 10 s of CPU time. See `limited`.

    What it is given and returns is pickled.
    """
    return await limited(10.0, function, *args, **kwargs)


async def limited(cpu_s: float, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`aside` with a limit of one's own.

    Errors: TooSlowError; MemoryError, beyond 4 GiB; InfrastructureError, if the process died or got no CPU for long;
    UserError, if another process cannot find the function; what the function raises.
    """
    name, wall_s = getattr(function, "__name__", repr(function)), max(cpu_s * _WALL_PER_CPU, _MIN_WALL_S)
    work, pool = _packed(name, function, args, kwargs), _pool()
    try:
        future = pool.schedule(_done, args=(cpu_s, work), timeout=wall_s)
        is_returned, outcome = pickle.loads(await asyncio.wrap_future(future))  # ends by `timeout`: the pool keeps it
    except TimeoutError as late:
        raise InfrastructureError(f"{name} did not end within {wall_s:g} s; is the machine busy?") from late
    except ProcessExpired as expired:
        if expired.exitcode == -signal.SIGXCPU:
            raise TooSlowError(f"{name} used more than {cpu_s:g} s of CPU time") from None
        raise InfrastructureError(f"{name}: its process ended with {expired.exitcode}") from expired
    except (BrokenExecutor, RuntimeError) as broken:
        await _give_up(pool)
        raise InfrastructureError(f"{name}: the processes for work aside are gone: {broken}") from broken
    if is_returned:
        return outcome
    raise outcome


def _packed(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    if getattr(function, "__module__", "").startswith(OF_FILES):
        raise UserError(f"{name} is in a single file, where no other process finds it; make a package")
    try:
        return pickle.dumps((function, args, kwargs))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(f"{name} and what it is given cannot go to another process: {error}") from error


async def _give_up(pool: ProcessPool) -> None:
    """The next call makes another."""
    if _pool.cache_info().currsize and _pool() is pool:
        _pool.cache_clear()
    pool.stop()
    await asyncio.to_thread(pool.join, _GONE_S)


@cache
def _pool() -> ProcessPool:
    """Of this process. Its own processes start afresh: a fork of one with threads and sockets would not be safe."""
    count = min(len(os.sched_getaffinity(0)), _MOST_PROCESSES)
    pool = ProcessPool(
        max_workers=count,
        max_tasks=_CALLS_OF_A_PROCESS,
        context=get_context("spawn"),
        initializer=os.nice,  # who waits for a reward can wait; who answers others cannot
        initargs=(_NICE,),
    )
    atexit.register(pool.stop)
    return pool


# --- in the other process


def _done(cpu_s: float, work: bytes) -> bytes:
    """Whether the function returned, and what it returned or raised."""
    try:
        function, args, kwargs = pickle.loads(work)
        for module in getattr(function, _NEEDS, ()):
            importlib.import_module(module)
        with _limits(cpu_s, function.__name__):
            returned = function(*args, **kwargs)
        return pickle.dumps((True, returned))
    except BaseException as error:  # nothing that the function raises is the process's affair
        return _raised(error)


def _raised(error: BaseException) -> bytes:
    """Of an error that cannot be sent, or would end whoever gets it, its words."""
    if isinstance(error, Exception):
        with suppress(Exception):
            raised = pickle.dumps((False, error))
            pickle.loads(raised)
            return raised
    return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))


@contextmanager
def _limits(cpu_s: float, name: str):
    """Python code is stopped by the timer; other code, with its process, by the kernel."""
    is_over = False

    def stop(*_: object) -> None:
        if not is_over:
            raise TooSlowError(f"{name} used more than {cpu_s:g} s of CPU time")

    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, _address_space_bytes() + _MEMORY_BYTES)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + cpu_s) + 2)
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, cpu_s, _AGAIN_S)
    try:
        yield
    finally:
        is_over = True
        signal.setitimer(signal.ITIMER_PROF, 0)
        for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS):
            _limit(kind, resource.RLIM_INFINITY)


def _address_space_bytes() -> int:
    """That the process has before the call, with all it imported."""
    pages, *_ = Path("/proc/self/statm").read_text().split()
    return int(pages) * resource.getpagesize()


def _limit(kind: int, at: int) -> None:
    """As far as the hard limit lets it."""
    _, hard = resource.getrlimit(kind)
    is_beyond = hard != resource.RLIM_INFINITY and (at == resource.RLIM_INFINITY or at > hard)
    resource.setrlimit(kind, (hard if is_beyond else at, hard))
