"""What a program may use up: its own, never the machine's."""

import asyncio
import os
import secrets
import time
from pathlib import Path

from palestra.sandbox.cases.conformance import heard
from palestra.sandbox.cases.machine import Watched, processes_with
from palestra.sandbox.check import Bench, Unfit, at_best, case, require
from palestra.sandbox.records import Isolation, Limits, SandboxError

_FORKS = """
import os, time
for _ in range(100000):
    try:
        if os.fork() == 0:
            while True:
                try: os.fork()
                except OSError: time.sleep(0.01)
    except OSError: time.sleep(0.01)
"""
_TOUCH = """
import mmap, os, time
progress = open("progress", "w+b")
progress.truncate(4096)
seen, PEAK = mmap.mmap(progress.fileno(), 4096), 8
def tell(slot, value): seen[4 * slot:4 * slot + 4] = value.to_bytes(4, "little")
def told(slot): return int.from_bytes(seen[4 * slot:4 * slot + 4], "little")
def eat(slot, megabytes, pause_s):
    kept = []
    for done in range(megabytes):
        kept.append(bytearray(b"x" * 2**20))
        tell(slot, done + 1)
        time.sleep(pause_s)
    time.sleep(2)
"""
_SLOW = 20  # processes of a bomb start and end beside each other
_PAUSE_S = 0.004  # for each megabyte: a watchdog that stands still for half a second misses 125 of them
_READINGS = 10
_TOTAL = "import struct; n = struct.unpack('<9I', open('progress', 'rb').read(36)); print(n[8] or sum(n))"


@case(Isolation.PROCESS)
async def fork_bomb(bench: Bench) -> str:
    """Its processes are bounded, and all gone soon after its time: on a machine that is slow, by how slow it is."""
    ordinary = await bench.python("pass")
    most = 4.0 + _SLOW * ordinary.wall_s

    async def attempt() -> float:
        async with bench.afresh() as fresh:
            began = time.monotonic()
            done = await fresh.python(_FORKS, timeout_s=1.0)
            took = time.monotonic() - began
        is_own_end = bench.host.backend.ends_by_programs and done.signal == 9
        require(done.timed_out or is_own_end, f"{done} after {took:.1f} s")
        return took

    return f"ended after {await at_best(most, attempt):.2f} s, at most {most:.2f}"


@case(Isolation.PROCESS)
async def memory_of_one_process(bench: Bench) -> str:
    done = await bench.python(_TOUCH + f"eat(0, 2048, {_PAUSE_S})")
    require(done.exit_code != 0 and not done.timed_out, done)
    return await _within_bounds(bench, f"{done.status}, oom={done.oom}")


@case(Isolation.PROCESS)
async def memory_of_eight_children(bench: Bench) -> str:
    """Each is below the limit; together they are not. What counts is what all hold at one time."""
    code = (
        f"pause_s = {8 * _PAUSE_S}"
        + """
children, whole = [], 0
for slot in range(8):
    pid = os.fork()
    if pid == 0: eat(slot, 64, pause_s); os._exit(0)
    children.append(pid)
left = set(children)
def resident(pid):
    try: pages, shared = map(int, open("/proc/%d/statm" % pid).read().split()[1:3])
    except (OSError, ValueError): return 0
    return (pages - shared) * mmap.PAGESIZE // 2**20
while left:
    pid, end = os.waitpid(-1, os.WNOHANG)
    if pid: left.discard(pid); whole += end == 0
    tell(PEAK, max(told(PEAK), sum(map(resident, left)))); time.sleep(0.002)
print(whole)
"""
    )
    done = await bench.python(_TOUCH + code)
    require(done.stdout.strip() != "8", f"eight times 64 MB went through: {done}")
    return await _within_bounds(bench, f"{done.status}, oom={done.oom}")


async def _within_bounds(bench: Bench, seen: str) -> str:
    """What was touched at once, by its own account: its memory and its disk, and what a watchdog lets pass."""
    try:
        for _ in range(_READINGS):
            total = await bench.box.exec(["python3", "-c", _TOTAL], timeout_s=30)
            if total.stdout.strip():
                break
            await asyncio.sleep(0.2)  # a watchdog that is still at the first program ends whatever there is
    except SandboxError:
        return f"{seen}; its sandbox ended with it"
    require(total.stdout.strip().isdigit(), f"what was touched cannot be read: {total}")
    megabytes = int(total.stdout)
    counted = any(layer.startswith("cgroup") for layer in bench.layers) or bench.isolation == Isolation.KERNEL
    most = 1.25 * (128 + 32 + 32) if counted else 2.5 * (128 + 32)
    require(megabytes <= most, f"touched {megabytes} MB of 128; {seen}")
    return f"{seen}; touched {megabytes} MB"


@case(Isolation.PROCESS)
async def memfd(bench: Bench) -> str:
    """Memory that no process has mapped is counted, or not to be had."""
    code = """
import os
try: fds = [os.memfd_create(str(i)) for i in range(8)]
except OSError as error: print("refused", error.errno); raise SystemExit
written = 0
try:
    for fd in fds:
        for _ in range(128): written += os.write(fd, bytes(2**20))
except OSError as error: print("stopped", written // 2**20, error.errno)
else: print("all", written // 2**20)
"""
    done = await bench.python(code)
    require("all" not in done.stdout, f"1024 MB went through: {done}")
    return done.stdout.strip() or done.status


@case(Isolation.NAMESPACES)
async def shared_memory(bench: Bench) -> str:
    return await _fill(bench, "/dev/shm/")


@case(Isolation.NAMESPACES)
async def disk(bench: Bench) -> str:
    for place in ("", "/tmp/"):
        seen = await _fill(bench, place)
    return seen


async def _fill(bench: Bench, place: str) -> str:
    code = f"""
import os
written, number = 0, 0
try:
    while written < 2**30:
        number += 1
        with open({place!r} + "fill" + str(number), "wb") as file:
            for _ in range(16): written += file.write(bytes(2**20))
except OSError as error: print("stopped", written // 2**20, error.errno)
"""
    done = await bench.python(code)
    await bench.box.exec(f"rm -f {place}fill*", timeout_s=30)
    text = done.stdout.split()
    require(text[:1] == ["stopped"] and int(text[1]) <= 40, f"in {place or 'home'}: {done}")
    return f"full after {text[1]} MB (errno {text[2]})"


@case(Isolation.NAMESPACES)
async def inodes(bench: Bench) -> str:
    code = """
n = 0
try:
    for n in range(200000): open("/tmp/i%d" % n, "w").close()
except OSError as error: print("stopped", n, error.errno)
"""
    done = await bench.python(code, timeout_s=60)
    if "stopped" not in done.stdout and (done.oom or bench.isolation == Isolation.KERNEL):
        return f"bounded by its memory alone: {done.status}"
    text = done.stdout.split()
    require(text[:1] == ["stopped"] and int(text[1]) <= 2048, done)
    return f"full after {text[1]} files (errno {text[2]})"


@case()
async def endless_output(bench: Bench) -> str:
    """What is kept is bounded, and the program is neither killed for it nor waited for longer than its time."""

    async def attempt() -> float:
        began = time.monotonic()
        done = await bench.box.exec("exec yes", timeout_s=1.0, max_output=10_000)
        took = time.monotonic() - began
        require(len(done.stdout) == 10_000 and done.truncated and done.timed_out, (len(done.stdout), done.truncated))
        return took

    return f"10,000 bytes kept, {await at_best(1.7, attempt):.2f} s"


_DAEMON = """
import os, signal
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
os.execvp("sleep", ["sleep", "{word}"])
"""
_SEEN = (
    "until cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -q '{pattern}'; do sleep 0.02; done; echo seen"
)


@case()
async def stubborn_daemon(bench: Bench) -> str:
    """One that ignores signals and left its session ends with its sandbox."""
    num_seen = 0

    async def attempt() -> float:
        nonlocal num_seen
        word = f"863{secrets.randbelow(10**6):06d}"
        async with bench.afresh() as fresh:
            await fresh.python(_DAEMON.format(word=word))
            pattern = f"sleep [{word[0]}]{word[1:]}"  # which does not find itself
            seen = await fresh.box.exec(_SEEN.format(pattern=pattern), timeout_s=30)
            require(seen.stdout == "seen\n", f"the daemon did not start: {seen}")
            daemons = Watched(processes_with(word))
            await fresh.box.delete()
            num_seen = len(daemons)
            return await daemons.ended_after()

    took = await at_best(1.0, attempt)
    return f"gone after {took:.2f} s; {num_seen} seen from here"


@case()
async def stops_itself(bench: Bench) -> str:
    async def attempt() -> float:
        began = time.monotonic()
        done = await bench.python("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", timeout_s=0.5)
        took = time.monotonic() - began
        require(done.timed_out, f"{done} after {took:.2f} s")
        after = await bench.box.exec("echo alive", timeout_s=30)
        require(after.stdout == "alive\n", after)
        return took

    return f"killed after {await at_best(1.5, attempt):.2f} s; the next program runs"


@case()
async def grandchild_holds_output(bench: Bench) -> str:
    async def attempt() -> float:
        began = time.monotonic()
        done = await bench.box.exec("sleep 60 & echo started", timeout_s=30)
        took = time.monotonic() - began
        require(done.stdout == "started\n", f"{done} after {took:.2f} s")
        return took

    return f"answered after {await at_best(2.0, attempt):.3f} s"


@case()
async def timeout_accuracy(bench: Bench) -> str:
    async def late(limit: float) -> float:
        async def attempt() -> float:
            began = time.monotonic()
            done = await bench.box.exec(["sleep", "60"], timeout_s=limit)
            late = time.monotonic() - began - limit
            require(done.timed_out and late > -0.01, f"{done}, late by {late:.3f} s")
            return late

        return await at_best(0.2, attempt)

    off = [await late(limit) for limit in (0.3, 1.0, 0.5)]
    return f"late by at most {1000 * max(off):.0f} ms"


_MEASURED_S, _THROTTLED_S = 3.0, 30.0


@case(Isolation.PROCESS, limits=Limits(memory_mb=128, disk_mb=32, cpus=0.25))
async def processor_share(bench: Bench) -> str:
    """A quarter of a core, where a cgroup counts it."""
    if not any(layer.startswith("cgroup") for layer in bench.layers):
        raise Unfit("no cgroup counts processors here")
    group = bench.group
    if group is None or "cpu" not in group.directories:
        return f"{await at_best(0.5, lambda: _share_by_itself(bench)):.2f} of a core, by its own account"
    burning = await bench.box.background(["python3", "-c", "print('burning', flush=True)\nwhile True: pass"])
    require(await heard(burning, b"burning\n") == b"burning\n", "it does not burn")
    share = await at_best(0.5, lambda: _share(group.directories["cpu"]))
    await burning.forget()
    return f"{share:.2f} of a core"


async def _share_by_itself(bench: Bench) -> float:
    code = f"""
import time
began, spent = time.monotonic(), time.process_time()
while time.monotonic() - began < {_MEASURED_S}: pass
print((time.process_time() - spent) / (time.monotonic() - began))
"""
    return float((await bench.python(code)).stdout)


async def _share(directory: Path) -> float:
    """Of a core, used by what a cgroup counts, once it was held back. Time is read around what is read of it."""
    began, used, throttled = time.monotonic(), _cpu_s(directory), _num_throttled(directory)
    while (took := time.monotonic() - began) < _MEASURED_S or _num_throttled(directory) == throttled:
        require(took < _THROTTLED_S, f"not held back once in {took:.1f} s")
        await asyncio.sleep(0.1)
    used = _cpu_s(directory) - used
    require(used > 0, "nobody in it used a processor")
    return used / (time.monotonic() - began)


def _cpu_s(directory: Path) -> float:
    """Of the processes in a cgroup, as the kernel accounts for them outside."""
    ticks = 0
    for number in (directory / "cgroup.procs").read_text().split():
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _num_throttled(directory: Path) -> int:
    lines = (line.split() for line in (directory / "cpu.stat").read_text().splitlines())
    return int(dict(lines)["nr_throttled"])
