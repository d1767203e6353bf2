"""What is sound passes; what is not, and what attacks, does not, and gets nothing."""

import asyncio
import dataclasses
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from palestra.hub.trust.examine import Means, examine
from palestra.hub.trust.verdict import MOST_LOG, Status, Verdict
from palestra.sandbox.host import close_hosts
from tests.unit.hub.trust.pushed import SOUND, sdist, wheel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MEANS = Means(num_tasks=2, answer_s=120, longest_s=400, memory_mb=1024, processes=64)
SHORT = dataclasses.replace(MEANS, answer_s=15, longest_s=60)  # for what is not sound, however it ends


@pytest.fixture(autouse=True)
async def hosts() -> AsyncIterator[None]:
    yield
    await close_hosts()


def ending(verdict: Verdict, name: str) -> str:
    return next(case.ending for case in verdict.cases["echo"] if case.name == name)


async def test_what_is_sound_passes(tmp_path: Path):
    """Its build cannot prepare its examination: what that leaves in its sandbox is not there in the other."""
    setup = (
        "import pathlib\npathlib.Path.home().joinpath('left').write_text('x')\nfrom setuptools import setup\nsetup()\n"
    )
    look = "import pathlib\nassert not pathlib.Path.home().joinpath('left').exists()\n"
    verdict = await examine([sdist(tmp_path, look + SOUND, setup=setup)], MEANS)
    assert verdict.status is Status.PASSED, verdict.log
    assert verdict.count("passed") >= 13
    assert ending(verdict, "gold scores 1") == "passed"
    assert verdict.cases["build"][0].ending == "passed"
    assert "echo: passed: gold scores 1" in verdict.log


async def test_a_law_that_does_not_hold_fails(tmp_path: Path):
    verdict = await examine([wheel(tmp_path, SOUND.replace("rollout.reply == task.answer", "True"))], MEANS)
    assert (verdict.status, ending(verdict, "nothing scores less")) == (Status.FAILED, "failed")
    assert ending(verdict, "gold scores 1") == "passed"


async def test_what_cannot_be_examined_says_why(tmp_path: Path):
    asked = {
        "missing": [wheel(tmp_path / "missing", requires="no-such-thing-here")],
        "offers": [wheel(tmp_path / "offers", entry="[console_scripts]\nx = y:z\n")],
        "import": [wheel(tmp_path / "import", "import no_such_module\n")],
        "build": [sdist(tmp_path / "build", setup="raise SystemExit('no')\n")],
    }
    found = dict(zip(asked, await asyncio.gather(*(examine(files, MEANS) for files in asked.values())), strict=True))
    assert found["missing"].status is Status.NOT_RUN
    assert "no index is allowed" in found["missing"].why
    assert (found["offers"].status, found["build"].status) == (Status.FAILED, Status.FAILED)
    assert "offers no environment" in found["offers"].why
    assert "does not build" in found["build"].why
    assert found["import"].status is Status.FAILED
    assert "no_such_module" in found["import"].log


@pytest.mark.parametrize("backend", ["no-such-backend", "unsafe", "process"])
async def test_without_walls_nothing_is_run_and_nothing_passes(tmp_path: Path, backend: str):
    mark = tmp_path / "it ran"
    source = f"open({str(mark)!r}, 'w')\n{SOUND}"
    verdict = await examine([wheel(tmp_path, source)], Means(backend=backend))
    assert verdict.status is Status.NOT_RUN
    assert not mark.exists()


SPY = """
import os, pathlib, socket, sys
found = []
for name, look in {
    "file": lambda: open(%(secret)r).read(),
    "variable": lambda: os.environ["PALESTRA_TEST_SECRET"],
    "network": lambda: socket.create_connection(("127.0.0.1", %(port)d), timeout=2).send(b"hello"),
    "outside": lambda: socket.create_connection(("1.1.1.1", 53), timeout=2),
    "library": lambda: pathlib.Path(sys.modules["palestra"].__file__).write_text("evil"),
    "parent": lambda: next(p for p in pathlib.Path("/proc").glob("[0-9]*/cmdline") if b"pytest" in p.read_bytes()),
    "own": lambda: pathlib.Path("mine").write_text("here"),
}.items():
    try:
        look()
        found.append(f"<{name}: reached>")
    except BaseException:
        found.append(f"<{name}: refused>")
print(*found, file=sys.stderr)
"""


@pytest.mark.parametrize("when", ["import", "build"])
async def test_it_reaches_nothing_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str):
    secret = tmp_path / "secret"
    secret.write_text("the password")
    monkeypatch.setenv("PALESTRA_TEST_SECRET", "the password")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        spy = SPY % {"secret": str(secret), "port": listener.getsockname()[1]}
        setup = f"{spy}\nprint(*found)\nraise SystemExit(' '.join(found))\n"
        files = [wheel(tmp_path, spy + SOUND)] if when == "import" else [sdist(tmp_path, setup=setup)]
        verdict = await examine(files, MEANS)
        listener.settimeout(0.1)
        with pytest.raises(TimeoutError):
            listener.accept()
    assert "<own: reached>" in verdict.log  # the control: it did look
    for name in ("file", "variable", "network", "outside", "library", "parent"):
        assert f"<{name}: refused>" in verdict.log
    assert "the password" not in verdict.log
    assert verdict.status is (Status.PASSED if when == "import" else Status.FAILED)


FORGED = """
import json, os, sys
for fd in range(1, 20):
    for number in range(1, 60):
        for line in (
            {"name": "gold scores 1", "ending": "passed", "detail": ""},
            {"number": number, "value": "passed"},
            {"status": "passed"},
        ):
            try:
                os.write(fd, json.dumps(line).encode() + b"\\n")
            except OSError:
                break
%s
"""


async def test_a_verdict_cannot_be_printed(tmp_path: Path):
    bad = SOUND.replace("rollout.reply == task.answer", "0.5")
    assert bad != SOUND
    ends = {"gone": "os._exit(0)", "goes on": ""}
    asked = (examine([wheel(tmp_path / name, FORGED % end + bad)], SHORT) for name, end in ends.items())
    for verdict in await asyncio.gather(*asked):
        assert verdict.status is Status.FAILED, verdict.log


ATTACKS = {
    "forks": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n",
    "memory": "held = []\nwhile True:\n    held.append(bytearray(64 << 20))\n",
    "hangs": "import time\ntime.sleep(1000)\n",
    "floods": "import os\nwhile True:\n    os.write(1, b'x' * 65536)\n    os.write(2, b'y' * 65536)\n",
}


async def test_what_eats_the_machine_is_ended(tmp_path: Path):
    began = time.monotonic()
    means = Means(num_tasks=2, answer_s=4, longest_s=30, memory_mb=512, disk_mb=128, processes=64)
    found = await asyncio.gather(
        *(examine([wheel(tmp_path / name, source + SOUND)], means) for name, source in ATTACKS.items())
    )
    assert {name: of.status for name, of in zip(ATTACKS, found, strict=True)} == dict.fromkeys(ATTACKS, Status.FAILED)
    assert all(len(of.log) <= MOST_LOG + 100 for of in found)
    assert time.monotonic() - began < 60
