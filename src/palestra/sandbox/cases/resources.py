"""What a program may use up: its own, never the machine's."""

import asyncio
import time

from palestra.sandbox.cases.machine import Watched, processes_with
from palestra.sandbox.check import Bench, Unfit, case, require
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
def eat(slot, megabytes):
    kept = []
    for done in range(megabytes):
        kept.append(bytearray(b"x" * 2**20))
        tell(slot, done + 1)
    time.sleep(2)
"""
_READINGS = 10
_TOTAL = "import struct; n = struct.unpack('<9I', open('progress', 'rb').read(36)); print(n[8] or sum(n))"


@case(Isolation.PROCESS)
async def fork_bomb(bench: Bench) -> str:
    """Its processes are bounded, and all gone with its time."""
    began = time.monotonic()
    done = await bench.python(_FORKS, timeout_s=1.0)
    took = time.monotonic() - began
    is_own_end = bench.host.backend.ends_by_programs and done.signal == 9
    require((done.timed_out or is_own_end) and took < 4.0, f"{done} after {took:.1f} s")
    return f"ended after {took:.2f} s"


@case(Isolation.PROCESS)
async def memory_of_one_process(bench: Bench) -> str:
    done = await bench.python(_TOUCH + "eat(0, 2048)")
    require(done.exit_code != 0 and not done.timed_out, done)
    return await _within_bounds(bench, f"{done.status}, oom={done.oom}")


@case(Isolation.PROCESS)
async def memory_of_eight_children(bench: Bench) -> str:
    """Each is below the limit; together they are not. What counts is what all hold at one time."""
    code = """
children, whole = [], 0
for slot in range(8):
    pid = os.fork()
    if pid == 0: eat(slot, 64); os._exit(0)
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
    done = await bench.python(_TOUCH + code)
    require(done.stdout.strip() != "8", f"eight times 64 MB went through: {done}")
    return await _within_bounds(bench, f"{done.status}, oom={done.oom}")


async def _within_bounds(bench: Bench, seen: str) -> str:
    """What was touched at once, by its own account: its memory and its disk, and what a watchdog lets pass."""
    try:
        for _ in range(_READINGS):
            total = await bench.box.exec(["python3", "-c", _TOTAL], timeout_s=10)
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
    await bench.box.exec(f"rm -f {place}fill*", timeout_s=10)
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
    began = time.monotonic()
    done = await bench.box.exec("exec yes", timeout_s=1.0, max_output=10_000)
    took = time.monotonic() - began
    require(len(done.stdout) == 10_000 and done.truncated and done.timed_out, (len(done.stdout), done.truncated))
    require(took < 1.7, f"took {took:.2f} s of 1")
    return f"10,000 bytes kept, {took:.2f} s"


@case()
async def stubborn_daemon(bench: Bench) -> str:
    """One that ignores signals and left its session ends with its sandbox."""
    code = """
import os, signal, time
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
os.execvp("sleep", ["sleep", "86398"])
"""
    box = await bench.host.create(timeout_s=60)
    await box.exec(["python3", "-c", code], timeout_s=5)
    seen = await box.exec("sleep 0.2; cat /proc/[0-9]*/comm 2>/dev/null | grep -c sleep", timeout_s=5)
    require(int(seen.stdout) >= 1, f"the daemon did not start: {seen}")
    daemons = Watched(processes_with("86398"))
    await box.delete()
    left = await daemons.left(1.0)
    daemons.close()
    require(left == 0, f"{left} of {len(daemons)} are still there a second later")
    return f"gone within a second; {len(daemons)} seen from here"


@case()
async def stops_itself(bench: Bench) -> str:
    began = time.monotonic()
    done = await bench.python("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", timeout_s=0.5)
    took = time.monotonic() - began
    require(done.timed_out and took < 1.5, f"{done} after {took:.2f} s")
    after = await bench.box.exec("echo alive", timeout_s=5)
    require(after.stdout == "alive\n", after)
    return f"killed after {took:.2f} s; the next program runs"


@case()
async def grandchild_holds_output(bench: Bench) -> str:
    began = time.monotonic()
    done = await bench.box.exec("sleep 30 & echo started", timeout_s=10)
    took = time.monotonic() - began
    require(done.stdout == "started\n" and took < 2.0, f"{done} after {took:.2f} s")
    return f"answered after {took:.3f} s"


@case()
async def timeout_accuracy(bench: Bench) -> str:
    off = []
    for limit in (0.3, 1.0, 0.5):
        began = time.monotonic()
        done = await bench.box.exec(["sleep", "30"], timeout_s=limit)
        off.append(time.monotonic() - began - limit)
        require(done.timed_out, done)
    require(all(-0.01 < late < 0.2 for late in off), f"late by {off} s")
    return f"late by at most {1000 * max(off):.0f} ms"


@case(Isolation.PROCESS, limits=Limits(memory_mb=128, disk_mb=32, cpus=0.25))
async def processor_share(bench: Bench) -> str:
    """A quarter of a core, where a cgroup counts it."""
    if not any(layer.startswith("cgroup") for layer in bench.layers):
        raise Unfit("no cgroup counts processors here")
    code = """
import time
began, spent = time.monotonic(), time.process_time()
while time.monotonic() - began < 2: pass
print(time.process_time() - spent)
"""
    used = float((await bench.python(code)).stdout)
    require(used < 1.0, f"used {used:.2f} s of a core in 2 s")
    return f"{used / 2:.2f} of a core"
