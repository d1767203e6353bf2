"""Images in real sandboxes: what programs find there, what they do not, and whose Python runs them."""

import dataclasses
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from palestra.core.errors import UserError
from palestra.sandbox import Host, Options, SandboxStartError
from palestra.sandbox.backends.local import Local
from palestra.sandbox.images import archives, prune, root_of
from tests.unit.sandbox.archives import config_of, docker_files, oci_files, saved, tar_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "palestra" / "images"


def _libraries(program: str) -> list[str]:
    """With the loader, by their names."""
    told = subprocess.run(["ldd", program], capture_output=True, text=True, timeout=20, check=True).stdout
    return [word for line in told.splitlines() for word in line.split() if word.startswith("/")]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A root with a shell and three programs of this machine, and nothing else of it."""
    top = tmp_path / "small"
    programs = [Path(os.path.realpath(shutil.which(name) or "")) for name in ("sh", "cat", "ls", "env")]
    if not all(place.is_file() for place in programs) or shutil.which("ldd") is None:
        pytest.skip("no programs here to make a root of")
    (top / "etc").mkdir(parents=True)
    (top / "bin").mkdir()
    for name, place in zip(("sh", "cat", "ls", "env"), programs, strict=True):
        shutil.copy(place, top / "bin" / name)
        for library in _libraries(str(place)):
            target = top / library.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, target)
    for name, text in (("etc/passwd", "root:x:0:0::/:/bin/sh\n"), ("etc/made", "here\n"), ("var/lib/x", "state\n")):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    return top


def _entries(top: Path) -> Iterator[tuple[str, str, object]]:
    for directory, _, names in os.walk(top):
        for name in names:
            place = Path(directory, name)
            yield str(place.relative_to(top)), "file", place.read_bytes()


async def test_a_directory_is_what_programs_see_and_nothing_else_is(small: Path):
    async with Host(Options(image=str(small))) as host, await host.create() as box:
        assert (await box.exec("cat /etc/made /var/lib/x")).stdout == "here\nstate\n"
        assert (await box.exec("ls /bin")).stdout.split() == ["cat", "env", "ls", "sh"]
        assert "user:x:1000:1000" in (await box.exec("cat /etc/passwd")).stdout  # ours, not the image's
        assert (await box.exec(f"ls {Path(__file__).parent} {sys.prefix} /usr/share")).exit_code != 0
        tried = await box.exec("echo evil > /etc/made; echo evil > /bin/cat; echo evil > /new; echo fine > x; cat x")
        assert tried.stdout == "fine\n"
        assert (small / "etc/made").read_text() == "here\n"
        await box.write("d/y", "1")
        await box.remove("d")  # by what the agent imports when it is asked
        assert [file.path for file in await box.list_files()] == ["x"]


async def test_a_program_of_python_in_an_image_without_it_is_told_so(small: Path):
    async with Host(Options(image=str(small))) as host:
        end = await host.run_code("print(1)")
        assert (end.exit_code, end.stdout) == (127, "")
        assert "python3" in end.stderr


async def test_preload_is_for_interpreters_of_this_machine(small: Path):
    with pytest.raises(UserError, match="preload"):
        async with Host(Options(backend="local", image=str(small), preload=("json",))):
            pass


@pytest.mark.parametrize("files", [oci_files, docker_files])
async def test_an_archive_is_what_programs_see(small: Path, tmp_path: Path, files, cache_home: Path):
    lower = tar_of(*_entries(small), ("opt/old", "file", b"old"), mode=0o755)
    upper = tar_of(
        ("opt/tool/greet", "file", b"#!/bin/sh\necho hello $WHO\n"), ("opt/.wh.old", "file", b""), mode=0o755
    )
    config = config_of([lower, upper], config={"Env": ["PATH=/opt/tool:/bin", "WHO=you", "HOME=/root"]})
    place = saved(tmp_path / "made.tar", files([lower, upper], config=config))
    async with Host(Options(image=str(place))) as host, await host.create() as box:
        assert (await box.exec("greet; ls /opt; echo $HOME")).stdout == "hello you\ntool\n/home/user\n"
        assert (await box.exec("cat /etc/passwd")).stdout.endswith("/home/user:/bin/sh\n")
        assert sorted(p.name.partition("-")[0] for p in cache_home.iterdir()) == ["archive", "etc"]
        assert prune(0) == []  # it is in use
        async with Host(Options(image=str(place))) as second, await second.create() as other:
            assert (await other.exec("greet")).stdout == "hello you\n"
        assert len(list(cache_home.iterdir())) == 2


async def test_links_of_an_image_lead_to_nothing_of_this_machine(small: Path, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    links = [(f"{name}", "link", str(secret)) for name in ("etc/hosts", "top", "var/there", "home/there", "opt")]
    made = tar_of(*_entries(small), *links, mode=0o755)
    place = saved(tmp_path / "made.tar", oci_files([made]))
    async with Host(Options(image=str(place))) as host, await host.create() as box:
        done = await box.exec("cat /etc/hosts /top /var/there /home/there /opt")
        assert (done.stdout, done.exit_code) == ("", 1)
        assert (await box.exec("ls /home /var")).stdout.split() == [
            "/home:",
            "there",
            "user",
            "/var:",
            "lib",
            "there",
            "tmp",
        ]


def _hostile_library(small: Path) -> Path:
    """At the place of this interpreter's own, modules that end whoever imports them."""
    library = small / os.path.dirname(os.path.realpath(os.__file__)).lstrip("/")
    library.mkdir(parents=True)
    for name in ("site", "shutil", "select", "traceback", "linecache", "threading", "stringprep"):
        (library / f"{name}.py").write_text("raise SystemExit('the image runs in the zygote')\n")
    return small


async def test_no_module_of_an_image_is_imported_by_what_makes_sandboxes(small: Path):
    _hostile_library(small)
    async with Host(Options(image=str(small))) as host, await host.create() as box:
        await box.write("d/y", "1")
        await box.remove("d")
        assert (await box.exec("echo fine")).stdout == "fine\n"


async def test_negative_control_as_a_root_of_ours_it_would_be(small: Path):
    _hostile_library(small)
    root = dataclasses.replace(await root_of(str(small)), has_own_python=False)
    with pytest.raises(SandboxStartError, match=r"the zygote of the sandboxes ended at its start|does not let"):
        await Local(root).open()


# --- packages


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that pip takes wheels from, alone: with one of a module and a script."""
    place = tmp_path / "wheels"
    place.mkdir()
    about = "tiny_four-1.0.dist-info"
    files = {
        "tiny_four.py": "VALUE = 4\ndef main(): print('four')\n",
        f"{about}/METADATA": "Metadata-Version: 2.1\nName: tiny-four\nVersion: 1.0\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/entry_points.txt": "[console_scripts]\nsay-four = tiny_four:main\n",
        f"{about}/RECORD": "",
    }
    with zipfile.ZipFile(place / "tiny_four-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(place), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return place


@pytest.mark.usefixtures("wheels")
async def test_wheels_are_there_for_waiting_interpreters_and_for_programs():
    async with Host(Options(image="pip:tiny-four", preload=("tiny_four",))) as host:
        code = "import sys, tiny_four\nprint(tiny_four.__file__, tiny_four.VALUE, 'palestra' in sys.modules)"
        first = "import sys\nprint('tiny_four' in sys.modules)"
        assert (await host.run_code(first)).stdout == "True\n"
        assert (await host.run_code(code)).stdout == "/opt/site-packages/tiny_four.py 4 False\n"
        async with await host.create() as box:
            assert (await box.exec(["python3", "-c", "import tiny_four; tiny_four.main()"])).stdout == "four\n"
            assert (await box.exec("say-four")).stdout == "four\n"
    async with Host() as host:  # negative control
        assert "ModuleNotFoundError" in (await host.run_code("import tiny_four")).stderr


@pytest.mark.usefixtures("wheels")
async def test_packages_of_debian_with_wheels_for_their_python():
    image = "debian:python3-minimal busybox-static+pip:tiny-four"
    if shutil.which("apt-get") is None:
        pytest.skip("apt-get is not here")
    try:
        await root_of(image)
    except UserError as error:
        pytest.skip(f"apt reaches no packages: {error}")
    async with Host(Options(image=image)) as host:
        end = await host.run_code("import sys, tiny_four\nprint(sys.prefix, sys.executable, tiny_four.VALUE)")
        assert end.stdout == "/usr /usr/bin/python3 4\n", end
        async with await host.create() as box:
            told = await box.exec(
                "busybox echo $(id -un) $(readlink /bin) && awk 'BEGIN {print 1+1}'; ls /usr/share/palestra"
            )
            assert told.stdout == "user usr/bin\n2\n"
            assert (await box.exec("say-four")).stdout == "four\n"


async def test_a_package_that_debian_does_not_have():
    if shutil.which("apt-get") is None:
        pytest.skip("apt-get is not here")
    with pytest.raises(UserError, match="palestra-no-such-package"):
        await root_of("debian:palestra-no-such-package")


def test_the_archive_is_named_by_its_bytes(tmp_path: Path):
    first, second = saved(tmp_path / "a.tar", {"x": b"1"}), saved(tmp_path / "b.tar", {"x": b"2"})
    copy = tmp_path / "c.tar"
    shutil.copy(first, copy)
    assert archives.fingerprint(first) == archives.fingerprint(copy) != archives.fingerprint(second)
