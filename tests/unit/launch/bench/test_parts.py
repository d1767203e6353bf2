"""What a bench makes room for: its own runs that ended, and nothing else."""

from pathlib import Path

import pytest

from palestra.core.errors import UserError
from palestra.launch.bench.parts import clear
from palestra.wire.rundir import RunDir
from palestra.wire.status import locked, now_running, write_status


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "overhead")


def test_what_is_not_there_or_was_broken_off_makes_room(run: RunDir):
    clear(run)
    run.path.mkdir()
    clear(run)
    with locked(run):
        write_status(run, now_running(1, 0.0))
    run.config.write_text("{}")
    clear(run)  # it was killed
    assert not run.path.exists()
    with locked(run):
        pass  # interrupted before anything was written
    clear(run)
    assert not run.path.exists()


def test_a_run_that_goes_on_is_left_alone(run: RunDir):
    with locked(run):
        write_status(run, now_running(1, 0.0))
        with pytest.raises(UserError, match=r"overhead is running; wait for its end, or .* --outputs"):
            clear(run)
        assert run.path.exists()


def test_a_directory_that_is_no_run_is_left_alone(run: RunDir):
    run.path.mkdir()
    (run.path / "thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match=r"overhead is no run, and is left alone"):
        clear(run)
    assert (run.path / "thesis.tex").read_text() == "all of it"
