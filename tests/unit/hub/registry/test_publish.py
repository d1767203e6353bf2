"""Pushes: a version never changes, nothing is half there, and every refusal says why. On SQLite and PostgreSQL."""

import hashlib
import os
import threading

import pytest
from sqlalchemy import func, select

from palestra.hub.registry import publish
from palestra.hub.registry.blobs import received
from palestra.hub.registry.publish import Wish
from palestra.hub.registry.rights import who_has
from palestra.hub.registry.schema import audit, environments, files, versions
from tests.unit.hub.registry.packages import core, sdist, wheel

WORDS = "/alice/words"


def test_a_pushed_environment_is_there_with_all_that_it_says(served):
    made = wheel(requires=["palestra"], summary="Guess words", keywords="words,game", python=">=3.11")
    answer = served.push(made)
    assert answer.status_code == 200
    sha256 = hashlib.sha256(made[1]).hexdigest()
    assert answer.json() == {
        "owner": "alice",
        "environment": "words",
        "version": "1.0",
        "filename": made[0],
        "sha256": sha256,
        "is_new": True,
    }
    found = served.get(f"{WORDS}.json").json()
    assert found["row"]["summary"] == "Guess words"
    assert found["row"]["tags"] == ["words", "game"]
    assert found["row"]["visibility"] == "public"
    assert found["requires_python"] == ">=3.11"
    assert found["dependencies"] == [{"name": "palestra", "requirement": "palestra", "hub": ""}]
    (version,) = found["versions"]
    assert version["uploaded_by"] == "alice"
    assert [(one["filename"], one["size"], one["sha256"]) for one in version["files"]] == [
        (made[0], len(made[1]), sha256)
    ]


def test_the_same_again_changes_nothing(served):
    made = wheel()
    served.push(made)
    before = served.get(f"{WORDS}.json").json()
    again = served.push(made)
    assert (again.status_code, again.json()["is_new"]) == (200, False)
    assert served.get(f"{WORDS}.json").json() == before


def test_other_content_of_a_version_is_refused(served):
    first = wheel()
    served.push(first)
    refused = served.push(wheel(files={"more.py": b"x"}))
    assert refused.status_code == 409
    assert "a version never changes" in refused.json()["error"]
    (version,) = served.get(f"{WORDS}.json").json()["versions"]
    assert version["files"][0]["sha256"] == hashlib.sha256(first[1]).hexdigest()


def test_wheel_and_sdist_are_files_of_one_version(served):
    for made in (sdist(), wheel()):
        assert served.push(made).status_code == 200
    (version,) = served.get(f"{WORDS}.json").json()["versions"]
    assert [one["kind"] for one in version["files"]] == ["wheel", "sdist"]


def test_the_newest_is_the_highest_release_that_is_not_yanked(served):
    for version in ("1.0", "1.10", "1.9", "2.0rc1"):
        assert served.push(wheel(version=version)).status_code == 200
    assert served.versions(WORDS) == ["2.0rc1", "1.10", "1.9", "1.0"]
    assert served.get(f"{WORDS}.json").json()["version"] == "1.10"
    yanked = served.tell("/api/environments/alice/words/versions/1.10/yank", "alice", reason="broken")
    assert yanked.status_code == 200
    found = served.get(f"{WORDS}.json").json()
    assert found["version"] == "1.9"
    assert [(one["yanked"], one["yanked_reason"]) for one in found["versions"] if one["version"] == "1.10"] == [
        (True, "broken")
    ]
    assert served.tell("/api/environments/alice/words/versions/1.10/unyank", "alice").status_code == 200
    assert served.get(f"{WORDS}.json").json()["version"] == "1.10"


# --- refusals


def refusal(answer, status: int) -> str:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def nothing_is_there(served) -> bool:
    with served.hub.database.read() as connection:
        counts = [connection.execute(select(func.count()).select_from(one)).scalar() for one in (files, versions)]
    return counts == [0, 0] and not list(served.hub.settings.incoming.iterdir())


def test_without_a_token_nothing_is_pushed(served):
    answer = served.http.post("/alice/legacy/", data={":action": "file_upload"}, files={"content": wheel()})
    assert "needs a token" in refusal(answer, 401)
    assert answer.headers["www-authenticate"].startswith("Basic")
    headers = {"authorization": "Bearer palestra_wrong"}
    answer = served.http.post("/alice/legacy/", files={"content": wheel()}, headers=headers)
    assert "not known" in refusal(answer, 401)
    assert nothing_is_there(served)


def test_nobody_pushes_to_another(served):
    assert "bob may not push to alice" in refusal(served.push(wheel(), "bob", to="alice"), 403)
    assert "there is no owner" in refusal(served.push(wheel(), "bob", to="nobody"), 404)
    assert nothing_is_there(served)


@pytest.mark.parametrize(
    ("scope", "only", "status"),
    [("write", "", 200), ("admin", "alice", 200), ("read", "", 403), ("write", "bob", 403)],
)
def test_a_token_gives_what_it_says(served, scope, only, status):
    made = served.tell("/api/tokens", "alice", scope=scope, only=only)
    served.tokens["lesser"] = made.json()["token"]
    assert served.push(wheel(), "lesser", to="alice").status_code == status


def test_a_token_for_one_environment_is_for_that_one(served):
    served.push(wheel())
    served.tokens["lesser"] = served.tell("/api/tokens", "alice", only="alice/words").json()["token"]
    assert served.push(wheel(version="1.1"), "lesser", to="alice/words").status_code == 200
    assert served.push(wheel(version="1.2"), "lesser", to="alice").status_code == 200
    assert served.push(wheel("palestra-chess"), "lesser", to="alice").status_code == 403
    assert served.push(wheel("palestra-chess"), "lesser", to="alice/chess").status_code == 403


def test_a_file_above_the_bound_is_refused(served):
    big = wheel(files={"x": os.urandom(5 << 20)})
    assert "4194304 bytes, which is the most" in refusal(served.push(big), 413)
    assert nothing_is_there(served)
    assert served.push(wheel(files={"x": os.urandom(3 << 20)})).status_code == 200


def test_what_was_announced_otherwise_is_refused(served):
    made = wheel()
    assert "was announced" in refusal(served.push(made, sha256_digest="0" * 64), 400)
    assert "was announced" in refusal(served.push(made, name="palestra-chess"), 400)
    assert "was announced" in refusal(served.push(made, version="2.0"), 400)
    assert nothing_is_there(served)
    digest = hashlib.sha256(made[1]).hexdigest()
    assert served.push(made, sha256_digest=digest, name="Palestra_Words", version="1.0").status_code == 200


def test_a_forged_name_is_refused(served):
    assert "its metadata" in refusal(served.push(wheel(metadata=core("numpy", "1.0"))), 400)
    assert "takes distributions called" in refusal(served.push(wheel("numpy"), to="alice/words"), 400)
    assert nothing_is_there(served)
    served.push(wheel())
    assert "has distributions called palestra-words" in refusal(served.push(wheel("words")), 400)


def test_a_name_of_a_page_is_refused(served):
    assert "address of a page" in refusal(served.push(wheel("palestra-simple")), 400)


def test_a_name_that_is_near_to_anothers_is_refused(served):
    assert served.push(wheel("palestra-wordle")).status_code == 200
    text = refusal(served.push(wheel("palestra-worlde"), "bob"), 400)
    assert "easily taken for 'wordle'" in text
    assert served.push(wheel("palestra-wordle"), "bob").status_code == 200  # the same name, under his own
    assert served.push(wheel("palestra-wordles"), "alice").status_code == 200  # one's own names may be near
    assert served.push(wheel("palestra-logic"), "bob").status_code == 200


def test_the_name_of_a_private_environment_is_not_told(served):
    served.push(wheel("palestra-wordle"), palestra_visibility="private")
    text = refusal(served.push(wheel("palestra-worlde"), "bob"), 400)
    assert "wordle'" not in text
    assert "another one of this hub" in text


def test_an_administrator_lets_near_names_be(served):
    served.push(wheel("palestra-wordle"))
    body = {"name": "worlde", "near": True}
    assert served.tell("/api/environments/bob", "bob", **body).status_code == 403
    assert served.tell("/api/environments/bob", "root", **body).status_code == 200
    assert served.push(wheel("palestra-worlde"), "bob").status_code == 200


@pytest.mark.parametrize(
    "request_",
    [
        {"data": {":action": "remove"}, "files": {"content": ("a", b"")}},
        {"data": {":action": "file_upload"}, "files": {"other": ("a", b"")}},
        {"json": {}},
        {"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        {"content": b"nonsense", "headers": {"content-type": "multipart/form-data; boundary=x"}},
    ],
)
def test_what_is_no_upload_is_refused(served, request_):
    headers = served.as_("alice") | request_.pop("headers", {})
    answer = served.http.post("/alice/legacy/", headers=headers, **request_)
    assert answer.status_code == 400
    assert nothing_is_there(served)


# --- all or nothing


def test_nothing_is_seen_of_a_push_that_fails_in_the_middle(served, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("killed here")

    with monkeypatch.context() as patched:
        patched.setattr(publish, "refresh", fails)
        with pytest.raises(RuntimeError):
            served.push(wheel())
    assert served.get(f"{WORDS}.json").status_code == 404
    assert len(list(served.hub.blobs.names())) == 2  # content and metadata, which nobody names
    assert served.hub.sweep(blobs_older_than_s=-1) == 2
    assert served.push(wheel()).status_code == 200
    assert served.hub.sweep(blobs_older_than_s=-1) == 0
    assert served.versions(WORDS) == ["1.0"]


def test_a_token_that_is_revoked_during_an_upload_pushes_nothing(served, monkeypatch):
    made = served.tell("/api/tokens", "alice").json()
    served.tokens["brief"] = made["token"]
    looked_through = publish.artefact.read

    def revoked_meanwhile(*given):
        served.tell(f"/api/tokens/{made['id']}/revoke", "alice")
        return looked_through(*given)

    monkeypatch.setattr(publish.artefact, "read", revoked_meanwhile)
    assert "revoked" in refusal(served.push(wheel(), "brief", to="alice"), 401)
    assert served.get(f"{WORDS}.json").status_code == 404


def test_pushes_at_once_of_one_version_leave_one(served):
    """Two contents under one name: one wins, the other is refused, and what is served is whole."""
    made = [wheel(files={"x.py": f"{number}".encode()}) for number in range(6)]
    answers: list[str] = []
    with served.hub.database.read() as connection:
        who = who_has(connection, served.tokens["alice"])

    def push(one: tuple[str, bytes]) -> None:
        with received([one[1]], served.hub.settings.incoming, 1 << 20) as arrived:
            try:
                publish.push(served.hub, who, Wish("alice", "", one[0]), arrived)
                answers.append("taken")
            except publish.TakenError:
                answers.append("refused")

    threads = [threading.Thread(target=push, args=(one,)) for one in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(answers) == ["refused"] * 5 + ["taken"]
    (version,) = served.get(f"{WORDS}.json").json()["versions"]
    (file,) = version["files"]
    assert hashlib.sha256(served.get(file["url"]).content).hexdigest() == file["sha256"]


def test_every_push_is_in_the_audit_log(served):
    served.push(wheel())
    served.push(wheel(files={"x": b""}))  # refused
    with served.hub.database.read() as connection:
        rows = connection.execute(select(audit).where(audit.c.action.startswith("version"))).all()
    assert [(row.actor, row.action, row.subject) for row in rows] == [("alice", "version.push", "alice/words==1.0")]
    assert rows[0].address == "testclient"


def test_a_deleted_environment_is_gone_with_its_versions(served):
    served.push(wheel())
    assert served.tell("/api/environments/alice/words/delete", "bob").status_code == 403
    assert served.tell("/api/environments/alice/words/delete", "alice").status_code == 200
    assert served.get(f"{WORDS}.json").status_code == 404
    with served.hub.database.read() as connection:
        assert connection.execute(select(func.count()).select_from(environments)).scalar() == 0
        assert connection.execute(select(func.count()).select_from(files)).scalar() == 0
    assert served.hub.sweep(blobs_older_than_s=-1) == 2
