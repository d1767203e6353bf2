"""What a program must not see or touch: this machine, the service, and other sandboxes."""

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from palestra.core.deadline import within
from palestra.sandbox.agent import children_of
from palestra.sandbox.check import Bench, Unfit, at_best, case, require
from palestra.sandbox.records import Isolation

_SECRET = "PALESTRA_CHECK_SECRET"
_GONE_S = 30.0


def processes_with(word: str) -> list[int]:
    """Of this machine, by their command lines."""
    found = (place for place in Path("/proc").glob("[0-9]*/cmdline") if word.encode() in _read(place))
    return [int(place.parent.name) for place in found]


class Watched:
    """Processes of this machine whose ends are waited for, once."""

    def __init__(self, pids: Iterable[int]):
        self._fds = []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                self._fds.append(os.pidfd_open(pid))

    def __len__(self) -> int:
        return len(self._fds)

    async def ended_after(self) -> float:
        """How long from now all of them took. Errors: Held, if some do not end."""
        began = time.monotonic()
        loop, ends = asyncio.get_running_loop(), list[asyncio.Future[None]]()
        for fd in self._fds:
            end: asyncio.Future[None] = loop.create_future()
            loop.add_reader(fd, self._on_end, fd, end)
            ends.append(end)
        waiting = (await asyncio.wait(ends, timeout=_GONE_S))[1] if ends else set()
        took = time.monotonic() - began
        self._close()
        require(not waiting, f"{len(waiting)} of {len(self)} processes are left after {took:.0f} s")
        return took

    def _on_end(self, fd: int, end: asyncio.Future[None]) -> None:
        asyncio.get_running_loop().remove_reader(fd)
        end.set_result(None)

    def _close(self) -> None:
        for fd in self._fds:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)


def _read(place: Path) -> bytes:
    try:
        return place.read_bytes()
    except OSError:
        return b""


@case(Isolation.NAMESPACES)
async def host_files(bench: Bench) -> str:
    """Neither what is private here, nor where this program's own sources and packages lie."""
    here = Path(__file__).resolve()
    mark = Path(f"/var/tmp/palestra-check-{secrets.token_hex(6)}")
    mark.write_text("seen")
    try:
        wanted = [str(mark), str(here), "/etc/shadow", "/root/.ssh", "/home", str(Path.cwd()), "/sys/kernel", "/boot"]
        code = f"import os\nfor p in {wanted!r}:\n  if os.path.exists(p): print(p)"
        done = await bench.python(code)
    finally:
        mark.unlink()
    seen = [line for line in done.stdout.splitlines() if line != "/home" and not line.startswith("/sys")]
    require(done.exit_code == 0 and not seen, f"it sees {seen}; {done.stderr[-200:]}")
    return f"{len(wanted)} places looked for in vain"


@case(Isolation.NAMESPACES)
async def installed_packages(bench: Bench) -> str:
    """What is installed beside us, answers of tests perhaps, cannot be imported or found."""
    done = await bench.python("import palestra")
    require("ModuleNotFoundError" in done.stderr, done)
    found = await bench.box.exec("find / -name 'palestra*' -not -path '/proc/*' 2>/dev/null | head -3", timeout_s=60)
    require(not found.stdout.strip(), found.stdout)
    return "nothing of ours in there"


@case()
async def environment(bench: Bench) -> str:
    os.environ[_SECRET] = "a secret"
    try:
        box = await bench.host.create(timeout_s=60)
        async with box:
            done = await box.exec("env", timeout_s=30)
    finally:
        del os.environ[_SECRET]
    names = {line.partition("=")[0] for line in done.stdout.splitlines()}
    known = {"PATH", "HOME", "USER", "LANG", "TMPDIR", "PWD", "SHLVL", "_", "PYTHONPATH", "OLDPWD", "HOSTNAME", "TERM"}
    require("PATH" in names and names <= known, sorted(names - known))
    return f"{len(names)} variables, none of ours"


@case(Isolation.NAMESPACES)
async def environment_of_first_process(bench: Bench) -> str:
    done = await bench.box.exec("cat /proc/1/environ | tr '\\0' '\\n'; cat /proc/1/cmdline", timeout_s=30)
    ours = {value for value in os.environ.values() if len(value) > 12 and value in done.stdout}
    known = {value for value in ours if value in os.defpath or "/bin" in value}
    require(not ours - known, sorted(ours - known))
    return "closed" if "denied" in done.stderr else f"{len(done.stdout)} bytes, none of ours"


@case()
async def inherited_descriptors(bench: Bench) -> str:
    with open("/etc/hostname", "rb") as file:
        os.set_inheritable(file.fileno(), True)
        async with await bench.host.create(timeout_s=60) as box:
            code = "import os; print(*sorted(int(fd) for fd in os.listdir('/proc/self/fd')))"
            done = await box.exec(["python3", "-c", code], timeout_s=30)
    numbers = done.stdout.split()
    require(numbers[:3] == ["0", "1", "2"] and len(numbers) <= 4, done)  # the fourth is that of the listing
    return "0, 1 and 2 alone"


@case(Isolation.NAMESPACES)
async def settings_of_the_kernel(bench: Bench) -> str:
    """Also where the service runs as root."""
    code = """
import os
done = []
for top in ("/proc/sys/kernel/core_pattern", "/proc/sys/vm/overcommit_memory", "/proc/sys/kernel/hostname",
            "/proc/sysrq-trigger", "/proc/sys/net/ipv4/ip_forward"):
    try: fd = os.open(top, os.O_WRONLY); os.close(fd); done.append(top)
    except OSError: pass
print(done)
"""
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    done = await bench.python(code)
    opened = done.stdout.strip()
    require(Path("/proc/sys/kernel/core_pattern").read_text() == before, "core_pattern of this machine changed")
    require(opened == "[]" or bench.isolation == Isolation.KERNEL, f"opened for writing: {opened} {done.stderr[-200:]}")
    return "none can be opened" if opened == "[]" else f"of its own kernel: {opened}"


@case(Isolation.NAMESPACES)
async def read_only_root(bench: Bench) -> str:
    """All that is not the sandbox's own is mounted read-only, and cannot be written."""
    code = """
import os
places = ["/", "/usr", "/usr/bin", "/usr/lib", "/etc", "/dev", "/opt", "/proc", os.path.dirname(os.__file__)]
written = []
for place in places:
    try: open(os.path.join(place, "x"), "w").close(); written.append(place)
    except OSError: pass
own = {"/box", "/home/user", "/tmp", "/var/tmp", "/dev/shm"}
for line in open("/proc/self/mounts"):
    _, place, kind, flags = line.split()[:4]
    if place in own or place.startswith(("/dev", "/proc")): continue
    if "ro" not in flags.split(","): written.append(line.strip())
print(written)
"""
    done = await bench.python(code)
    if bench.isolation == Isolation.KERNEL:
        require("'/usr" not in done.stdout and "'/etc" not in done.stdout, done)
        return "nothing of this machine is written"
    require(done.stdout.strip() == "[]", done)
    return "nothing but its own is writable"


@case(Isolation.PROCESS)
async def own_user(bench: Bench) -> str:
    """As root: a number of its own outside, neither root's nor another sandbox's."""
    if os.geteuid() != 0:
        raise Unfit("an ordinary user has one number, which all its sandboxes share")
    if bench.isolation == Isolation.KERNEL:
        raise Unfit("users of its own kernel are not this machine's")
    users = []
    for box in (bench.box, bench.sibling):
        seconds = f"864{secrets.randbelow(10**6):06d}"
        process = await box.background(["sh", "-c", f"echo begun; sleep {seconds}; true"])
        require(await process.read(wait_s=60) == (b"begun\n", b""), "a program that begins")
        users += [Path(f"/proc/{pid}").stat().st_uid for pid in processes_with(seconds)[:1]]
        await process.forget()
    require(len(users) == 2 and 0 not in users and users[0] != users[1], f"users {users}")
    return f"users {users[0]} and {users[1]}"


@case(Isolation.NAMESPACES)
async def processes_of_the_machine(bench: Bench) -> str:
    """It sees its own alone, and reaches none of ours."""
    done = await bench.box.exec("ls /proc | grep -c '^[0-9]'", timeout_s=30)
    require(int(done.stdout) < 8, f"{done.stdout.strip()} processes are visible")
    code = f"""
import os, signal
for pid in ({os.getpid()}, {os.getppid()}, -1):
    try: os.kill(pid, signal.SIGKILL)
    except OSError: pass
"""
    killed = await bench.python(code)
    require(killed.exit_code in (0, None), killed)
    return f"{done.stdout.strip()} processes visible"


@case(Isolation.NAMESPACES)
async def signals_to_the_agent(bench: Bench) -> str:
    code = "import os, signal\nfor n in (9, 19, 15, 11):\n  try: os.kill(1, n)\n  except OSError: pass"
    done = await bench.python(code)
    if bench.host.backend.ends_by_programs and done.signal == 9:
        return "it ends, and that is the program's own failure"
    after = await bench.box.exec("echo alive", timeout_s=30)
    require(after.stdout == "alive\n", after)
    return "it does not care"


@case()
async def killed_agent(bench: Bench) -> str:
    """A program that kills what started it has an answer of its own: it stands, or has failed; nothing to try again."""
    async with await bench.host.create(timeout_s=60) as box:
        killing = ["python3", "-c", "import os, time; os.kill(os.getppid(), 9); time.sleep(0.5); print('on')"]
        done = await box.exec(killing, timeout_s=30)
    require(done.stdout == "on\n" or (done.signal == 9 and bench.host.backend.ends_by_programs), done)
    return "it does not care" if done.stdout else "it ends, and that is the program's own failure"


@case(Isolation.NAMESPACES)
async def memory_of_the_agent(bench: Bench) -> str:
    own = bench.isolation == Isolation.KERNEL  # there, names of descriptors may be seen, but none can be opened
    code = (
        f"own = {own}"
        + """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
done = []
if libc.ptrace(16, 1, 0, 0) == 0: done.append("ptrace attached")
for name in ("mem", "environ", "fd", "maps"):
    try:
        place = "/proc/1/" + name
        seen = os.listdir(place) if name == "fd" else open(place, "rb").read(64)
        if name == "mem" or name == "fd" and not own: done.append(name)
    except OSError: pass
fd = libc.syscall(434, 1, 0)
if fd >= 0 and libc.syscall(438, fd, 3, 0) >= 0: done.append("pidfd_getfd")
print(done)
"""
    )
    done = await bench.python(code)
    require(done.stdout.strip() == "[]", done)
    return "closed"


@case(Isolation.NAMESPACES)
async def forged_frames(bench: Bench) -> str:
    """Whatever it writes to what it can write to, is output and no answer of the agent."""
    code = """
import json, os, struct
text = json.dumps({"id": 1, "exit_code": 0, "stdout_bytes": 0}).encode()
frame = struct.pack("!II", len(text), 0) + text
for fd in list(range(3, 64)):
    try: os.write(fd, frame)
    except OSError: pass
for fd in range(64):
    try: os.write(os.open("/proc/1/fd/%d" % fd, os.O_WRONLY), frame)
    except OSError: pass
os.write(1, frame)
raise SystemExit(7)
"""
    done = await bench.python(code)
    require(done.exit_code == 7 and "exit_code" in done.stdout, done)
    after = await bench.box.exec("echo alive", timeout_s=30)
    require(after.stdout == "alive\n", after)
    return "they are output"


@case(Isolation.NAMESPACES)
async def sibling(bench: Bench) -> str:
    """Its files, its shared memory, its processes."""
    await bench.sibling.exec(
        "echo mine > /tmp/private; echo mine > /dev/shm/private; echo mine > private", timeout_s=30
    )
    napping = await bench.sibling.background(["sleep", "77"])
    try:
        found = await bench.box.exec(
            "cat /tmp/private /dev/shm/private ~/private; cat /proc/[0-9]*/comm 2>/dev/null | grep sleep",
            timeout_s=30,
        )
    finally:
        await napping.forget()
        await bench.sibling.exec("rm -f /tmp/private /dev/shm/private private", timeout_s=30)
    require("mine" not in found.stdout and "sleep" not in found.stdout, found)
    return "not to be found"


@case()
async def killed_service(bench: Bench) -> str:
    """`kill -9` of the process that owns sandboxes: none of them is left after a second."""
    num_born = 0

    async def attempt() -> float:
        nonlocal num_born
        born = await _orphaned(bench)
        num_born = len(born)
        return await born.ended_after()

    took = await at_best(1.0, attempt)
    return f"0 of {num_born} processes left after {took:.2f} s"


async def _orphaned(bench: Bench) -> Watched:
    """What came from a process with two sandboxes, which was killed."""
    options = bench.host.options
    word = f"864{secrets.randbelow(10**6):06d}"
    code = _OWNER.format(word=word, backend=bench.host.backend.name, options=options)
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert owner.stdout is not None
    try:
        line = await within(60, owner.stdout.readline(), waiting_for="a process with two sandboxes")
        require(line == b"ready\n", f"the owner says {line!r}")
        born = Watched(children_of(owner.pid) | set(processes_with(word)))
        require(len(born) >= 2, f"only {len(born)} processes came from it")
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        await within(30, owner.wait(), waiting_for="the killed owner")
    return born


_OWNER = """
import asyncio
from palestra.sandbox import Host, Options
async def main():
    options = Options(
        backend={backend!r}, image={options.image!r}, packages={options.packages!r}, without={options.without!r}
    )
    async with Host(options) as host:
        for _ in range(2):
            box = await host.create()
            await box.background(["sleep", "{word}"])
        print("ready", flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""
