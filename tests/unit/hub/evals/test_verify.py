"""Scored again: the same, or not; and whoever changes one number by hand is found out. In a real sandbox."""

import zipfile
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import insert

from palestra.config.schema import EvalSet
from palestra.core.records import Ending, RolloutRecord, Seat
from palestra.env.again import Asked, verdict_of
from palestra.env.load import make_environment
from palestra.env.play import score
from palestra.env.tasklist import TaskList
from palestra.env.worker import source_seed
from palestra.hub.evals import board, queries, verify, views
from palestra.hub.evals.archive import pack
from palestra.hub.registry.blobs import received
from palestra.hub.registry.database import sqlite_url
from palestra.hub.registry.hub import Hub, Settings
from palestra.hub.registry.rights import ANYBODY, Role, Who
from palestra.hub.registry.schema import environments, files, owners, versions
from palestra.launch.cli import main
from tests.unit.hub.evals.made import told

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[4]
ASKED = Asked(environment="reverse-text", split="test", args={}, num_tasks=3, rollouts_per_task=2)


async def played() -> list[RolloutRecord]:
    """As `palestra eval` would write them: the first of each pair is right."""
    source = EvalSet(id="reverse-text", split="test")

    def make(epoch: int):
        return make_environment("reverse-text", split="test", seed=source_seed(source, 0, epoch), args={})

    tasks, _ = TaskList(make).take(0, 0, 3)
    found = []
    for number in range(6):
        task = tasks[number // 2]
        reply = task.answer if number % 2 == 0 else "no"
        made = await score(make(0), task, [reply])
        named = {"rollout_id": number, "environment": "reverse-text", "num_tokens": 3, "num_prompt_tokens": 9}
        found.append(msgspec.structs.replace(made, **named))
    return [msgspec.json.decode(msgspec.json.encode(one), type=RolloutRecord) for one in found]


@pytest.fixture
def records() -> list[RolloutRecord]:
    import asyncio

    return asyncio.run(played())


def changed(records: list[RolloutRecord], number: int, **changes) -> list[RolloutRecord]:
    return [msgspec.structs.replace(one, **changes) if one.rollout_id == number else one for one in records]


def test_what_is_true_is_the_same(records):
    verdict = verdict_of(ASKED, records)
    assert (verdict.is_same, verdict.num_rollouts, verdict.num_same) == (True, 6, 6)
    assert [one.reward for one in records] == [1.0, 0.0] * 3


def test_one_reward_that_was_changed_by_hand_is_found(records):
    verdict = verdict_of(ASKED, changed(records, 3, reward=1.0))
    assert not verdict.is_same
    ((other),) = verdict.others
    assert (other.rollout_id, other.before, other.now) == (3, 1.0, 0.0)


def test_an_answer_that_was_changed_to_fit_the_reply_is_found(records):
    """Scored with the answer in the rollout, it would be right."""
    task = msgspec.structs.replace(records[3].task, answer="no", gold="no")
    forged = changed(records, 3, reward=1.0, task=task)
    assert not verdict_of(ASKED, forged).is_same
    assert "Task 1 is another one than the environment's" in verdict_of(ASKED, forged).problem


def test_what_was_invalid_stays_so_and_no_reward_is_made_of_it(records):
    broken = changed(records, 3, ending=Ending.INVALID, reward=0.0, rewards={}, error="the engine died")
    assert verdict_of(ASKED, broken).is_same


def test_rewards_that_were_given_while_it_was_played_cannot_be_told(records):
    verdict = verdict_of(ASKED, changed(records, 3, seats=(Seat(rewards={"bonus": 1.0}),)))
    assert not verdict.is_same
    assert "given while rollouts were played" in verdict.problem


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_tasks": 2, "args": {"alphabet": "abc", "max_letters": 3}}, "is another one"),
        ({"environment": "nothing-like-it"}, "no environment 'nothing-like-it' is installed"),
        ({"args": {"alphabet": 5}}, "could not be listed"),
        ({"split": "train"}, "is another one"),
    ],
)
def test_what_cannot_be_played_as_told_is_a_problem(records, changes, said):
    assert said in verdict_of(msgspec.structs.replace(ASKED, **changes), records).problem


# --- in a sandbox, from the hub's own files


def wheel(to: Path) -> Path:
    """As a build makes it of the environment's sources."""
    name = "palestra_reverse_text-0.1.0"
    sources = ROOT / "environments" / "reverse_text" / "src"
    with zipfile.ZipFile(to, "w") as file:
        for source in sources.rglob("*.py"):
            file.write(source, source.relative_to(sources).as_posix())
        points = "[palestra.environments]\nreverse-text = palestra_reverse_text:ReverseText\n"
        file.writestr(f"{name}.dist-info/entry_points.txt", points)
        file.writestr(
            f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: palestra-reverse-text\nVersion: 0.1.0\n"
        )
    return to


@pytest.fixture
def hub(tmp_path: Path):
    hub = Hub.open(Settings(data=tmp_path / "data"), str(sqlite_url(tmp_path / "hub.db")))
    with received([wheel(tmp_path / "a.whl").read_bytes()], hub.settings.incoming, 1 << 30) as one:
        hub.blobs.put(one.file, one.sha256)
    with hub.database.write() as connection:
        alice = connection.execute(
            insert(owners).values(name="alice", kind="person", created=1.0).returning(owners.c.id)
        ).scalar_one()
        values = {"owner_id": alice, "name": "reverse-text", "visibility": "public", "created": 1.0, "updated": 1.0}
        id = connection.execute(insert(environments).values(**values).returning(environments.c.id)).scalar_one()
        version = {"environment_id": id, "version": "0.1.0", "created": 1.0}
        version_id = connection.execute(insert(versions).values(**version).returning(versions.c.id)).scalar_one()
        file = {"filename": "a.whl", "kind": "wheel", "size": 1, "sha256": one.sha256, "metadata_sha256": one.sha256}
        connection.execute(insert(files).values(environment_id=id, version_id=version_id, created=1.0, **file))
    yield hub
    hub.close()


def push(hub: Hub, records: list[RolloutRecord], place: Path, **changes) -> str:
    pack(told(**changes), records, place)
    with received([place.read_bytes()], hub.settings.incoming, 1 << 30) as one:
        return board.push(hub, Who(id=1, name="alice", scope=Role.WRITE), "alice", "reverse-text", one).id


@pytest.mark.slow
async def test_a_row_is_verified_by_a_sandbox_and_a_forged_one_is_not(hub: Hub, tmp_path: Path):
    records, said = await played(), []
    true = push(hub, records, tmp_path / "true.zip")
    forged = push(hub, changed(records, 3, reward=1.0), tmp_path / "forged.zip")
    elsewhere = push(hub, records, tmp_path / "elsewhere.zip", environment_version="9.9.9")
    assert await verify.verify_waiting(hub, backend=None, say=said.append) == 3
    rows = {row.id: row for row in board.listed(hub, ANYBODY, "alice", "reverse-text", queries.Board()).rows}
    assert (rows[true].status, rows[true].verified, rows[true].note) == ("verified", True, ""), said
    assert (rows[forged].status, rows[forged].verified) == ("differs", False), said
    assert "1 of 6 rollouts have another reward: rollout 3 had 1 and has 0." in rows[forged].note
    assert (rows[elsewhere].status, rows[elsewhere].verified) == ("unverifiable", False)
    assert "no wheel of version 9.9.9" in rows[elsewhere].note
    only = board.listed(hub, ANYBODY, "alice", "reverse-text", queries.Board(verified="yes")).rows
    assert [row.id for row in only] == [true]
    assert any(
        "another reward" in note for note in views.evaluation(hub, ANYBODY, "alice", "reverse-text", forged).notes
    )
    assert verify.waiting(hub) == []


def test_the_command_looks_where_the_hub_keeps_its_contents(tmp_path, capsys):
    command = ["hub", "verify", "--data", str(tmp_path)]
    assert main(command) == 0
    assert "0 evaluations were waiting" in capsys.readouterr().err
    assert main([*command, "--storage", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
