"""What a sandbox must do: programs, files, processes and ports as the manual says."""

import asyncio
import contextlib
import functools
import os
import signal
import tempfile
import time
from pathlib import Path

from palestra.sandbox.box import Process
from palestra.sandbox.check import Bench, Unfit, at_best, case, gathered, require
from palestra.sandbox.records import Isolation, Limits, SandboxError, SandboxGoneError

_ROOMY = Limits(memory_mb=512, disk_mb=64, processes=128)


@case()
async def programs(bench: Bench) -> str:
    """Exit codes, signals, input, working directory, environment, quoting, programs that there are not."""
    box = bench.box
    done = await box.exec("cat; echo err >&2; exit 3", stdin="given", timeout_s=30)
    require((done.exit_code, done.stdout, done.stderr, done.status) == (3, "given", "err\n", "failed"), done)
    await box.exec(["mkdir", "-p", "a b"], timeout_s=30)
    done = await box.exec(["sh", "-c", 'echo "$X|$PWD|$1"', "sh", "$HOME 'x'"], cwd="a b", env={"X": "é"}, timeout_s=30)
    require(done.stdout == f"é|{box.home}/a b|$HOME 'x'\n", done)
    done = await box.exec("kill -TERM $$", timeout_s=30)
    require((done.exit_code, done.signal) == (None, 15), done)
    require((await box.exec(["no-such-program"], timeout_s=30)).exit_code == 127, "a program that there is not")
    require((await box.exec(["/etc/passwd"], timeout_s=30)).exit_code == 126, "a file that is no program")
    done = await box.exec(["head", "-c", "3000000", "/dev/zero"], max_output=1000, timeout_s=30)
    require(len(done.stdout) == 1000 and done.truncated and done.exit_code == 0, (len(done.stdout), done.truncated))
    return "as they should"


@case()
async def accounts(bench: Bench) -> str:
    """Time and memory of a program, as far as they can be foretold."""
    seen = ""

    async def attempt() -> float:
        nonlocal seen
        done = await bench.python(
            "import time; x = b'x' * (40 * 2**20); t = time.process_time()\nwhile time.process_time() - t < 0.3: pass"
        )
        require(done.exit_code == 0 and 0.25 < done.cpu_s <= done.wall_s + 0.2, done)
        require(40 * 2**20 < done.max_rss < 120 * 2**20, done)
        seen = f"{done.cpu_s:.2f} s of processor, {done.max_rss / 2**20:.0f} MB"
        return done.wall_s

    await at_best(10.0, attempt)
    return seen


@case()
async def many_at_once(bench: Bench) -> str:
    done = await gathered(*(bench.box.exec(["sh", "-c", f"sleep 0.1; echo {n}"], timeout_s=20) for n in range(20)))
    require([one.stdout for one in done] == [f"{n}\n" for n in range(20)], done)
    return "20 programs, each with its own output"


@case()
async def file_parts(bench: Bench) -> str:
    box = bench.box
    await box.write("deep/er/file", b"0123456789")
    await box.write("deep/er/file", b"AB", offset=4)
    require(await box.read("deep/er/file") == b"0123AB6789", "a part that was written")
    require(await box.read("deep/er/file", 3, 4) == b"3AB6", "a part that was read")
    large = os.urandom(9 * 2**20)
    await box.write("large", large)
    require(await box.read("large") == large, "nine megabytes there and back")
    listed = {(f.path, f.kind, f.size) for f in await box.list_files("deep", recursive=True) if f.kind == "file"}
    require(listed == {("er/file", "file", 10)}, listed)
    await box.remove("deep")
    for missing in (box.read("deep/er/file"), box.read("nothing"), box.list_files("nothing")):
        with contextlib.suppress(FileNotFoundError):
            await missing
            require(False, "a file that there is not was found")
    return "written, read and listed"


@case()
async def directories(bench: Bench) -> str:
    with tempfile.TemporaryDirectory(prefix="palestra-check-") as top:
        source, target = Path(top, "source"), Path(top, "target")
        (source / "sub").mkdir(parents=True)
        (source / "run.sh").write_text("#!/bin/sh\necho ran\n")
        (source / "run.sh").chmod(0o755)
        (source / "sub" / "data").write_bytes(bytes(range(256)))
        await bench.box.upload_dir(source, "up")
        done = await bench.box.exec(["up/run.sh"], timeout_s=30)
        require(done.stdout == "ran\n", done)
        await bench.box.download("up", target)
        require((target / "sub" / "data").read_bytes() == bytes(range(256)), "bytes there and back")
    return "up and down"


@case()
async def talking(bench: Bench) -> str:
    """A program that is talked to line by line, is sent a signal, and waits while nobody reads it."""
    code = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"signalled\\n"))
for line in sys.stdin: print(line.strip().upper(), flush=True)
print("end"); raise SystemExit(5)
"""
    process = await bench.box.open_process(["python3", "-c", code])
    await process.send("one\n")
    require(await heard(process, b"ONE\n") == b"ONE\n", "the first answer")
    await process.signal(signal.SIGUSR1)
    require(await heard(process, b"signalled\n") == b"signalled\n", "the signal")
    await process.send("two\n", eof=True)
    done = await process.wait(60)
    require((done.stdout, done.exit_code) == ("TWO\nend\n", 5), done)
    flood = await bench.box.open_process(["sh", "-c", "yes | head -c 5000000"], buffer=65_536)
    await asyncio.sleep(0.3)
    total = 0
    async for _, piece in flood.output():
        total += len(piece)
    require(total == 5_000_000, f"{total} bytes of 5,000,000")
    return "both ways, nothing lost"


async def heard(process: Process, until: bytes) -> bytes:
    """What it writes until then; what there was, if nothing like it comes in a minute."""
    said = b""
    deadline = time.monotonic() + 60
    while not said.endswith(until) and time.monotonic() < deadline:
        said += (await process.read(wait_s=1))[0]
    return said


@case()
async def background(bench: Bench) -> str:
    server = await bench.box.background(["sh", "-c", "echo started; sleep 300"])
    require(await heard(server, b"started\n") == b"started\n", "it did not start")
    require((await server.logs())[0] == "started\n", await server.logs())
    require([p.number for p in await bench.box.processes()] == [server.number], "the processes that run")
    await server.kill()
    done = await server.wait(60)
    require(done.signal == 9, done)
    return "started, listed, killed"


_SERVER = """
import http.server as h
class Handler(h.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers(); self.wfile.write(b"inside")
server = h.HTTPServer(("127.0.0.1", 8123), Handler)
print("listening", flush=True)
server.serve_forever()
"""


@case(Isolation.NAMESPACES)
async def ports(bench: Bench) -> str:
    server = await bench.box.background(["python3", "-c", _SERVER])
    require(await heard(server, b"listening\n") == b"listening\n", "the server did not start")
    where = await bench.box.expose_port(8123)
    for _ in range(3):
        reader, writer = await asyncio.open_connection(where.host, where.host_port)
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        require(answer.endswith(b"inside"), answer)
    return f"port 8123 at {where.host}:{where.host_port}"


@case()
async def lifetime(bench: Bench) -> str:
    """A sandbox ends when its time is over, also in the middle of a program; its time can be set anew."""

    async def attempt() -> float:
        box = await bench.host.create(timeout_s=0.5)
        began = time.monotonic()
        try:
            done = await box.exec(["sleep", "60"], timeout_s=30)
            require(False, done)
        except SandboxGoneError as error:
            require("its time" in str(error), error)
        return time.monotonic() - began

    took = await at_best(2.0, attempt)
    async with await bench.host.create(timeout_s=0.5) as kept:
        await kept.set_timeout(60)
        await asyncio.sleep(0.7)
        require((await kept.exec("echo here", timeout_s=30)).stdout == "here\n", "it was to live on")
    return f"ended after {took:.2f} s of 0.5"


@case()
async def labels(bench: Bench) -> str:
    made = await bench.host.bulk_create(3, timeout_s=60, labels=("check", "three"))
    found = await bench.host.list(labels=("three",))
    require({b.id for b in found} == {b.id for b in made}, found)
    require(await bench.host.bulk_delete(labels=("three",)) == 3, "three were to be deleted")
    require(not await bench.host.list(labels=("three",)), "none was to be left")
    try:
        await made[0].exec("true")
        require(False, "a deleted sandbox ran a program")
    except SandboxGoneError:
        pass
    return "three made, listed, deleted"


@case()
async def same_key(bench: Bench) -> str:
    boxes = await gathered(*(bench.host.create(timeout_s=60, key="check-key") for _ in range(5)))
    require(len({box.id for box in boxes}) == 1, [box.id for box in boxes])
    await boxes[0].delete()
    again = await bench.host.create(timeout_s=60, key="check-key")
    require(again.id != boxes[0].id, "one that is gone was given again")
    await again.delete()
    return "one sandbox for five requests"


@case()
async def create_delete_race(bench: Bench) -> str:
    """Made and deleted at once, in the making and in the middle of a program: nothing hangs, nothing is left."""
    before = len(bench.host.boxes)

    async def one(number: int) -> None:
        making = asyncio.create_task(bench.host.create(timeout_s=60))
        if number % 3 == 0:
            await asyncio.sleep(0.001 * number)
            making.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await (await making).delete()
            return
        box = await making
        running = asyncio.create_task(box.exec("sleep 60; echo late", timeout_s=90))
        await asyncio.sleep(0.001 * (number % 7))
        await gathered(box.delete(), box.delete())
        try:
            done = await asyncio.wait_for(running, 30)
            require(False, done)
        except SandboxError:
            pass

    await gathered(*(one(number) for number in range(24)))
    await asyncio.sleep(0.2)
    require(len(bench.host.boxes) == before, f"{len(bench.host.boxes)} sandboxes, {before} before")
    return "24 at once"


@case(limits=_ROOMY)
async def threads(bench: Bench) -> str:
    code = """
import threading
some = [threading.Thread(target=lambda: None) for _ in range(20)]
for one in some: one.start()
for one in some: one.join()
print("joined")
"""
    done = await bench.python(code)
    require(done.stdout == "joined\n", done)
    return "20 of them"


@case(limits=_ROOMY)
async def subprocesses(bench: Bench) -> str:
    code = """
import subprocess, sys
print(subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True).stdout.strip())
"""
    done = await bench.python(code)
    require(done.stdout == "42\n", done)
    return "work"


@case(limits=_ROOMY)
async def multiprocess(bench: Bench) -> str:
    if bench.isolation == Isolation.PROCESS:
        raise Unfit("its programs have no /dev/shm of their own, which semaphores need")
    code = """
import multiprocessing as m
if __name__ == "__main__":
    for how in ("fork", "spawn"):
        with m.get_context(how).Pool(2) as pool: print(sum(pool.map(abs, range(-10, 0))))
"""
    await bench.box.write("pool.py", code)
    done = await bench.box.exec(["python3", "pool.py"], timeout_s=40)
    require(done.stdout == "55\n55\n", done)
    return "fork and spawn"


@case(limits=_ROOMY)
async def numpy(bench: Bench) -> str:
    done = await bench.python("import numpy as n; print(int((n.arange(1000.) @ n.ones(1000))))", timeout_s=40)
    if "ModuleNotFoundError" in done.stderr:
        raise Unfit("numpy is not among the packages of this sandbox")
    require(done.stdout == "499500\n", done)
    return "works"


@case()
async def one_shot(bench: Bench) -> str:
    """A program from the warm pool: its input, its files, its failures, its time."""
    run = functools.partial(bench.host.run_code, timeout_s=30)
    done = await run("import sys; print(open('d/x').read() + input()); sys.exit(4)", stdin="in", files={"d/x": "file "})
    require((done.stdout, done.exit_code) == ("file in\n", 4), done)
    done = await run("def f():\n    raise KeyError('lost')\nf()")
    require(done.exit_code == 1 and "KeyError: 'lost'" in done.stderr and 'main.py", line 2' in done.stderr, done)
    require("zygote" not in done.stderr and "/sandbox/" not in done.stderr, done.stderr)

    async def attempt() -> float:
        done = await run("while True: pass", timeout_s=0.5)
        require(done.timed_out and done.wall_s > 0.45, done)
        return done.wall_s

    await at_best(0.75, attempt)
    done = await run("import os\nif __name__ == '__main__': print(os.getcwd(), len(os.listdir('.')))")
    require(done.exit_code == 0 and done.stdout.split()[1] == "1", done)
    done = await run(
        "import subprocess; print(subprocess.run('echo $((6 * 7))', shell=True, capture_output=True).stdout)"
    )
    require("b'42\\n'" in done.stdout, done)
    require((await run("def broken(:")).exit_code == 1, "a program that does not parse")
    return "as a program of its own"
