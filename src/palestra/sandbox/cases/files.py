"""What comes out of a sandbox by its files: their bytes, and nothing else."""

import asyncio
import os
import tempfile
from pathlib import Path

from palestra.sandbox.cases.conformance import heard
from palestra.sandbox.check import Bench, Held, case, require
from palestra.sandbox.records import Isolation, SandboxError


async def _downloaded(bench: Bench, path: str = "d", **options) -> tuple[dict[str, bytes], str]:
    """Files by name, and what went wrong. Whatever is not a regular file there is a failure."""
    with tempfile.TemporaryDirectory(prefix="palestra-check-") as target:
        error = ""
        try:
            await asyncio.wait_for(bench.box.download(path, target, **options), 60)
        except (OSError, ValueError, SandboxError, TimeoutError) as caught:
            error = f"{type(caught).__name__}: {caught}"
        found = {}
        for directory, _, names in os.walk(target):
            for name in names:
                place = Path(directory, name)
                require(place.is_file() and not place.is_symlink(), f"{place} is no regular file")
                found[str(place.relative_to(target))] = place.read_bytes()
        return found, error


@case()
async def link_download(bench: Bench) -> str:
    """Links are not followed: what they point to on this machine is not read or written."""
    await bench.box.exec(
        "mkdir d; echo own > d/own; ln -s /etc/passwd d/file; ln -s /etc d/dir; ln -s . d/loop; ln -s /nowhere d/gone",
        timeout_s=30,
    )
    found, error = await _downloaded(bench)
    require(found == {"own": b"own\n"} and not error, (found, error))
    return "left behind"


@case()
async def slipping_names(bench: Bench) -> str:
    """Names that would lead out, were they put together carelessly."""
    code = r"""
import os
os.makedirs("d/sub"); open("d/sub/x", "w").write("x")
for name in ("..\\..\\x", "a\nb", "~", "-rf", "$(id)", "..x", "..."): open(os.path.join("d", name), "w").write("x")
"""
    done = await bench.python(code)
    found, error = await _downloaded(bench)
    require(done.exit_code == 0 and not error and len(found) == 8 and "sub/x" in found, (done, sorted(found), error))
    for path in ("../../../../etc/shadow", "d/../../../etc/shadow"):
        try:
            content = await bench.box.read(path)
        except (OSError, ValueError):
            continue
        require(bench.isolation == Isolation.NONE or b"root:" not in content, f"{path} was read")
    return "nothing leaves its directory"


@case()
async def pipe_download(bench: Bench) -> str:
    await bench.box.exec("mkdir d; mkfifo d/pipe; echo x > d/x", timeout_s=30)
    found, error = await _downloaded(bench)
    require(found == {"x": b"x\n"} and not error, (found, error))
    return await _refused(bench, "d/pipe")


@case()
async def device_download(bench: Bench) -> str:
    await bench.box.exec("mkdir d; ln -s /dev/zero d/zero; mknod d/null c 1 3", timeout_s=30)
    found, error = await _downloaded(bench)
    require(not found and not error, (found, error))
    return await _refused(bench, "d/zero", 0, 10)


async def _refused(bench: Bench, path: str, *part: int) -> str:
    """A read that waits for something is none. Errors: TimeoutError; Held, if there was something to read."""
    try:
        await asyncio.wait_for(bench.box.read(path, *part), 30)
    except TimeoutError:
        raise
    except OSError as caught:
        return f"refused at once: {caught.strerror or caught}"
    raise Held(f"{path} was read")


@case(Isolation.NAMESPACES)
async def sparse_download(bench: Bench) -> str:
    """A file that claims more than it holds is refused before anything is written."""
    done = await bench.python("import os; os.mkdir('d'); os.truncate(os.open('d/big', 65), 30 * 2**20); print('made')")
    found, error = await _downloaded(bench, max_bytes=2**20)
    require(done.stdout == "made\n" and not found and error.startswith("ValueError"), (done, len(found), error))
    return error.partition(": ")[2]


@case(Isolation.NAMESPACES)
async def changing_files(bench: Bench) -> str:
    """Files that grow, shrink and turn into links to this machine's while they are downloaded."""
    with tempfile.NamedTemporaryFile("w", dir="/var/tmp", prefix="palestra-check-") as mark:
        mark.write(_SECRET)
        mark.flush()
        os.chmod(mark.name, 0o644)
        running = await bench.box.background(["python3", "-c", _CHANGING.format(secret=mark.name)])
        require(await heard(running, b"made\n") == b"made\n", "its files were not made")
        contents: set[bytes] = set()
        for _ in range(10):
            found, _ = await _downloaded(bench)
            contents |= set(found.values())
        await running.forget()
    require(not any(_SECRET.encode() in content for content in contents), "a file of this machine came out")
    require(any(b"x" in content for content in contents), f"nothing was seen but {contents}")
    return f"{len(contents)} different contents, all its own"


_SECRET = "of this machine alone"
_CHANGING = """
import os
os.mkdir("d")
with open("d/c", "w") as file: file.write("x")
print("made", flush=True)
while True:
    for name in ("d/a", "d/b"):
        try:
            open(name, "w").write("x" * 100000); os.truncate(name, 10); os.unlink(name)
            os.symlink({secret!r}, name); os.unlink(name)
        except OSError: pass
"""


@case()
async def written_through_links(bench: Bench) -> str:
    """What is written to a path goes where programs in there could write, and nowhere else."""
    mark = Path(tempfile.gettempdir(), f"palestra-check-{os.getpid()}")
    await bench.box.exec(["ln", "-s", str(mark), "link"], timeout_s=30)
    try:
        await bench.box.write("link", "x")
    except OSError:
        pass
    there = mark.exists()
    mark.unlink(missing_ok=True)
    require(not there or bench.isolation == Isolation.NONE, "a file of this machine was written")
    return "not on this machine" if not there else "this backend has no walls"
