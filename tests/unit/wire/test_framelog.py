"""A log that survives a kill at any byte."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from palestra.wire.framelog import FrameLog, read_frames

FRAMES = [b"one", b"", b"three" * 100, b"\0" * 8]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal" / "000.log"


def write(path: Path, frames: list[bytes]) -> None:
    log = FrameLog(path)
    for frame in frames:
        log.append(frame)
    log.close()


def test_frames_are_read_in_order(path: Path):
    assert list(read_frames(path)) == []
    write(path, FRAMES[:2])
    write(path, FRAMES[2:])
    assert list(read_frames(path)) == FRAMES


def test_a_frame_is_readable_as_soon_as_it_is_appended(path: Path):
    log = FrameLog(path)
    log.append(b"one")
    assert list(read_frames(path)) == [b"one"]
    log.close()


def test_torn_at_any_byte_only_the_last_frame_is_lost(path: Path):
    write(path, FRAMES)
    data = path.read_bytes()
    ends = [sum(8 + len(frame) for frame in FRAMES[:count]) for count in range(len(FRAMES) + 1)]
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        whole = sum(end <= size for end in ends) - 1
        assert list(read_frames(path)) == FRAMES[:whole]
        write(path, [b"next"])
        assert list(read_frames(path)) == [*FRAMES[:whole], b"next"]


@pytest.mark.parametrize("place", [0, 4, 8, 10])
def test_a_changed_byte_ends_the_log_there(path: Path, place: int):
    write(path, [b"one", b"two"])
    data = bytearray(path.read_bytes())
    data[11 + place] ^= 1  # in the second frame's length, checksum and payload
    path.write_bytes(data)
    assert list(read_frames(path)) == [b"one"]


def test_zeros_at_the_end_are_no_frames(path: Path):
    """What a file system may leave behind after a power cut."""
    write(path, [b"one"])
    with path.open("ab") as file:
        file.write(bytes(4096))
    assert list(read_frames(path)) == [b"one"]


def test_frames_survive_a_kill(path: Path):
    script = (
        "import os, sys; from pathlib import Path; from palestra.wire.framelog import FrameLog\n"
        "log = FrameLog(Path(sys.argv[1]))\n"
        "for i in range(100): log.append(str(i).encode())\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(path)])
    assert list(read_frames(path)) == [str(i).encode() for i in range(100)]


def test_on_a_full_disk_nothing_is_half_written(path: Path):
    """A frame that does not fit is an error; the frames before it and those after more room was made are whole."""
    script = (
        "import resource, signal, sys; from pathlib import Path; from palestra.wire.framelog import FrameLog\n"
        "from palestra.core.errors import InfrastructureError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "log = FrameLog(Path(sys.argv[1])); log.append(b'one')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50, resource.RLIM_INFINITY))\n"
        "try: log.append(b'x' * 100)\n"
        "except InfrastructureError as error: print(error)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "log.append(b'three')"
    )
    said = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert "(108 bytes): No space left on device; free space and resume" in said.stdout
    assert list(read_frames(path)) == [b"one", b"three"]
    assert os.path.getsize(path) == 8 + 3 + 8 + 5
