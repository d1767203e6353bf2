"""The index and its files, as the standards have it; who may not see an environment learns nothing of it."""

import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from palestra.hub.registry import simple
from tests.unit.hub.registry.packages import core, sdist, wheel

INDEX = "/alice/words/simple/palestra-words/"
JSON = {"accept": simple.JSON}


class Links(HTMLParser):
    """Attributes and text of every link."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[dict[str, str | None], str]] = []
        self._open: dict[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "a":
            self._open = dict(attrs)

    def handle_data(self, data):
        if self._open is not None:
            self.found.append((self._open, data))
            self._open = None


def index(served, who: str = "") -> dict:
    answer = served.get(INDEX, who, headers=JSON)
    assert answer.headers["content-type"] == simple.JSON
    return answer.json()


def test_the_json_index_has_what_the_standards_name(served):
    one, other = wheel(python=">=3.11", requires=["palestra"]), sdist(version="1.1")
    served.push(one)
    served.push(other)
    found = index(served)
    assert found["meta"] == {"api-version": "1.1"}
    assert found["name"] == "palestra-words"
    assert found["versions"] == ["1.0", "1.1"]
    first, second = found["files"]
    assert first["filename"] == one[0]
    assert first["hashes"] == {"sha256": hashlib.sha256(one[1]).hexdigest()}
    assert (first["size"], second["size"]) == (len(one[1]), len(other[1]))
    assert first["requires-python"] == ">=3.11"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", first["upload-time"])
    assert first["yanked"] is False
    metadata = core("palestra-words", "1.0", python=">=3.11", requires=["palestra"]).encode()
    assert first["core-metadata"] == {"sha256": hashlib.sha256(metadata).hexdigest()}
    assert "dist-info-metadata" not in first
    assert "core-metadata" not in second
    assert served.get(first["url"]).content == one[1]
    assert served.get(first["url"] + ".metadata").content == metadata


def test_the_html_index_has_the_same(served):
    made = wheel(python=">=3.11,<4")
    served.push(made)
    served.tell("/api/environments/alice/words/versions/1.0/yank", "alice", reason='a "bad" <one>')
    answer = served.get(INDEX)
    assert answer.headers["content-type"].startswith("text/html")
    ((attributes, text),) = Links(answer.text).found
    (file,) = index(served)["files"]
    assert text == made[0]
    assert attributes == {
        "href": f"{file['url']}#sha256={file['hashes']['sha256']}",
        "data-requires-python": ">=3.11,<4",
        "data-yanked": 'a "bad" <one>',
        "data-core-metadata": f"sha256={file['core-metadata']['sha256']}",
    }
    assert file["yanked"] == 'a "bad" <one>'


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/html"),
        ("*/*", "text/html"),
        ("text/html", "text/html"),
        (f"{simple.JSON}, {simple.HTML};q=0.2, text/html;q=0.01", simple.JSON),  # what pip sends
        (f"{simple.JSON}, {simple.HTML};q=0.2, text/html", simple.JSON),
        (f"text/html, {simple.JSON};q=0.5", "text/html"),
        (f"{simple.HTML}, */*;q=0.1", simple.HTML),
        ("application/vnd.pypi.simple.latest+json", simple.JSON),
        ("image/png", None),
        (f"{simple.JSON};q=0", None),
    ],
)
def test_the_kind_of_an_answer_is_negotiated(accept, kind):
    assert simple.wanted(accept) == kind


def test_an_index_is_of_one_project(served):
    served.push(wheel())
    assert served.get("/alice/words/simple/", headers=JSON).json()["projects"] == [{"name": "palestra-words"}]
    for other in ("numpy", "palestra", "palestra-chess"):
        assert served.get(f"/alice/words/simple/{other}/").status_code == 404
    redirected = served.get("/alice/words/simple/Palestra_Words/")
    assert (redirected.status_code, redirected.headers["location"]) == (301, INDEX)
    assert served.get(INDEX.rstrip("/")).headers["location"] == INDEX


def test_an_index_is_not_sent_again_while_it_is_the_same(served):
    served.push(wheel())
    etag = served.get(INDEX).headers["etag"]
    assert served.get(INDEX, headers={"if-none-match": etag}).status_code == 304
    assert served.get(INDEX, headers={"if-none-match": etag} | JSON).status_code == 200
    served.push(wheel(version="1.1"))
    fresh = served.get(INDEX, headers={"if-none-match": etag})
    assert (fresh.status_code, "1.1" in fresh.text) == (200, True)


def test_an_index_of_one_that_was_deleted_is_not_taken_for_its_successors(served):
    """A database may give the number of a deleted one again, and revisions begin anew."""
    served.push(wheel())
    etag = served.get(INDEX).headers["etag"]
    assert served.tell("/api/environments/alice/words/delete", "alice").status_code == 200
    served.push(wheel(version="1.1"))
    fresh = served.get(INDEX, headers={"if-none-match": etag})
    assert (fresh.status_code, "1.1" in fresh.text, "1.0" in fresh.text) == (200, True, False)


def test_files_may_be_kept_for_ever(served):
    served.push(wheel())
    url = index(served)["files"][0]["url"]
    answer = served.get(url)
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert served.get(url, headers={"if-none-match": answer.headers["etag"]}).status_code == 304
    assert served.http.head(url).headers["content-length"] == str(len(answer.content))


@pytest.mark.parametrize("path", ["0" * 64 + "/{name}", "{sha256}/other.whl", "{sha256}/..%2F..%2Fhub.db", "../{name}"])
def test_another_address_leads_to_no_file(served, path):
    served.push(wheel())
    (file,) = index(served)["files"]
    filled = path.format(name=file["filename"], sha256=file["hashes"]["sha256"])
    assert served.get(f"/alice/words/files/{filled}").status_code in (401, 404)


def test_downloads_are_counted_and_metadata_is_none(served):
    served.push(wheel())
    url = index(served)["files"][0]["url"]
    for path in (url, url, url + ".metadata"):
        served.get(path)
    served.http.head(url)
    served.hub.counts.flush()
    found = served.get("/alice/words.json").json()
    assert found["row"]["num_downloads"] == 2
    assert [num for _, num in found["downloads"]] == [2]
    assert found["versions"][0]["files"][0]["num_downloads"] == 2


# --- who sees what is private


@pytest.fixture
def private(served):
    served.push(wheel(), palestra_visibility="private")
    (file,) = served.get(INDEX, "alice", headers=JSON).json()["files"]
    served.paths = [INDEX, "/alice/words/simple/", file["url"], file["url"] + ".metadata"]
    return served


def test_its_owner_sees_it_and_others_find_nothing(private):
    for path in private.paths:
        assert private.get(path, "alice").status_code == 200
        assert private.get(path, "root").status_code == 200
        assert private.get(path, "bob").status_code == 404
        assert private.get(path).status_code == 401


def test_basic_auth_as_pip_sends_it(private):
    for auth in (("__token__", private.tokens["alice"]), ("anything", private.tokens["alice"])):
        assert private.http.get(INDEX, auth=auth).status_code == 200
    assert private.http.get(INDEX, auth=(private.tokens["alice"], "")).status_code == 200
    assert private.http.get(INDEX, auth=("__token__", "wrong")).status_code == 401


def test_what_is_private_answers_as_what_is_not_there(private):
    """For somebody without a token, and for somebody whose token has no right there."""
    for who in ("", "bob"):
        for path in (INDEX, "/alice/words", "/alice/words.json", "/alice/words/source.json"):
            there, not_there = private.get(path, who), private.get(path.replace("words", "chess"), who)
            assert there.status_code == not_there.status_code
            assert there.text.replace("words", "chess") == not_there.text
            assert {**there.headers, "content-length": ""} == {**not_there.headers, "content-length": ""}


def test_no_list_and_no_search_shows_it(private):
    for path in (
        "/environments.json",
        "/environments.json?words=words",
        "/alice.json",
        "/environments.json?owner=alice",
    ):
        assert private.get(path).json()["environments"] == []
        assert private.get(path, "bob").json()["environments"] == []
        assert [one["name"] for one in private.get(path, "alice").json()["environments"]] == ["words"]


def test_revoked_and_expired_tokens_open_nothing(private):
    made = private.tell("/api/tokens", "alice", scope="read").json()
    private.tokens["reader"] = made["token"]
    assert private.get(INDEX, "reader").status_code == 200
    assert private.push(wheel(version="1.1"), "reader", to="alice").status_code == 403
    assert private.tell(f"/api/tokens/{made['id']}/revoke", "alice").status_code == 200
    assert private.get(INDEX, "reader").status_code == 401
    private.tokens["short"] = private.tell("/api/tokens", "alice", days=1e-9).json()["token"]
    assert private.get(INDEX, "short").status_code == 401


def test_made_public_it_is_there_for_all(private):
    body = {"visibility": "public"}
    assert private.tell("/api/environments/alice/words/visibility", "bob", **body).status_code == 404
    assert private.tell("/api/environments/alice/words/visibility", "alice", **body).status_code == 200
    assert private.get(INDEX).status_code == 200
    assert json.dumps(private.get("/environments.json").json()).count("palestra-words") == 1


def test_members_of_an_organisation_see_what_their_role_shows(served):
    assert served.tell("/api/owners", "alice", name="team").status_code == 200
    served.push(wheel(), "alice", to="team", palestra_visibility="private")
    path = "/team/words/simple/palestra-words/"
    assert served.get(path, "bob").status_code == 404
    for role, may_push in (("read", 403), ("write", 200)):
        assert served.tell("/api/owners/team/members/bob", "alice", role=role).status_code == 200
        assert served.get(path, "bob").status_code == 200
        assert served.push(wheel(version="2.0"), "bob", to="team").status_code == may_push
    assert served.tell("/api/owners/team/members/alice", "bob", role="read").status_code == 403
    assert served.tell("/api/owners/team/members/bob/remove", "alice").status_code == 200
    assert served.get(path, "bob").status_code == 404
    assert served.tell("/api/owners/team/members/alice/remove", "alice").status_code == 409  # the last administrator
