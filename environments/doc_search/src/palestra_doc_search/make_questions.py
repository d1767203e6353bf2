"""Questions from the installed pages: `python -m palestra_doc_search.make_questions OUT.jsonl`.

Each kind is a function from what is read to questions, each of which rests on lines that are quoted as its evidence.
A fact is asked for once; what could be answered in two ways is not asked.
"""

import ast
import hashlib
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise, takewhile
from pathlib import Path

from palestra_doc_search.corpus import installed_folders
from palestra_doc_search.pages import Page, read_pages
from palestra_doc_search.questions import Question, is_held_out, is_right, normal, written

MOST_OF_A_KIND = 75
MOST_OF_A_PAGE = 12
FIRST_VERSION = (3, 3)  # what Python 2.7 and 3.1 or 3.2 got has two versions


@dataclass
class Definition:
    """What Sphinx lists under one head: a function, a class, an option. `notes` are its own lines, not its members'."""

    page: str
    id: str
    heads: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.id.removeprefix("c.")

    @property
    def names(self) -> list[str]:
        """With and without what it is part of."""
        parts = self.name.split(".")
        return [".".join(parts[first:]) for first in range(len(parts))]

    def matches(self, pattern: str | re.Pattern[str]) -> list[tuple[str, re.Match[str]]]:
        return [(note, match) for note in self.notes if (match := re.search(pattern, note))]


@dataclass(frozen=True)
class Source:
    pages: list[Page]
    definitions: list[Definition]

    def lines(self, place: str) -> Iterator[tuple[str, str]]:
        """Page and text of all lines of the pages whose names match."""
        for page in self.pages:
            if re.fullmatch(place, page.name):
                yield from ((page.name, line.text) for line in page.lines)


def definitions_of(page: Page) -> Iterator[Definition]:
    found: dict[str, Definition] = {}
    for line in page.lines:
        if re.fullmatch(r"[A-Za-z_][\w.]*", line.owner):  # of Python or C, no option of a command
            definition = found.setdefault(line.owner, Definition(page.name, line.owner))
            (definition.heads if line.opens else definition.notes).append(line.text)
    return iter(found.values())


def ask(kind: str, question: str, answers: Iterable[str], *evidence: tuple[str, str]) -> Question:
    pages, lines = zip(*evidence, strict=True)
    key = f"{kind}-{digest(question)}"
    return Question(
        key=key, kind=kind, question=question, answers=list(answers), pages=list(pages), evidence=list(lines)
    )


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def is_even(text: str) -> bool:
    """By its digest: one of two ways to ask."""
    return int(digest(text), 16) % 2 == 0


def is_recent(version: str) -> bool:
    return tuple(map(int, version.split("."))) >= FIRST_VERSION


# --- Python


def added(source: Source) -> Iterator[Question]:
    yield from _versions(source, "added", r"^New in version ([\d.]+)\.$", "In which version of Python was {} added?")


def deprecated(source: Source) -> Iterator[Question]:
    pattern = (  # the whole of it, not one of its parameters or uses
        r"^Deprecated since version (3[\d.]*\d)(?:, will be removed in version [\d.]+)?"
        r"(?:\.$|: (?:Use |Please use |This (?:function|method|class|attribute|constant|exception|interface) is ))"
    )
    yield from _versions(source, "deprecated", pattern, "Since which version of Python is {} deprecated?")


def stable_abi(source: Source) -> Iterator[Question]:
    pattern = r"Part of the Stable ABI since version ([\d.]+)\."
    yield from _versions(source, "stable_abi", pattern, "Since which version of Python is {} part of the Stable ABI?")


def _versions(source: Source, kind: str, pattern: str, question: str) -> Iterator[Question]:
    for one in source.definitions:
        if len(found := one.matches(pattern)) == 1 and is_recent(found[0][1][1]):
            [(note, match)] = found
            yield ask(kind, question.format(f"`{one.name}`"), [match[1]], (one.page, one.heads[0]), (one.page, note))


def only_new(source: Source) -> Iterator[Question]:
    """The only definition of a module's page that came with a version."""
    mentions: Counter[tuple[str, str]] = Counter()
    for page, text in source.lines("python/library/.*"):
        mentions.update((page, version.rstrip(".")) for version in re.findall(r"New in version ([\d.]+)", text))
    modules = {page.name: match[1] for page in source.pages if (match := re.match(r"([\w.]+) — ", page.title))}
    for one in source.definitions:
        for note, match in one.matches(r"^New in version ([\d.]+)\.$"):
            module, version = modules.get(one.page), match[1]
            if module and mentions[one.page, version] == 1 and is_recent(version) and one.id.startswith(f"{module}."):
                question = (
                    f"The page of the module `{module}` marks a single function, class, method or attribute as new in "
                    f"version {version} of Python. Which?"
                )
                yield ask("only_new", question, one.names, (one.page, one.heads[0]), (one.page, note))


PARAMETER = re.compile(
    r"""^Changed\ in\ version\ (?P<version>[\d.]+):\ (?:
    Add(?:ed)?\ (?:the\ |an?\ )?(?:new\ |optional\ |keyword-only\ )*
      (?P<one>\w+)\ (?:keyword\ |optional\ )?(?:parameter|argument)\b |
    (?:The\ )?(?:new\ |optional\ )*
      (?P<two>\w+)\ (?:keyword-only\ |keyword\ |optional\ )?(?:parameter|argument)\ (?:was|has\ been)\ added
    )""",
    re.VERBOSE,
)


def parameter(source: Source) -> Iterator[Question]:
    """Which one came with a version, or in which version it came."""
    for one in source.definitions:
        found = [match for _, match in one.matches(PARAMETER)]
        if len(found) != 1 or not is_recent(version := found[0]["version"]):
            continue
        name, note = found[0]["one"] or found[0]["two"], found[0].string
        if not re.search(rf"\b{name}\b", one.heads[0]) or sum(f"version {version}:" in line for line in one.notes) > 1:
            continue
        if is_even(note + one.id):
            question, answer = f"Which parameter did `{one.name}` get in version {version} of Python?", name
        else:
            question, answer = f"In which version of Python did `{one.name}` get the parameter `{name}`?", version
        yield ask("parameter", question, [answer], (one.page, one.heads[0]), (one.page, note))


GUESSED = {
    "None",
    "True",
    "False",
    "''",
    "()",
    "[]",
    "{}",
    "...",
    "b''",
    "0.0",
    "1.0",
    "'utf-8'",
    "'strict'",
    "'r'",
    "'rb'",
}


def default(source: Source) -> Iterator[Question]:
    """Default values that nobody would guess. A name has a value of its own, which would be right too."""
    for one in source.definitions:
        defaults = defaults_of(one.heads[0]) if len(one.heads) == 1 else {}
        for name, value in defaults.items():
            is_telling = value not in GUESSED and not re.fullmatch(r"-?\d", value) and len(value) <= 40
            if is_telling and is_literal(value) and normal(value):  # no string of spaces
                question = f"What is the default value of the parameter `{name}` of `{one.name}`?"
                answers = dict.fromkeys([value, repr(ast.literal_eval(value))])  # 0o777 is 511
                yield ask("default", question, answers, (one.page, one.heads[0]))


def is_literal(value: str) -> bool:
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return False
    return True


def defaults_of(head: str) -> dict[str, str]:
    """Of a signature that is valid Python; of others none."""
    match = re.fullmatch(r"(?:class |classmethod |staticmethod |async |coroutine )*[\w.]+(\(.*\))(?: → .*)?", head)
    code = f"def f{match[1]}: pass" if match else ""
    try:
        arguments = next((statement.args for statement in ast.parse(code).body), None)
    except SyntaxError:
        arguments = None
    if arguments is None:
        return {}
    positional = [*arguments.posonlyargs, *arguments.args]
    given = positional[len(positional) - len(arguments.defaults) :]
    pairs = [
        *zip(given, arguments.defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    return {name.arg: ast.get_source_segment(code, value) or "" for name, value in pairs if value is not None}


def described(source: Source) -> Iterator[Question]:
    """Whose description begins so, where nothing else's does and its name is not in it."""
    begins: dict[str, list[Definition]] = defaultdict(list)
    for one in source.definitions:
        if one.notes and one.page.startswith("python/library/"):
            begins[re.split(r"(?<=[a-z)]\.) ", one.notes[0])[0]].append(one)
    for sentence, found in begins.items():
        [one, *others] = found
        says_it = any(part.casefold() in sentence.casefold() for part in re.findall(r"[^\W_]{4,}", one.names[-1]))
        if not others and len(one.heads) == 1 and not says_it and 70 <= len(sentence) <= 250 and sentence[-1] == ".":
            question = f"The description of which function, class, method or attribute of Python begins: “{sentence}”"
            yield ask("described", question, one.names, (one.page, one.heads[0]), (one.page, sentence))


def audit_event(source: Source) -> Iterator[Question]:
    """What is raised with it: two arguments or more."""
    raised: dict[str, set[tuple[str, str, str]]] = defaultdict(set)
    for page, text in source.lines("python/(library|c-api)/.*"):
        for match in re.finditer(r"Raises an auditing event (\S+) with arguments (\w+(?:, \w+)+)\.", text):
            raised[match[1]].add((match[2], page, match[0]))
    for event, found in raised.items():
        if len({arguments for arguments, _, _ in found}) == 1:
            arguments, page, note = min(found)
            question = f"With which arguments, in their order, does Python raise the auditing event `{event}`?"
            yield ask("audit_event", question, [arguments], (page, note))


def pep(source: Source) -> Iterator[Question]:
    """By the title of its section in What's New."""
    numbers: dict[str, set[tuple[str, str, str]]] = defaultdict(set)
    for page, text in source.lines("python/whatsnew/.*"):
        if match := re.fullmatch(r"#+ PEP (\d+)(?:: | – | - )(.+)", text):
            numbers[match[2]].add((match[1], page, text))
    for title, found in numbers.items():
        number, page, text = min(found)
        if len({number for number, _, _ in found}) == 1 and "PEP" not in title:
            question = f"A section of What's New in Python is about the PEP “{title}”. Which number has that PEP?"
            yield ask("pep", question, [number], (page, text))


# --- SQLite


def result_code(source: Source) -> Iterator[Question]:
    """Extended ones: the others are known."""
    for page, text in source.lines("sqlite/rescode"):
        if (match := re.fullmatch(r"#+ \((\d+)\) (SQLITE_\w+)", text)) and int(match[1]) > 255:
            if is_even(text):
                yield ask(
                    "result_code", f"Which result code of SQLite has the number {match[1]}?", [match[2]], (page, text)
                )
            else:
                yield ask("result_code", f"Which number has SQLite's result code {match[2]}?", [match[1]], (page, text))


def header_field(source: Source) -> Iterator[Question]:
    """Of a database; the headers of journals come after it."""
    lines = source.lines("sqlite/fileformat2")
    for page, text in takewhile(lambda line: "Magic Header String" not in line[1], lines):
        if match := re.match(r"(\d\d) \| \d+ \| ([^.]{12,}\.)", text):
            question = f"At which byte of the header of an SQLite database file begins this field: “{match[2]}”"
            yield ask("header_field", question, [match[1]], (page, text))


def opcode(source: Source) -> Iterator[Question]:
    for page, text in source.lines("sqlite/opcode"):
        match = re.match(r"(\w+) \| (.{40,200}?\.)(?: |$)", text)
        if match and match[1].casefold() not in match[2].casefold():
            question = f"The description of which opcode of SQLite's bytecode engine begins: “{match[2]}”"
            yield ask("opcode", question, [match[1]], (page, match[0].strip()))


LIMIT = re.compile(
    r"default (?:setting|value) for (?P<one>SQLITE_\w+) is (?P<a>\d[\d,]*)\b|"
    r"(?P<two>SQLITE_\w+),? (?:which defaults to|\(default value:) (?P<b>\d[\d,]*)\b(?! for)"
)


def limit(source: Source) -> Iterator[Question]:
    """Numbers that macros of SQLite stand for unless it is compiled with others."""
    found: dict[str, set[tuple[str, str, str]]] = defaultdict(set)
    option = ""
    for page, text in source.lines("sqlite/[a-z0-9]+"):
        if page == "sqlite/compile" and (match := re.fullmatch(r"([A-Z]\w+)(=.*)?", text)):
            option = match[1]
        elif page == "sqlite/compile" and (
            match := re.search(r"[Dd]efault (?:value|setting)(?: of N)? is (\d[\d,]*)", text)
        ):
            found[option].add((match[1].strip(","), page, text))
        for match in LIMIT.finditer(text):
            found[match["one"] or match["two"]].add(((match["a"] or match["b"]).strip(","), page, match[0]))
    for name, values in found.items():
        number, page, text = min(values)
        if name and len({value for value, _, _ in values}) == 1 and len(number) > 1:
            question = f"Which value has the compile-time option {name} of SQLite by default?"
            yield ask("limit", question, [number], (page, text))


def constant(source: Source) -> Iterator[Question]:
    """Of the C interface, with a value that is no small number. Result codes are a kind of their own."""
    values: dict[str, set[tuple[int, str, str]]] = defaultdict(set)
    for page, text in source.lines("sqlite/(c3ref|session)/(?!c_abort).*"):
        if match := re.match(r"#define (SQLITE\w+)\s+(0x[0-9a-fA-F]+|\d+)\b(?! *[|<])", text):
            values[match[1]].add((int(match[2], 0), page, text))
    for name, found in values.items():
        if len({value for value, _, _ in found}) == 1 and (value := min(found)[0]) > 4:
            _, page, text = min(found)
            question = f"What is the value of the constant {name} of SQLite's C interface?"
            yield ask("constant", question, [str(value), hex(value)], (page, text))


def release_day(source: Source) -> Iterator[Question]:
    for version, (day, page, text) in releases(source).items():
        if is_even(text):
            yield ask("release_day", f"On which day (YYYY-MM-DD) was SQLite {version} released?", [day], (page, text))
        else:
            yield ask("release_day", f"Which version of SQLite was released on {day}?", [version], (page, text))


def days_between(source: Source) -> Iterator[Question]:
    """Two pages and a subtraction."""
    found = sorted(releases(source).items(), key=lambda release: release[1])
    for split in (False, True):
        for (one, (first, *where)), (other, (second, *there)) in pairwise(
            release for release in found if is_held_out(release[1][1]) == split
        ):
            days = (date.fromisoformat(second) - date.fromisoformat(first)).days
            question = f"How many days after SQLite {one} was SQLite {other} released?"
            if days > 9:
                yield ask("days_between", question, [str(days)], tuple(where), tuple(there))


def release_note(source: Source) -> Iterator[Question]:
    """Which version's notes say so, where no other's do."""
    says: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for page, text in source.lines("sqlite/releaselog/.*"):
        if 60 <= len(text) <= 220 and text.startswith("- ") and not re.search(r"\d\.\d|SHA|[0-9a-f]{16}", text):
            says[" ".join(re.findall(r"\w+", text.casefold()))].append((page, text))
    versions = {page: (version, heading) for version, (_, page, heading) in releases(source).items()}
    for [(page, text), *others] in says.values():
        if not others and page in versions:
            version, heading = versions[page]
            question = f"The notes on which release of SQLite say: “{text[2:]}”"
            yield ask("release_note", question, [version], (page, heading), (page, text))


def releases(source: Source) -> dict[str, tuple[str, str, str]]:
    """Day, page and heading by version; without days that have two releases."""
    found = {}
    for page, text in source.lines("sqlite/releaselog/.*"):
        if match := re.fullmatch(r"#+ SQLite Release ([\d.]+) On (\d{4}-\d\d-\d\d)", text):
            found[match[1]] = (match[2], page, text)
    days = Counter(day for day, _, _ in found.values())
    return {version: release for version, release in found.items() if days[release[0]] == 1}


# --- all


KINDS: list[Callable[[Source], Iterator[Question]]] = [
    added, deprecated, stable_abi, only_new, parameter, default, described, audit_event, pep,
    result_code, header_field, opcode, limit, constant, release_day, days_between, release_note,
]  # fmt: skip


def make_questions(pages: Iterable[Page]) -> list[Question]:
    """Chosen and ordered by hash, so the same for the same pages."""
    source = source_of(pages)
    drafts = [question for make in KINDS for question in make(source)]
    chosen: list[Question] = []
    asked_of, taken, used = Counter[str](), Counter[str](), set[tuple[str, ...]]()
    for question in sorted(sound(drafts), key=lambda question: digest(question.key)):
        fact = tuple(question.evidence)
        is_full = taken[question.kind] >= MOST_OF_A_KIND or any(
            asked_of[page] >= MOST_OF_A_PAGE for page in question.pages
        )
        if fact not in used and not is_full:
            used.add(fact)
            taken[question.kind] += 1
            asked_of.update(set(question.pages))
            chosen.append(question)
    return sorted(chosen, key=lambda question: question.key)


def source_of(pages: Iterable[Page]) -> Source:
    """Without definitions that are listed on two pages, or twice."""
    pages = list(pages)
    found = [one for page in pages if page.name.startswith("python/") for one in definitions_of(page)]
    times = Counter(one.id for one in found)
    return Source(pages, [one for one in found if times[one.id] == 1 and one.heads])


def sound(drafts: Iterable[Question]) -> Iterator[Question]:
    """Those with one right answer that the question does not give away, and all pages in one split."""
    by_text: dict[str, list[Question]] = defaultdict(list)
    for question in drafts:
        by_text[question.question].append(question)
    for text, (question, *others) in by_text.items():
        gives_away = any(is_right(word, question.answers) for word in re.findall(r"[\w.]+", text))
        if not others and not gives_away and len({is_held_out(page) for page in question.pages}) == 1:
            yield question


def main() -> int:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m palestra_doc_search.make_questions OUT.jsonl")
    folders = installed_folders()
    questions = make_questions(page for source in sorted(folders) for page in read_pages(source, folders[source]))
    Path(sys.argv[1]).write_bytes(written(questions))
    print(f"{len(questions)} questions: {dict(Counter(question.kind for question in questions))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
