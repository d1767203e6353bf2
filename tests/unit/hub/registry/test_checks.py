"""Who sees what an examination said, who may ask for one, and that what the examined code printed stays text."""

import pytest

from palestra import __version__
from palestra.env.case import Case
from palestra.hub.registry.blobs import put_bytes
from palestra.hub.trust import queue
from palestra.hub.trust.verdict import Status, Verdict
from tests.unit.hub.registry.packages import wheel
from tests.unit.hub.registry.test_pages import ATTACK

AGAIN = "/api/environments/alice/words/versions/1.0/check"


def judge(served, verdict: Verdict, library: str = __version__) -> None:
    database, blobs = served.hub.database, served.hub.blobs
    queue.enqueue_missing(database, library)
    job = queue.claim(database, "w", library)
    assert job is not None
    assert queue.finish(database, job, verdict, put_bytes(blobs, verdict.log.encode(), served.hub.settings.incoming))


def test_a_push_is_queued_and_what_was_said_is_shown_by_library(served):
    assert served.push(wheel()).status_code == 200
    assert [row["status"] for row in served.get("/alice/words/checks.json").json()["rows"]] == ["waiting"]
    failed = Verdict(status=Status.FAILED, cases={"words": [Case(name="gold scores 1", ending="failed", detail="0.5")]})
    judge(served, Verdict(status=Status.PASSED), library="0.0.1")
    judge(served, failed)
    found = served.get("/alice/words/checks.json").json()
    assert (found["versions"], found["libraries"]) == (["1.0"], [__version__, "0.0.1"])
    assert {row["library"]: row["status"] for row in found["rows"]} == {__version__: "failed", "0.0.1": "passed"}
    assert served.get("/alice/words.json").json()["badges"] == {"1.0": "failed"}  # of the newest library
    assert "fails its checks" in served.get("/alice/words").text
    shown = served.get("/alice/words/checks/1").text
    assert "gold scores 1" in shown


def test_what_the_code_printed_stays_text(served):
    served.push(wheel())
    case = Case(name=ATTACK, ending="failed", detail=ATTACK)
    judge(served, Verdict(status=Status.FAILED, why=ATTACK, cases={ATTACK: [case]}, log=ATTACK))
    for path in ("/alice/words/checks", "/alice/words/checks/1", "/alice/words"):
        assert "<script>alert" not in served.get(path).text
        assert "<img src=x" not in served.get(path).text
    assert served.get("/alice/words/checks/1.json").json()["log"].strip() == ATTACK


def test_of_a_private_environment_nobody_else_sees_the_log(served):
    served.push(wheel(), palestra_visibility="private")
    judge(served, Verdict(status=Status.PASSED, log="a secret"))
    for name, status in (("", 404), ("bob", 404), ("alice", 200)):
        for path in ("/alice/words/checks.json", "/alice/words/checks/1.json"):
            assert served.get(path, name).status_code == status


@pytest.mark.parametrize("number", ["2", "0", "x", "9" * 40, "-1", "٣"])
def test_a_check_that_is_not_there(served, number: str):
    served.push(wheel())
    assert served.get(f"/alice/words/checks/{number}.json").status_code == 404


def test_who_may_write_may_ask_for_another(served):
    served.push(wheel())
    judge(served, Verdict(status=Status.FAILED, log="x"))
    woken = []
    served.hub.on_pushed = lambda: woken.append(1)
    assert [served.tell(AGAIN, name).status_code for name in ("", "bob")] == [401, 403]
    assert woken == []
    assert served.tell(AGAIN, "alice").status_code == 200
    assert woken == [1]
    (row,) = served.get("/alice/words/checks.json").json()["rows"]
    assert (row["status"], row["ended"], row["why"]) == ("waiting", None, "")
    assert served.tell(AGAIN.replace("1.0", "9.9"), "alice").status_code == 404
