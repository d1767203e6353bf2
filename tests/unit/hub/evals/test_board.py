"""Pushed, listed, compared, taken away: with SQLite and PostgreSQL, and by those who may."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import insert, update

from palestra.core.errors import UserError
from palestra.hub import queries as of_runs
from palestra.hub.evals import board, queries, views
from palestra.hub.evals.opened import Cache
from palestra.hub.registry import rights
from palestra.hub.registry.blobs import received
from palestra.hub.registry.hub import Hub, Settings
from palestra.hub.registry.rights import ANYBODY, NotAllowedError, NotFoundError, Role, UnknownTokenError, Who
from palestra.hub.registry.schema import environments, evaluations, members, owners, tokens, versions
from tests.unit.hub.evals.made import archive, spoiled

ALL = queries.Board()


@pytest.fixture
def hub(tmp_path: Path, database_url: str):
    hub = Hub.open(Settings(data=tmp_path / "data"), database_url)
    people = ("alice", "bob", "carol")
    with hub.database.write() as connection:
        ids = {
            name: connection.execute(
                insert(owners).values(name=name, kind="person", created=1.0).returning(owners.c.id)
            ).scalar_one()
            for name in people
        }
        for name, visibility in (("reverse-text", "public"), ("secret", "private")):
            values = {"owner_id": ids["alice"], "name": name, "visibility": visibility, "created": 1.0, "updated": 1.0}
            made = insert(environments).values(**values, project=f"palestra-{name}").returning(environments.c.id)
            id = connection.execute(made).scalar_one()
            connection.execute(insert(versions).values(environment_id=id, version="0.1.0", created=1.0))
    yield hub
    hub.close()


def who(hub: Hub, name: str, scope: Role = Role.WRITE) -> Who:
    with hub.database.read() as connection:
        id = connection.execute(owners.select().where(owners.c.name == name)).one().id
    return Who(id=id, name=name, scope=scope)


def push(hub: Hub, person: Who, file: Path, name: str = "reverse-text"):
    with received([file.read_bytes()], hub.settings.incoming, 1 << 30) as one:
        return board.push(hub, person, "alice", name, one)


def test_what_is_pushed_is_listed_with_its_numbers(hub: Hub, tmp_path: Path):
    pushed = push(hub, who(hub, "bob"), archive(tmp_path / "a.zip"))
    listed = board.listed(hub, ANYBODY, "alice", "reverse-text", ALL)
    (row,) = listed.rows
    assert (row.id, row.pushed_by, row.model, row.version) == (pushed.id, "bob", "backwards", "0.1.0")
    assert (row.is_known_version, row.verified, row.status) == (True, False, "new")
    assert row.standing == pushed.standing
    assert row.standing.reward.value == pytest.approx(0.5)
    assert (listed.versions, listed.models, listed.num_matching, listed.is_last) == (["0.1.0"], ["backwards"], 1, True)


def test_the_same_content_is_one_evaluation_however_often_and_by_how_many_it_is_pushed(hub: Hub, tmp_path: Path):
    file, found = archive(tmp_path / "a.zip"), []
    person = who(hub, "bob")
    threads = [threading.Thread(target=lambda: found.append(push(hub, person, file))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len({one.id for one in found}) == 1
    assert sorted(one.is_new for one in found) == [False] * 5 + [True]
    assert board.listed(hub, ANYBODY, "alice", "reverse-text", ALL).num_matching == 1
    assert not push(hub, who(hub, "carol"), file).is_new
    assert push(hub, person, archive(tmp_path / "b.zip", seed=1)).is_new


def test_a_row_is_there_once_its_rollouts_are_and_nothing_is_left_of_what_is_refused(hub: Hub, tmp_path: Path):
    bad = spoiled(tmp_path / "bad.zip", lines=lambda rows: rows[1:])
    with pytest.raises(UserError, match="has 5 rollouts"):
        push(hub, who(hub, "bob"), bad)
    with pytest.raises(UserError, match="is an evaluation of 'reverse-text', and alice/secret is another one"):
        push(hub, who(hub, "alice"), archive(tmp_path / "a.zip"), "secret")
    assert board.listed(hub, ANYBODY, "alice", "reverse-text", ALL).rows == []
    assert list(hub.blobs.names()) == []
    assert list(hub.settings.incoming.iterdir()) == []
    push(hub, who(hub, "bob"), tmp_path / "a.zip")
    with hub.database.read() as connection:
        (blob,) = connection.execute(evaluations.select()).all()
    assert hub.blobs.exists(blob.blob_sha256)
    assert hub.sweep(blobs_older_than_s=-1.0) == 0


@pytest.mark.parametrize(
    ("person", "changes"),
    [
        (None, {}),
        ("bob", {"scope": Role.READ}),
        ("bob", {"only_owner_id": 10**6}),
        ("bob", {"only_environment_id": 10**6}),
    ],
)
def test_who_may_not_write_pushes_nothing(hub: Hub, tmp_path: Path, person, changes):
    asking = replace(who(hub, person) if person else ANYBODY, **changes)
    with pytest.raises(NotAllowedError):
        push(hub, asking, archive(tmp_path / "a.zip"))


def test_of_a_private_environment_nobody_hears_who_may_not(hub: Hub, tmp_path: Path):
    """Bob gets the same answer as of an environment that is not there."""
    file = archive(tmp_path / "a.zip", environment="secret")
    with pytest.raises(UserError, match="is of 'reverse-text', and the evaluation of 'secret'"):
        push(hub, who(hub, "alice"), file, "secret")
    pushed = push(hub, who(hub, "alice"), archive(tmp_path / "b.zip"))
    with hub.database.write() as connection:
        connection.execute(
            update(environments).where(environments.c.name == "reverse-text").values(visibility="private")
        )
    bob, name = who(hub, "bob"), "reverse-text"
    line, compared = of_runs.Rollout(), queries.Comparison(one=pushed.id, other=pushed.id)
    for ask in (
        lambda who: board.listed(hub, who, "alice", name, ALL),
        lambda who: views.evaluation(hub, who, "alice", name, pushed.id),
        lambda who: views.rollouts(hub, who, "alice", name, pushed.id, queries.Rollouts()),
        lambda who: views.rollout(hub, who, "alice", name, pushed.id, "results", "0", line),
        lambda who: views.comparison(hub, who, "alice", name, compared),
        lambda who: push(hub, who, tmp_path / "b.zip"),
        lambda who: board.remove(hub, who, "alice", name, pushed.id),
    ):
        for person in (bob, ANYBODY):
            with pytest.raises(NotFoundError, match="there is no environment alice/reverse-text"):
                ask(person)
        ask(who(hub, "alice"))


def test_it_is_deleted_by_who_pushed_it_or_the_environments_administrator(hub: Hub, tmp_path: Path):
    file = archive(tmp_path / "a.zip")
    pushed = push(hub, who(hub, "bob"), file)
    for person in (who(hub, "carol", Role.ADMIN), ANYBODY, who(hub, "bob", Role.READ), who(hub, "alice")):
        with pytest.raises(NotAllowedError):
            board.remove(hub, person, "alice", "reverse-text", pushed.id)
    for person in (who(hub, "bob"), who(hub, "alice", Role.ADMIN)):
        again = push(hub, who(hub, "bob"), file)
        assert again.id == pushed.id
        board.remove(hub, person, "alice", "reverse-text", pushed.id)
        assert board.listed(hub, ANYBODY, "alice", "reverse-text", ALL).rows == []
    with pytest.raises(NotFoundError):
        board.remove(hub, who(hub, "bob"), "alice", "reverse-text", pushed.id)


def test_the_leaderboard_is_sorted_and_filtered(hub: Hub, tmp_path: Path):
    bob = who(hub, "bob")
    for number, (rewards, model, version) in enumerate(
        (("110100", "a", "0.1.0"), ("111111", "b", "0.2.0"), ("000000", "b", "0.1.0"))
    ):
        push(hub, bob, archive(tmp_path / f"{number}.zip", rewards=rewards, model=model, environment_version=version))

    def values(**query) -> list[float]:
        rows = board.listed(hub, ANYBODY, "alice", "reverse-text", queries.Board(**query)).rows
        return [row.standing.reward.value for row in rows]

    assert values() == [1.0, 0.5, 0.0]
    assert values(sort="reward") == [0.0, 0.5, 1.0]
    assert values(sort="newest") == [0.0, 1.0, 0.5]
    assert values(version="0.1.0") == [0.5, 0.0]
    assert values(model="b", version="0.2.0") == [1.0]
    assert values(verified="yes") == []
    assert values(page=2) == []
    known = {row.version: row.is_known_version for row in board.listed(hub, bob, "alice", "reverse-text", ALL).rows}
    assert known == {"0.1.0": True, "0.2.0": False}


def test_pushed_again_it_finds_the_version_that_came_after_it(hub: Hub, tmp_path: Path):
    file = archive(tmp_path / "a.zip", environment_version="0.2.0")
    first = push(hub, who(hub, "bob"), file)
    with hub.database.write() as connection:
        connection.execute(update(evaluations).values(status="unverifiable"))
        connection.execute(insert(versions).values(environment_id=1, version="0.2.0", created=1.0))
    again = push(hub, who(hub, "bob"), file)
    (row,) = board.listed(hub, ANYBODY, "alice", "reverse-text", ALL).rows
    assert (again.id, again.is_new) == (first.id, False)
    assert (row.is_known_version, row.status) == (True, "new")
    with hub.database.write() as connection:
        connection.execute(update(evaluations).values(status="verified", verified=True))
    push(hub, who(hub, "bob"), file)
    (row,) = board.listed(hub, ANYBODY, "alice", "reverse-text", ALL).rows
    assert (row.verified, row.status) == (True, "verified")


def test_a_token_that_is_revoked_while_an_archive_comes_pushes_nothing(hub: Hub, tmp_path: Path):
    bob = who(hub, "bob")
    with hub.database.write() as connection:
        made = rights.make_token(connection, bob.id or 0)
        asking = rights.who_has(connection, made.token)
        connection.execute(update(tokens).values(revoked=1.0))
    with pytest.raises(UnknownTokenError):
        push(hub, asking, archive(tmp_path / "a.zip"))
    assert board.listed(hub, ANYBODY, "alice", "reverse-text", ALL).rows == []


def test_an_evaluation_tells_its_settings_and_how_to_play_it_again(hub: Hub, tmp_path: Path):
    pushed = push(hub, who(hub, "bob"), archive(tmp_path / "a.zip"))
    page = views.evaluation(hub, ANYBODY, "alice", "reverse-text", pushed.id, url="http://hub:8004")
    assert page.reproduce[0] == (
        "pip install --extra-index-url http://hub:8004/alice/reverse-text/simple/ palestra-reverse-text==0.1.0"
    )
    assert page.reproduce[1] == (
        "palestra eval reverse-text --base-url http://127.0.0.1:8000/v1 --model backwards -n 3 -r 2 --temperature 1 "
        "--max-tokens 64 --split test --seed 0"
    )
    assert page.told["seed"] == 0
    assert not page.may_delete
    assert views.evaluation(hub, who(hub, "bob"), "alice", "reverse-text", pushed.id).may_delete


def test_its_rollouts_are_read_as_those_of_a_run(hub: Hub, tmp_path: Path):
    pushed = push(hub, who(hub, "bob"), archive(tmp_path / "a.zip"))
    found = views.rollouts(hub, ANYBODY, "alice", "reverse-text", pushed.id, queries.Rollouts(min_reward=1))
    assert [(row.rollout_id, row.reward) for row in found.rollouts] == [(0, 1.0), (1, 1.0), (3, 1.0)]
    one = views.rollout(hub, ANYBODY, "alice", "reverse-text", pushed.id, "results", "3", of_runs.Rollout())
    assert one.messages[-1]["content"] == "1drow"
    assert [row.rollout_id for row in one.siblings] == [2, 3]
    other = Hub(hub.database, hub.blobs, hub.settings)  # of another process
    assert views.rollout(other, ANYBODY, "alice", "reverse-text", pushed.id, "results", "3", of_runs.Rollout()) == one


def test_the_cache_forgets_what_was_looked_at_longest_ago_and_makes_it_again(hub: Hub, tmp_path: Path):
    hub.unpacked = Cache(hub.blobs, tmp_path / "cache", most_bytes=1)
    ids = [push(hub, who(hub, "bob"), archive(tmp_path / f"{n}.zip", seed=n)).id for n in range(3)]
    for id in (*ids, *ids):
        found = views.rollouts(hub, ANYBODY, "alice", "reverse-text", id, queries.Rollouts())
        assert found.num_matching == 6
        assert len(list((tmp_path / "cache").iterdir())) == 1


def test_two_evaluations_are_compared_task_by_task(hub: Hub, tmp_path: Path):
    """Means of tasks: 1, 1/2, 0 and 1/2, 1, 0."""
    bob = who(hub, "bob")
    one = push(hub, bob, archive(tmp_path / "a.zip", rewards="110100"))
    other = push(hub, bob, archive(tmp_path / "b.zip", rewards="011100", model="sideways", temperature=0.5))
    query = queries.Comparison(one=one.id, other=other.id)
    found = views.comparison(hub, ANYBODY, "alice", "reverse-text", query)
    assert found.difference.value == pytest.approx(0.0)
    assert (found.won, found.lost, found.alike) == (1, 1, 1)
    assert {pair.key: (pair.one, pair.other) for pair in found.pairs} == {
        "task 0": (1.0, 0.5),
        "task 1": (0.5, 1.0),
        "task 2": (0.0, 0.0),
    }
    assert [(one.key, one.one, one.other) for one in found.settings] == [
        ("model", "backwards", "sideways"),
        ("temperature", 1.0, 0.5),
    ]
    lost = views.comparison(hub, ANYBODY, "alice", "reverse-text", query.model_copy(update={"which": "lost"}))
    assert [pair.key for pair in lost.pairs] == ["task 0"]
    with pytest.raises(NotFoundError):
        views.comparison(hub, ANYBODY, "alice", "reverse-text", queries.Comparison(one=one.id, other="0" * 32))


def test_members_of_an_organisation_see_what_is_theirs(hub: Hub, tmp_path: Path):
    with hub.database.write() as connection:
        made = insert(owners).values(name="lab", kind="organisation", created=1.0).returning(owners.c.id)
        lab = connection.execute(made).scalar_one()
        values = {"owner_id": lab, "name": "reverse-text", "visibility": "private", "created": 1.0, "updated": 1.0}
        connection.execute(insert(environments).values(**values))
        person = who(hub, "bob")
        connection.execute(insert(members).values(organisation_id=lab, person_id=person.id, role="read"))
    with received([archive(tmp_path / "a.zip").read_bytes()], hub.settings.incoming, 1 << 30) as one:
        board.push(hub, person, "lab", "reverse-text", one)
    assert board.listed(hub, person, "lab", "reverse-text", ALL).num_matching == 1
    with pytest.raises(NotFoundError):
        board.listed(hub, who(hub, "carol"), "lab", "reverse-text", ALL)
