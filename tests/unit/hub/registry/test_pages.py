"""Pages, twins and forms: nothing of an upload acts, nothing is done that no page of the hub has sent."""

import re
from html import unescape
from urllib.parse import quote

import msgspec
import pytest

from palestra.hub.evals.pages import HOME as EVALUATIONS
from palestra.hub.evals.pages import PAGES as OF_EVALUATIONS
from palestra.hub.registry import readme
from palestra.hub.registry.actions import ACTIONS
from palestra.hub.registry.database import Database
from palestra.hub.registry.pages import PAGES
from tests.unit.hub.registry.packages import sdist, wheel

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'`{{7*7}}</pre>"
PATHS = {
    "/environments": "/environments",
    "/login": "/login",
    "/account": "/account",
    "/audit": "/audit",
    "/{owner}": "/alice",
    "/{owner}/{environment}": "/alice/words",
    "/{owner}/{environment}/source": "/alice/words/source",
    "/{owner}/{environment}/checks": "/alice/words/checks",
    "/{owner}/{environment}/checks/{check}": "/alice/words/checks/1",
}


def log_in(served, name: str) -> str:
    """The browser's session is in the client from now on; the form's secret."""
    answer = served.http.post(
        "/api/login", data={"token": served.tokens[name], "next": "/account"}, follow_redirects=False
    )
    assert (answer.status_code, answer.headers["location"]) == (303, "/account")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    return re.search(r'name="csrf" value="([^"]+)"', served.get("/account").text).group(1)


def test_every_page_is_tested_and_has_its_twin(served):
    own = [page for page in PAGES if page not in OF_EVALUATIONS]  # tests/unit/hub/evals/test_web.py has the others
    assert sorted(PATHS) == sorted(page.path for page in own)
    served.push(wheel())
    log_in(served, "root")
    for page in own:
        answer = served.get(PATHS[page.path])
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/html")
        twin = served.get(PATHS[page.path] + ".json")
        msgspec.json.decode(twin.content, type=page.answer)


def test_the_openapi_document_has_every_page_and_action(served):
    found = served.get("/openapi.json").json()
    shown, done = {f"{page.path}.json" for page in PAGES}, {action.path for action in ACTIONS}
    assert set(found["paths"]) == shown | done | {EVALUATIONS}
    names = [one["operationId"] for path in found["paths"].values() for one in path.values()]
    assert len(names) == len(set(names))


def test_nothing_of_an_upload_acts(served):
    metadata = {
        "summary": ATTACK,
        "keywords": ATTACK,
        "license": ATTACK,
        "project_url": f"{ATTACK}, javascript:alert(1)",
    }
    made = wheel(readme=f"{ATTACK}\n\n[x](javascript:alert(3))\n", files={"x.html": ATTACK.encode()}, **metadata)
    assert served.push(made).status_code == 200
    reason = {"reason": ATTACK}
    assert served.tell("/api/environments/alice/words/versions/1.0/yank", "alice", **reason).status_code == 200
    for path in ("/environments", "/alice", "/alice/words", "/alice/words/source?path=x.html"):
        text = served.get(path).text
        assert not re.search(r"<script(?! src=\"/static/)|<img|onerror=alert\(2\)>(?!.*&)|href=\"javascript", text), (
            path
        )
        assert str(7**20) not in text  # what a template would make of it
    assert ATTACK in unescape(served.get("/alice/words/source?path=x.html").text)


def test_pages_forbid_programs_of_others(served):
    policy = served.get("/environments").headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    text = served.get("/environments").text
    assert not re.search(r"<style|\son\w+=|style=", text)


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("# A\n\n*b* `c`", "<h2>A</h2>\n<p><em>b</em> <code>c</code></p>"),
        ("<b onclick=x>a</b>", "<p>&lt;b onclick=x&gt;a&lt;/b&gt;</p>"),
        ("![alt](http://a/b.png)", '<p><a href="http://a/b.png" rel="nofollow noopener noreferrer">alt</a></p>'),
        ("[a](http://b)", '<p><a href="http://b" rel="nofollow noopener noreferrer">a</a></p>'),
        ("[a](data:text/html,x)", "<p>[a](data:text/html,x)</p>"),
        ("![a](javascript:alert(1))", "<p>![a](javascript:alert(1))</p>"),
        ("|a|\n|-|\n|b|", "<table>"),
    ],
)
def test_a_readme_is_rendered_safely(text, html):
    assert readme.render(text, "text/markdown").startswith(html)


def test_a_readme_of_another_kind_is_shown_as_it_is():
    assert readme.render("*a* <script>", "text/x-rst") == "<pre>*a* &lt;script&gt;</pre>"


# --- finding


def test_a_form_of_too_many_fields_is_the_clients_mistake(served):
    answer = served.http.post("/api/login", data={f"field{number}": "" for number in range(200)})
    assert (answer.status_code, "more than 100 fields" in answer.text) == (400, True)


def test_words_are_found_where_they_are(served):
    served.push(wheel("palestra-wordle", summary="Guess hidden letters", keywords="game"))
    served.push(wheel("palestra-logic", readme="Puzzles about knights, solved by deduction."), "bob")

    def names(**query) -> list[str]:
        found = served.get("/environments.json", params=query).json()
        assert found["num_matching"] == len(found["environments"])
        return [one["name"] for one in found["environments"]]

    assert names() == ["logic", "wordle"]  # the newest change first
    assert names(words="hidden letters") == ["wordle"]
    assert names(words="knigh") == ["logic"]  # the beginning of a word
    assert names(words="bob") == ["logic"]
    assert names(words="word") == ["wordle"]
    assert names(words="hidden knights") == []
    assert names(tag="game") == ["wordle"]
    assert names(tag="gam") == []
    assert names(owner="bob") == ["logic"]
    for nonsense in ('"', "a'b", "*", "NEAR(", "a AND", "-", "%", "\\", "(", ":*", "a & | !"):
        assert set(names(words=nonsense)) <= {"logic", "wordle"}


def test_a_new_version_is_found_by_its_words_and_no_longer_by_the_old(served):
    served.push(wheel(summary="apples"))
    served.push(wheel(version="2.0", summary="oranges"))
    assert served.get("/environments.json?words=oranges").json()["num_matching"] == 1
    assert served.get("/environments.json?words=apples").json()["num_matching"] == 0


def test_lists_go_on_page_by_page(served):
    for name in "abcde":
        served.push(wheel(f"palestra-game-{name}"))
    pages = [served.get(f"/environments.json?limit=2&page={number}").json() for number in (1, 2, 3, 4)]
    assert [one["name"] for page in pages for one in page["environments"]] == [f"game-{name}" for name in "edcba"]
    assert [page["is_last"] for page in pages] == [False, False, True, True]


def test_who_needs_it_is_told(served):
    served.push(wheel("palestra-words"))
    served.push(wheel("palestra-games", requires=["palestra-words>=1"]))
    served.push(wheel("palestra-secret", requires=["palestra-words"]), "bob", palestra_visibility="private")
    assert [one["name"] for one in served.get("/alice/words.json").json()["dependants"]] == ["games"]
    assert [one["name"] for one in served.get("/alice/words.json", "bob").json()["dependants"]] == ["games", "secret"]
    (needs,) = served.get("/alice/games.json").json()["dependencies"]
    assert needs == {"name": "palestra-words", "requirement": "palestra-words>=1", "hub": "alice/words"}


@pytest.mark.parametrize("make", [wheel, sdist])
def test_sources_are_read_member_by_member(served, make):
    served.push(make())
    listed = served.get("/alice/words/source.json").json()
    assert listed["members"]
    for one in listed["members"]:
        answer = served.get(f"/alice/words/source.json?path={quote(one['name'])}").json()
        assert (answer["size"], answer["is_cut"]) == (one["size"], False)
        assert len(answer["text"].encode()) == one["size"]
    assert served.get("/alice/words/source.json?path=../../hub.db").status_code == 404
    assert served.get("/alice/words/source.json?file=other.whl").status_code == 404


def test_a_long_member_is_cut_and_a_binary_one_is_not_shown(served):
    served.push(wheel(files={"long.txt": b"0123456789" * 60_000, "x.bin": b"\0\1"}))
    found = served.get("/alice/words/source.json?path=long.txt").json()
    assert (found["is_cut"], len(found["text"])) == (True, 262_144)
    assert served.get("/alice/words/source.json?path=x.bin").json()["is_binary"]


# --- forms


def test_a_form_needs_the_secret_of_its_session(served):
    served.push(wheel())
    csrf = log_in(served, "alice")
    path = "/api/environments/alice/words/versions/1.0/yank"

    def send(**more):
        headers = more.pop("headers", {})
        return served.http.post(path, data={"reason": "r", **more}, headers=headers, follow_redirects=False)

    assert send().status_code == 403
    assert send(csrf="wrong").status_code == 403
    assert served.http.post(path, json={}).status_code == 403
    assert send(csrf=csrf, headers={"origin": "http://evil.example"}).status_code == 403
    assert send(csrf=csrf, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert served.get("/alice/words.json").json()["versions"][0]["yanked"] is False
    good = send(csrf=csrf, next="/alice/words", headers={"origin": "http://localhost"})
    assert (good.status_code, good.headers["location"]) == (303, "/alice/words")
    assert served.get("/alice/words.json").json()["versions"][0]["yanked"] is True


@pytest.mark.parametrize("next_page", ["http://evil.example", "//evil.example", "/\\evil.example", ""])
def test_nobody_is_sent_elsewhere(served, next_page):
    answer = served.http.post(
        "/api/login", data={"token": served.tokens["alice"], "next": next_page}, follow_redirects=False
    )
    assert answer.headers["location"] == "/environments"


def test_a_token_made_in_a_form_is_shown_once(served):
    csrf = log_in(served, "alice")
    page = served.http.post("/api/tokens", data={"csrf": csrf, "name": "ci", "scope": "read", "days": "7", "only": ""})
    token = re.search(r"palestra_[\w-]{40,}", page.text).group()
    served.tokens["ci"] = token
    assert served.get("/account.json", "ci").json()["scope"] == "read"
    assert token not in served.get("/account").text
    assert token[len("palestra_") :][:12] in served.get("/account").text


def test_an_organisation_is_made_and_its_members_are_kept_by_forms(served):
    csrf = log_in(served, "alice")

    def send(path, **fields):
        return served.http.post(path, data={"csrf": csrf, **fields}, follow_redirects=False).status_code

    def members():
        return {one["name"]: one["role"] for one in served.get("/team.json", "alice").json()["members"]}

    assert send("/api/owners", name="team") == 303
    assert 'href="/team"' in served.get("/account").text
    assert send("/api/owners/team/members", person="bob", role="read") == 303
    assert members() == {"alice": "admin", "bob": "read"}
    page = served.get("/team").text
    assert set(re.findall(r'action="(/api/owners/team[^"]*)"', page)) == {
        "/api/owners/team/members",
        *(f"/api/owners/team/members/{name}{act}" for name in ("alice", "bob") for act in ("", "/remove")),
    }
    assert send("/api/owners/team/members/bob", role="write") == 303
    assert members() == {"alice": "admin", "bob": "write"}
    assert send("/api/owners/team/members", person="nobody", role="read") == 404
    assert send("/api/owners/team/members/alice", role="read") == 409  # the last administrator
    assert members() == {"alice": "admin", "bob": "write"}
    log_in(served, "bob")
    assert "/api/owners/team" not in served.get("/team").text  # sees who is in it, and changes nothing
    assert served.tell("/api/owners/team/members", "bob", person="root", role="admin").status_code == 403
    assert send("/api/owners/team/members/bob/remove") == 403  # with the secret of alice's session


def test_a_session_ends_with_its_token_and_by_logging_out(served):
    csrf = log_in(served, "alice")
    assert served.http.post("/api/logout", data={"csrf": csrf}, follow_redirects=False).status_code == 303
    assert served.get("/account").status_code == 403
    log_in(served, "alice")
    (token,) = served.get("/account.json").json()["tokens"]
    assert served.tell(f"/api/tokens/{token['id']}/revoke", "alice").status_code == 200
    assert served.get("/account").status_code == 403


def test_a_browser_session_uploads_nothing(served):
    """An upload has no secret of a form: it needs a token."""
    log_in(served, "alice")
    answer = served.http.post("/alice/legacy/", data={":action": "file_upload"}, files={"content": wheel()})
    assert answer.status_code == 401


def test_a_database_that_is_away_is_not_described_to_who_asks(served, monkeypatch):
    away = Database("postgresql://user:secret@127.0.0.1:1/hub")
    monkeypatch.setattr(served.hub, "database", away)
    for path in ("/environments", "/environments.json", "/alice/words/simple/palestra-words/"):
        answer = served.get(path)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert "127.0.0.1" not in answer.text
        assert "secret" not in answer.text


# --- rights of actions


def test_a_lesser_token_makes_no_other(served):
    served.push(wheel())
    for wish in ({"scope": "write"}, {"scope": "admin", "only": "alice"}, {"scope": "admin", "only": "alice/words"}):
        served.tokens["lesser"] = served.tell("/api/tokens", "alice", **wish).json()["token"]
        assert served.tell("/api/tokens", "lesser", scope="read").status_code == 403
        assert served.tell("/api/owners", "lesser", name="team").status_code == 403
        assert served.tell("/api/tokens/1/revoke", "lesser").status_code == 403


def test_what_administrators_do_others_may_not(served):
    person = {"name": "carol", "kind": "person"}
    assert served.tell("/api/owners", "alice", **person).status_code == 403
    assert served.tell("/api/owners", "root", **person).status_code == 200
    assert served.tell("/api/owners", "root", **person).status_code == 409
    assert served.tell("/api/tokens", "alice", person="carol").status_code == 403
    assert served.tell("/api/tokens", "root", person="carol").status_code == 200
    assert served.get("/audit.json", "alice").status_code == 403
    assert served.get("/audit.json", "root").json()["rows"][0]["action"] == "token.create"


@pytest.mark.slow
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.path)
def test_no_action_is_done_for_nobody(served, action):
    served.push(wheel())
    filled = re.sub(
        r"{(\w+)}", lambda match: {"owner": "alice", "environment": "words"}.get(match[1], "1"), action.path
    )
    assert served.tell(filled).status_code == 401
    assert served.get(filled).status_code in (404, 405)
    assert served.versions("/alice/words") == ["1.0"]


def test_an_owner_that_looks_like_another_is_refused(served):
    assert "easily taken for 'alice'" in served.tell("/api/owners", "bob", name="a1ice").json()["error"]
    assert served.tell("/api/owners", "bob", name="weavers").status_code == 200
