"""doc-search: pages as lines, the index, its tools, its questions; over made-up pages, and Debian's where they are."""

import sqlite3
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from palestra_doc_search import DocSearch, Grade, corpus, is_borne_out
from palestra_doc_search.corpus import Corpus, as_match, installed_folders, open_corpus, passages
from palestra_doc_search.make_questions import ask, defaults_of, make_questions, sound
from palestra_doc_search.pages import Line, Page, cut, read_page, read_pages
from palestra_doc_search.questions import Question, is_held_out, is_right, read_questions, written

from palestra.core.errors import UserError
from palestra.core.records import Ending
from palestra.env.play import score
from tests.unit.environments.laws import some_tasks

TEA = """<html><head><title>tea — Hot drinks &#8212; Python 3.11.2 documentation</title><style>p {}</style></head><body>
<div class="related"><ul><li>index</li></ul></div>
<div class="body"><section id="tea"><h1>tea — Hot drinks<a class="headerlink" href="#tea">¶</a></h1>
<p>Makes <em>hot</em>
drinks.</p>
<dl class="py function"><dt class="sig sig-object py" id="tea.brew">tea.brew(<em>leaves</em>, <em>wait_s=240</em>)</dt>
<dd><p>Pour boiling water over the given leaves and return what became of it after a while.</p>
<div class="versionadded"><p><span>New in version 3.5.</span></p></div>
<div class="versionchanged"><p><span>Changed in version 3.8: </span>Added the <em>wait_s</em> parameter.</p></div>
</dd></dl>
<dl class="py class"><dt class="sig sig-object py" id="tea.Cup"><em>class </em>tea.Cup</dt>
<dd><p>A cup.</p>
<dl class="py method"><dt class="sig sig-object py" id="tea.Cup.fill">fill(<em>drink</em>)</dt>
<dd><p>Raises an auditing event tea.spill with arguments cup, drink.</p>
<div class="deprecated"><p><span>Deprecated since version 3.9: </span>Use mugs instead.</p></div></dd></dl>
<div class="versionadded"><p><span>New in version 3.6.</span></p></div></dd></dl>
<table><tr><th><p>leaf</p></th><th><p>minutes</p></th></tr><tr><td>green</td><td>2</td></tr></table>
<pre>
>>> brew(
...     green)
</pre></section></div></body></html>"""
TEA_LINES = [
    "# tea — Hot drinks",
    "Makes hot drinks.",
    "tea.brew(leaves, wait_s=240)",
    "Pour boiling water over the given leaves and return what became of it after a while.",
    "New in version 3.5.",
    "Changed in version 3.8: Added the wait_s parameter.",
    "class tea.Cup",
    "A cup.",
    "fill(drink)",
    "Raises an auditing event tea.spill with arguments cup, drink.",
    "Deprecated since version 3.9: Use mugs instead.",
    "New in version 3.6.",
    "leaf | minutes",
    "green | 2",
    ">>> brew(",
    "...     green)",
]
RELEASES = {"3_8_1": ("3.8.1", "2014-01-10"), "3_8_2": ("3.8.2", "2014-02-03"), "3_8_3": ("3.8.3", "2014-02-05")}
QUESTION = Question(
    key="one",
    kind="default",
    question="What is the default value of the parameter `wait_s` of `tea.brew`?",
    answers=["240"],
    pages=["python/library/tea"],
    evidence=["tea.brew(leaves, wait_s=240)"],
)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Documentation as small as it can be, of both kinds; its index is kept apart."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    python, sqlite = tmp_path / "python", tmp_path / "sqlite"
    (python / "library").mkdir(parents=True)
    (sqlite / "releaselog").mkdir(parents=True)
    (sqlite / "c3ref").mkdir()
    (python / "library" / "tea.html").write_text(TEA)
    (python / "genindex.html").write_text("<p>everything, tea too</p>")
    (python / "library" / "long.html").write_text("".join(f"<p>coffee number {n}</p>" for n in range(500)))
    (sqlite / "rescode.html").write_text("<h3>(261) SQLITE_BUSY_RECOVERY</h3><p>Busy.<h3>(10) SQLITE_IOERR</h3>")
    (sqlite / "c3ref" / "c_fcntl.html").write_text("<pre>#define SQLITE_FCNTL_TEA   0x10\n#define SQLITE_FEW 2</pre>")
    for file, (version, day) in RELEASES.items():
        (sqlite / "releaselog" / f"{file}.html").write_text(f"<h2>SQLite Release {version} On {day}</h2>")
    return {"python": python, "sqlite": sqlite}


@pytest.fixture
def tea(folders) -> Corpus:
    return open_corpus(folders)


@pytest.fixture
def desk(folders, tmp_path):
    """The environment over them, with one question."""
    file = tmp_path / "questions.jsonl"
    file.write_bytes(written([QUESTION]))
    split = "test" if is_held_out(QUESTION.pages[0]) else "train"
    args = {"folders": {name: str(folder) for name, folder in folders.items()}, "questions": str(file)}
    return DocSearch(split=split, **args), next(iter(DocSearch(split=split, **args).tasks()))


def calls(*made: tuple[str, dict]) -> dict:
    return {"calls": list(made)}


def finish(answer: str) -> dict:
    return calls(("finish", {"answer": answer}))


async def told(desk, *made: tuple[str, dict]) -> list[str]:
    """What the tools say to calls, one a turn."""
    environment, task = desk
    record = await score(environment, task, [calls(one) for one in made])
    assert record.ending == Ending.TRUNCATED, record.error
    return [message["content"] for message in record.messages if message["role"] == "tool"]


# --- pages


def test_a_page_is_its_lines():
    page = read_page("python/library/tea", TEA)
    assert [line.text for line in page.lines] == TEA_LINES
    assert (page.name, page.title) == ("python/library/tea", "tea — Hot drinks")


def test_lines_know_what_they_define():
    lines = read_page("tea", TEA).lines
    owners = [line.owner for line in lines]
    assert owners == ["", "", *["tea.brew"] * 4, *["tea.Cup"] * 2, *["tea.Cup.fill"] * 3, "tea.Cup", *[""] * 4]
    assert [line.text for line in lines if line.opens] == [TEA_LINES[number] for number in (0, 2, 6, 8)]


@given(st.text(alphabet="ab ", max_size=200), st.integers(2, 20))
def test_cutting_loses_no_letter(line, longest):
    pieces = list(cut(line, longest))
    assert all(len(piece) <= longest for piece in pieces)
    assert "".join(pieces).replace(" ", "") == line.replace(" ", "")


def test_indexes_of_words_are_no_pages(folders):
    assert [page.name for page in read_pages("python", folders["python"])] == [
        "python/library/long",
        "python/library/tea",
    ]


@given(st.lists(st.builds(Line, st.text("ab", min_size=1, max_size=900), opens=st.booleans()), max_size=20))
def test_passages_are_the_page(lines):
    found = list(passages(Page("p", "P", lines)))
    assert [line for _, _, text in found for line in text.split("\n")] == [line.text for line in lines]
    for first, _, text in found:
        assert text.split("\n")[0] == lines[first - 1].text
        assert len(text) <= 1600


# --- the index


def test_search_finds_names_before_mentions(tea):
    [first, *_] = tea.search("what does brew do?", 5)
    assert (first.page, first.line, first.section) == ("python/library/tea", 3, "tea.brew(leaves, wait_s=240)")
    assert tea.search("SQLITE_IOERR", 5)[0].page == "sqlite/rescode"
    assert tea.search("absent", 5) == []
    assert len(tea.search("coffee", 3)) == 3


@pytest.mark.parametrize(
    "query", ['"', "brew AND", "NEAR(brew", "-brew", "text:brew", "brew*", "^brew", "a'); DROP--", "ß ٣ é\0"]
)
def test_nothing_typed_is_syntax(tea, query):
    if any(letter.isalnum() for letter in query):
        tea.search(query, 5)
    else:
        with pytest.raises(ValueError, match="no word in it"):
            tea.search(query, 5)


@given(st.text(max_size=100))
def test_every_query_is_a_match_or_has_no_word(query):
    try:
        match = as_match(query)
    except ValueError:
        assert not any(letter.isalnum() for letter in query)
        return
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE VIRTUAL TABLE words USING fts5(text)")
        database.execute("SELECT * FROM words WHERE words MATCH ?", (match,)).fetchall()


def test_words_that_say_nothing_are_left_out_unless_there_are_no_others():
    common = {"what", "is", "the", "of", "it"}
    assert as_match("What is the BREW of brew", common) == '"brew"'
    assert as_match("what is it", common) == '"what" OR "is" OR "it"'
    assert as_match("x " * 100 + " ".join(f"w{n}" for n in range(100))).count(" OR ") == 31


def test_words_of_very_many_passages_are_common(folders, monkeypatch):
    monkeypatch.setattr(corpus, "COMMON_FROM", 6)
    monkeypatch.setattr(corpus, "SAMPLED", 1)
    assert open_corpus(folders).common == {"3", "coffee", "number"}


@pytest.mark.parametrize("most_chars", [1, 100, 4000, 10**9])
def test_windows_one_after_the_other_are_the_page(tea, most_chars):
    shown, line = [], 1
    while line <= 500:
        window = tea.window("python/library/long", line, most_chars)
        assert (window.first, window.num_lines) == (line, 500)
        assert len(window.text) <= max(most_chars, len("coffee number 499"))
        shown += window.text.split("\n")
        line = window.last + 1
    assert shown == [f"coffee number {n}" for n in range(500)]


def test_pages_and_lines_that_are_not_there_are_said(tea):
    with pytest.raises(LookupError, match="no page 'python/tea'; close to it: python/library/tea"):
        tea.window("python/tea", 1, 100)
    with pytest.raises(LookupError, match="lines 1 to 16; there is no line 17"):
        tea.window("python/library/tea", 17, 100)


def test_an_index_is_made_once(folders, monkeypatch):
    built = []
    build = corpus.build
    monkeypatch.setattr(corpus, "build", lambda folders, file: (built.append(file), build(folders, file)))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: open_corpus(folders).file, range(8)))
    assert built == [found[0]]
    assert len(set(found)) == 1
    assert not list(found[0].parent.glob(".building-*"))
    (folders["sqlite"] / "new.html").write_text("<p>new</p>")
    assert open_corpus(folders).file != found[0]


def test_an_index_that_could_not_be_made_leaves_nothing(folders, monkeypatch, tmp_path):
    def torn(source, folder):
        yield from []
        raise OSError("disk")

    monkeypatch.setattr(corpus, "read_pages", torn)
    with pytest.raises(OSError, match="disk"):
        open_corpus(folders)
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.suffix != ".lock"]


def test_packages_that_are_missing_are_named_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "DOCS", tmp_path)
    with pytest.raises(UserError, match=r"apt-get install -y --no-install-recommends python3-doc sqlite3-doc$"):
        list(DocSearch().tasks())
    (tmp_path / "sqlite3").mkdir()
    (tmp_path / "sqlite3" / "index.html").touch()
    with pytest.raises(UserError, match=r"install -y --no-install-recommends python3-doc$"):
        installed_folders()


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*nowhere with the pages of 'x'"):
        list(DocSearch(folders={"x": str(tmp_path / "nowhere")}).tasks())


# --- rollouts


async def test_one_who_searches_reads_and_answers_earns_one(desk):
    environment, task = desk
    replies = [calls(("search", {"query": "brew"})), calls(("click", {"number": 1})), finish("240"), finish("241")]
    record = await score(environment, task, replies)
    assert (record.ending, record.num_turns, record.reward, record.rewards) == (Ending.OK, 3, 1.0, {"correct": 1.0})
    expected = {"tool_calls": 3, "tool_errors": 0, "answered": 1, "searches": 1, "evidence_opened": 1}
    assert record.metrics == expected
    found, read, done = [message["content"] for message in record.messages if message["role"] == "tool"]
    assert found.startswith("1. tea — Hot drinks: tea.brew(leaves, wait_s=240) (python/library/tea, line 3)\n")
    assert read == "python/library/tea: tea — Hot drinks (lines 3 to 16 of 16)\n\n" + "\n".join(TEA_LINES[2:])
    assert done == "240"


@pytest.mark.parametrize("answer", ["", " ", "2400", "24", "0", "240 or 300", "not 240", "240 241", "nan", "x" * 400])
async def test_wrong_answers_earn_nothing(desk, answer):
    record = await score(*desk, [finish(answer)])
    assert record.reward == 0
    assert record.ending in (Ending.OK, Ending.TRUNCATED)


async def test_an_answer_that_was_only_said_is_none(desk):
    record = await score(*desk, ["240"])
    assert (record.ending, record.reward, record.metrics["answered"]) == (Ending.OK, 0.0, 0.0)


async def test_of_two_answers_at_once_the_first_counts(desk):
    wrong, right = ("finish", {"answer": "3"}), ("finish", {"answer": "240"})
    assert (await score(*desk, [calls(wrong, right)])).reward == 0
    record = await score(*desk, [calls(right, wrong)])
    assert (record.reward, record.metrics["tool_errors"]) == (1.0, 1.0)


async def test_calls_of_one_reply_are_answered_together(desk):
    record = await score(*desk, [calls(("search", {"query": "coffee"}), ("open", {"page": "sqlite/rescode.html"}))])
    search, page = [message["content"] for message in record.messages if message["role"] == "tool"]
    assert search.count("\n") == 11  # two lines a result
    assert page.startswith("sqlite/rescode: ")
    assert record.metrics["evidence_opened"] == 0


async def test_a_page_is_read_on_where_it_stopped(desk):
    desk[0].window_chars = 60
    said = await told(
        desk, ("open", {"page": "python/library/long"}), ("open", {"page": "python/library/long", "line": 4})
    )
    assert said[0].endswith(
        "lines 1 to 3 of 500)\n\ncoffee number 0\ncoffee number 1\ncoffee number 2\n(goes on at line 4)"
    )
    assert "\n\ncoffee number 3\n" in said[1]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("click", {"number": 1}, "there is no result 1; there are no results"),
        ("click", {"number": "first"}, "Expected int"),
        ("search", {"query": "..."}, "has no word in it"),
        ("search", {"query": "brew", "at_most": 0}, "give 1 to 20"),
        ("search", {"query": "brew", "at_most": 10**6}, "give 1 to 20"),
        ("open", {"page": ""}, "there is no page ''"),
        ("open", {"page": "python/library/tea", "line": -1}, "there is no line -1"),
        ("finish", {"answer": " "}, "an answer has 1 to 300 characters"),
        ("finish", {}, "missing required field answer"),
    ],
)
async def test_calls_that_make_no_sense_are_told_so(desk, name, arguments, words):
    [said] = await told(desk, (name, arguments))
    assert said.startswith("Error: ")
    assert words in said


async def test_a_result_that_is_not_there_is_told_with_what_is(desk):
    said = await told(desk, ("search", {"query": "SQLITE_IOERR"}), ("click", {"number": 2}))
    assert "there is no result 2; the last search has results 1 to 1" in said[1]


async def test_a_judge_decides_where_there_is_one(desk):
    environment, task = desk
    asked = []

    async def judge(template, schema, **fields):
        asked.append(fields)
        return Grade(is_right="four minutes" in fields["answer"])

    environment._judge = judge
    assert (await score(environment, task, [finish("four minutes")])).reward == 1
    assert (await score(environment, task, [finish("five")])).reward == 0
    assert (await score(environment, task, [""])).reward == 0
    assert asked == [{"question": task.prompt, "accepted": "240", "answer": said} for said in ("four minutes", "five")]


def test_a_judge_is_set_up_from_arguments():
    assert DocSearch()._judge is None
    assert DocSearch(judge={"url": "http://judge/v1", "model": "wise"})._judge is not None
    with pytest.raises(UserError, match="judge"):
        DocSearch(judge={"url": "http://judge/v1"})


# --- questions


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("3.8", "3.8"),
        (" Python 3.8. ", "3.8"),
        ("version `3.8`", "3.8"),
        ("`json.dump()`", "json.dump"),
        ("the parameter *indent*", "indent"),
        ("'strict'", "strict"),
        ("PEP 604", "604"),
        ("1,000,000", "1000000"),
        ("path,mode ,  dir_fd", "path, mode, dir_fd"),
        ("SQLITE_BUSY", "sqlite_busy"),
    ],
)
def test_answers_that_say_the_same(answer, accepted):
    assert is_right(answer, [accepted])
    assert is_right(accepted, [answer])


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [("3.1", "3.10"), ("3", "3.0"), ("", ""), ("''", ""), ("-5", "5"), ("10 00", "1000"), ("a b", "ab")],
)
def test_answers_that_do_not(answer, accepted):
    assert not is_right(answer, [accepted])


@given(st.text(max_size=50))
def test_every_text_can_be_compared(text):
    is_right(text, ["3.8"])


def test_defaults_are_read_from_signatures():
    head = "shelve.open(filename, flag='c', protocol=None, *, writeback=False, **kw) → Shelf"
    assert defaults_of(head) == {"flag": "'c'", "protocol": "None", "writeback": "False"}
    assert defaults_of("class io.StringIO(initial_value='', newline='\\n')") == {
        "initial_value": "''",
        "newline": "'\\n'",
    }
    assert defaults_of("ord(c, [x])") == {}
    assert defaults_of("json.tool") == {}


def test_questions_are_made_from_pages(folders):
    pages = [page for source, folder in folders.items() for page in read_pages(source, folder)]
    made = {question.question: question for question in make_questions(pages)}
    answers = {text: question.answers for text, question in made.items()}
    assert answers["What is the default value of the parameter `wait_s` of `tea.brew`?"] == ["240"]
    assert answers["Since which version of Python is `tea.Cup.fill` deprecated?"] == ["3.9"]
    event = "With which arguments, in their order, does Python raise the auditing event `tea.spill`?"
    assert answers[event] == ["cup, drink"]
    assert answers["What is the value of the constant SQLITE_FCNTL_TEA of SQLite's C interface?"] == ["16", "0x10"]
    assert not any("SQLITE_FEW" in text for text in made)
    kinds = Counter(question.kind for question in made.values())
    assert kinds["added"] + kinds["only_new"] == 2  # brew's and Cup's
    assert (kinds["parameter"], kinds["release_day"], kinds["result_code"]) == (1, 3, 1)
    version = "In which version of Python did `tea.brew` get the parameter `wait_s`?"
    assert answers.get(version, ["3.8"]) == ["3.8"]
    again = make_questions(reversed(pages))
    assert written(again) == written(made.values())


def test_days_between_releases_are_counted_where_both_pages_are_of_one_split():
    days = {f"sqlite/releaselog/3.9.{n}": date(2016, 1, 31) + timedelta(days=11 * n) for n in range(20)}
    pages = [Page(name, "", [Line(f"## SQLite Release {name.rsplit('/')[-1]} On {day}")]) for name, day in days.items()]
    between = [question for question in make_questions(pages) if question.kind == "days_between"]
    assert len(between) == 18  # of 20 releases, in two splits
    for question in between:
        first, second = question.pages
        assert question.answers == [str((days[second] - days[first]).days)]
        assert is_held_out(first) == is_held_out(second)


def test_what_has_two_answers_or_says_its_own_is_not_asked():
    one, other = (ask("kind", "Which?", [answer], ("p", "line")) for answer in "ab")
    said = ask("kind", "Is it `tea`?", ["tea"], ("p", "line"))
    assert list(sound([one, other, said])) == []
    assert list(sound([one])) == [one]


def test_a_file_that_holds_no_questions_is_said(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"key": 1}\n')
    with pytest.raises(UserError, match=r"q\.jsonl.*cannot be read"):
        read_questions(str(tmp_path / "q.jsonl"))


def test_questions_that_the_pages_do_not_bear_out_are_not_asked(desk, tmp_path):
    environment, _ = desk
    other = QUESTION.__class__(
        **{name: getattr(QUESTION, name) for name in QUESTION.__struct_fields__} | {"evidence": ["x"]}
    )
    (tmp_path / "questions.jsonl").write_bytes(written([other]))
    with pytest.raises(UserError, match="no question's evidence is in the pages"):
        environment.tasks()


def test_the_packages_questions():
    questions = read_questions()
    assert len(questions) >= 500
    assert (
        len({question.key for question in questions})
        == len({question.question for question in questions})
        == len(questions)
    )
    split = {page: is_held_out(question.pages[0]) for question in questions for page in question.pages}
    for question in questions:
        assert {split[page] for page in question.pages} == {is_held_out(question.pages[0])}
        assert is_right(question.answers[0], question.answers)
        assert not is_right(question.question, question.answers)
    assert 0.1 < sum(is_held_out(question.pages[0]) for question in questions) / len(questions) < 0.35


# --- Debian's pages


@pytest.fixture(scope="module")
def debian() -> Corpus:
    try:
        return DocSearch().corpus
    except UserError as error:
        pytest.skip(str(error))


def test_the_installed_pages_bear_out_the_questions(debian):
    """Some of them may have changed since 3.11 and 3.40."""
    questions = read_questions()
    borne_out = sum(is_borne_out(question, debian) for question in questions)
    assert borne_out > 0.5 * len(questions)
    train, test = (DocSearch(split=split).tasks() for split in ("train", "test"))
    assert len(list(train)) + len(list(test)) == borne_out


@pytest.mark.parametrize("source", ["sqlite", pytest.param("python", marks=pytest.mark.slow)])
def test_the_packages_questions_are_those_that_the_script_makes(debian, source):
    """Of each source by itself: no kind of question is of both."""
    questions = [question for question in read_questions() if question.pages[0].startswith(f"{source}/")]
    if not all(is_borne_out(question, debian) for question in questions):
        pytest.skip("the installed documentation is not the one that the questions were made from")
    assert make_questions(read_pages(source, installed_folders()[source])) == questions


def test_order_depends_on_split_and_seed(debian):
    assert some_tasks(DocSearch) == some_tasks(DocSearch)
    assert some_tasks(DocSearch) != some_tasks(DocSearch, seed=2)


async def test_a_search_for_the_question_finds_its_evidence(debian):
    """Of most questions among ten: the tools can answer what is asked."""
    questions = read_questions()[::10]
    found = sum(
        bool({hit.page for hit in debian.search(question.question, 10)} & set(question.pages)) for question in questions
    )
    assert found > 0.5 * len(questions)
