"""Where an attempt begins, and at which addresses."""

import errno
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from palestra.config import RunConfig, read_resolved
from palestra.core.errors import InfrastructureError, UserError
from palestra.core.ledger import Ledger
from palestra.launch import run as launch_run
from palestra.launch import start
from palestra.launch.ports import free_ports, listener_of, require_free
from palestra.launch.start import Origin, begin, new_attempt, newest_checkpoint, write_config
from palestra.wire.rundir import Attempt, Manifest, RunDir, checkpoint_dir, write_manifest
from palestra.wire.status import State, locked, now_running, read_status, write_status


class Kept:
    """Stands in for the guard: remembers what it is asked to remove."""

    def __init__(self):
        self.directories: list[Path] = []

    def remove(self, directory: Path) -> None:
        self.directories.append(directory)


def config(outputs: Path, **sections: dict[str, Any]) -> RunConfig:
    tree = {"log": {"name": "demo", "outputs": outputs}, "model": {"path": "x"}, "env": {"mix": [{"id": "e"}]}}
    return RunConfig.model_validate({**tree, **sections})


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of one attempt that has no checkpoint yet."""
    run = RunDir(tmp_path / "demo")
    write_config(run, config(tmp_path))
    run.write_attempt(attempt(1))
    return run


def attempt(number: int) -> Attempt:
    addresses = {"supervisor": "ipc://s", "orchestrator": "ipc://o", "engines": (), "staging": "x"}
    return Attempt(number=number, resumed_from=None, started_at=0.0, **addresses)


def save(run: RunDir, version: int) -> None:
    checkpoint_dir(run, version).mkdir(parents=True)
    write_manifest(run, Manifest(version=version, attempt=1, trainer="trainer", orchestrator="orchestrator"))


def test_a_new_run_begins_at_the_beginning(tmp_path: Path):
    assert begin(config(tmp_path), resume=False) == Origin(1, None)


def test_a_stored_config_reads_back_equal(tmp_path: Path, run: RunDir):
    assert read_resolved(run.config) == config(tmp_path)


def test_an_existing_run_needs_a_choice(tmp_path: Path, run: RunDir):
    with pytest.raises(UserError, match=r"--resume, or give another name by log\.name"):
        begin(config(tmp_path), resume=False)


def test_without_a_checkpoint_a_run_resumes_from_the_start(tmp_path: Path, run: RunDir):
    assert begin(config(tmp_path), resume=True) == Origin(2, None)


def test_the_newest_whole_checkpoint_is_chosen(tmp_path: Path, run: RunDir):
    for version in (100, 50, 1000):
        save(run, version)
    (checkpoint_dir(run, 2000) / "trainer").mkdir(parents=True)
    (checkpoint_dir(run, 1000) / "manifest.json").unlink()
    newest = newest_checkpoint(run)
    assert newest is not None
    assert newest.version == 100
    assert begin(config(tmp_path), resume=True) == Origin(2, 100)


def test_a_torn_manifest_is_named(tmp_path: Path, run: RunDir):
    save(run, 5)
    (checkpoint_dir(run, 5) / "manifest.json").write_text('{"version": 5, "atte')
    with pytest.raises(InfrastructureError, match=r"000005/manifest\.json cannot be read"):
        begin(config(tmp_path), resume=True)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"train": {"steps": 99}}, "train.steps: 100 in the run, 99 now"),
        ({"algo": {"loss": "gspo"}}, 'algo.loss: "mis" in the run, "gspo" now'),
        ({"env": {"mix": [{"id": "other"}]}}, "env.mix.0.id"),
        ({"env": {"mix": [{"id": "e"}, {"id": "f"}]}}, "env.mix.1.id: nothing in the run"),
        ({"model": {"path": "y"}}, "model.path"),
        ({"model": {"path": "x", "lora": {"rank": 4}}}, "model.lora.rank: nothing in the run, 4 now"),
        ({"engine": {"max_in_flight": 8}}, "engine.max_in_flight: 256 in the run, 8 now"),
    ],
)
def test_another_config_is_refused_and_the_keys_named(tmp_path: Path, run: RunDir, sections: dict, key: str):
    with pytest.raises(UserError, match="started with another config") as refusal:
        begin(config(tmp_path, **sections), resume=True)
    assert key in str(refusal.value)


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"steps": 200}},
        {"launch": {"engine_port": 9000, "stop_s": 1}},
        {"engine": {"healthy_s": 5, "kv_cache_gib": 2}},
    ],
)
def test_what_changes_no_training_may_change(tmp_path: Path, run: RunDir, sections: dict):
    assert begin(config(tmp_path, **sections), resume=True) == Origin(2, None)


def seated(**changed: Any) -> dict[str, Any]:
    user = {"url": "http://one/v1", "model": "m", "key_env": "ONE_KEY", "call_s": 5, "max_in_flight": 1} | changed
    return {"env": {"mix": [{"id": "e", "seats": {"user": user}}]}}


def test_where_a_seat_is_asked_may_change_and_who_speaks_for_it_may_not(tmp_path: Path, run: RunDir):
    write_config(run, config(tmp_path, **seated()))
    moved = {"url": "https://two/v1", "key_env": None, "call_s": 60, "max_in_flight": 8}
    assert begin(config(tmp_path, **seated(**moved)), resume=True) == Origin(2, None)
    for sections, key in (
        (seated(model="other"), 'env.mix.0.seats.user.model: "m" in the run, "other" now'),
        (seated(temperature=0.5), "env.mix.0.seats.user.temperature: 1.0 in the run, 0.5 now"),
        ({}, 'env.mix.0.seats.user.model: "m" in the run, nothing now'),
    ):
        with pytest.raises(UserError, match="started with another config") as refusal:
            begin(config(tmp_path, **sections), resume=True)
        assert key in str(refusal.value)
        assert "url" not in str(refusal.value)


def test_a_finished_run_names_train_steps(tmp_path: Path, run: RunDir):
    save(run, 100)
    run.summary.write_text("{}")
    with pytest.raises(UserError, match=r"finished: 100 of train\.steps=100"):
        begin(config(tmp_path), resume=True)
    assert begin(config(tmp_path, train={"steps": 101}), resume=True) == Origin(2, 100)


@pytest.fixture
def kept() -> Iterator[Kept]:
    kept = Kept()
    yield kept
    for directory in kept.directories:
        directory.rmdir()


def test_an_attempt_has_private_sockets_and_distinct_ports(tmp_path: Path, kept: Kept):
    begun = new(tmp_path, kept, engines=3)
    sockets = Path(begun.supervisor.removeprefix("ipc://")).parent
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    assert len(begun.orchestrator) < 107
    assert len(set(begun.engines)) == 3
    assert set(kept.directories) == {sockets, Path(begun.staging)}


def test_weights_are_staged_on_disk_where_shared_memory_is_too_small(tmp_path: Path, kept: Kept):
    begun = new(tmp_path, kept, staging_bytes=10**15)
    assert Path(begun.staging).parent == tmp_path / "demo"


def test_staging_that_cannot_be_written_is_the_users_to_fix(tmp_path: Path, kept: Kept):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"sync\.staging="):
        new(tmp_path, kept, sync={"staging": tmp_path / "file" / "x"})


def new(tmp_path: Path, kept: Kept, *, engines: int = 1, staging_bytes: int = 0, **sections: dict) -> Attempt:
    return new_attempt(
        config(tmp_path, **sections),
        RunDir(tmp_path / "demo"),
        Origin(1, None),
        kept,  # pyright: ignore[reportArgumentType]
        engines=engines,
        staging_bytes=staging_bytes,
        started_at=0.0,
    )


def test_a_long_directory_for_temporary_files_still_gives_short_addresses(
    tmp_path: Path, kept: Kept, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(start.tempfile, "gettempdir", lambda: f"/tmp/{'x' * 90}")
    assert len(new(tmp_path, kept).orchestrator) < 107


def test_a_port_in_use_is_refused_and_its_holder_named():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of launch.engine_port .* in use by process"):
            require_free("127.0.0.1", port, field="launch.engine_port")
        assert "pytest" in listener_of(port) or "python" in listener_of(port)
    require_free("127.0.0.1", port, field="launch.engine_port")
    assert listener_of(port) == ""


def test_free_ports_are_distinct():
    assert len(set(free_ports("127.0.0.1", 20))) == 20


def test_ports_beyond_the_last_are_refused(tmp_path: Path, kept: Kept):
    with pytest.raises(UserError, match="give 65534 at most"):
        new(tmp_path, kept, engines=2, launch={"engine_port": 65535})


def test_a_run_is_running_while_its_lock_is_held(run: RunDir):
    assert read_status(run) is None
    with locked(run):
        write_status(run, now_running(3, started_at=1.0))
        status = read_status(run)
        assert status is not None
        assert (status.state, status.attempt) == (State.RUNNING, 3)
        with pytest.raises(UserError, match=f"running already \\(process {status.pid}\\)"), locked(run):
            pass
    status = read_status(run)
    assert status is not None
    assert status.state is State.KILLED


def test_an_end_that_cannot_be_recorded_does_not_hide_why_it_came(run: RunDir, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(launch_run, "RunLog", full)
    launch_run._write_end(run, now_running(1, 0.0), State.FAILED, "free space and resume", Ledger("supervisor"))
    status = read_status(run)
    assert status is not None
    assert (status.state, status.error) == (State.FAILED, "free space and resume")
    assert "could not be recorded: [Errno 28] No space left" in capsys.readouterr().err
