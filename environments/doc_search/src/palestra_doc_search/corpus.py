"""The pages in SQLite, with an index of their passages in FTS5, made once and kept."""

import difflib
import fcntl
import hashlib
import os
import re
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from palestra.core.errors import UserError
from palestra_doc_search.pages import Page, html_files, read_pages

FORMAT = 1  # of the index; raise it when pages are read or kept in another way
PASSAGE_CHARS = 1500
DEBIAN = {"python": ("python3-doc", "python3*/html"), "sqlite": ("sqlite3-doc", "sqlite3*")}  # package, where it is
DOCS = Path("/usr/share/doc")

SCHEMA = """
CREATE TABLE passages(id INTEGER PRIMARY KEY, page TEXT, line INTEGER, title TEXT, section TEXT, text TEXT);
CREATE VIRTUAL TABLE words USING fts5(
  page UNINDEXED, line UNINDEXED, title, section, text,
  content=passages, content_rowid=id, tokenize="porter unicode61 tokenchars '_'"
);
CREATE TABLE common(word TEXT);
"""
INDEX = """
CREATE INDEX pages ON passages(page, line);
INSERT INTO words(words) VALUES ('rebuild');
INSERT INTO words(words, rank) VALUES ('rank', 'bm25(0.0, 0.0, 3.0, 5.0, 1.0)');
"""
SEARCH = """
SELECT page, line, title, section, snippet(words, 4, '', '', ' ... ', 24) FROM words
WHERE words MATCH ? ORDER BY rank LIMIT ?
"""
WORD = re.compile(r"\w+")
COMMON_FROM = 1500  # passages that have a word; it says little then, and costs much
SAMPLED = 10  # one passage in so many is looked at for common words
MOST_WORDS = 32  # of a query; the rest is not looked for


@dataclass(frozen=True)
class Hit:
    """A passage: its page, and the line it begins at, from 1."""

    page: str
    line: int
    title: str
    section: str
    snippet: str


@dataclass(frozen=True)
class Window:
    """Lines `first` to `last` of `num_lines`, from 1."""

    page: str
    title: str
    first: int
    last: int
    num_lines: int
    text: str


class Corpus:
    """Reads an index. One connection, which any thread may use."""

    def __init__(self, file: Path):
        self.file = file

    @cached_property
    def _database(self) -> sqlite3.Connection:
        return sqlite3.connect(f"file:{self.file}?mode=ro&immutable=1", uri=True, check_same_thread=False)

    @cached_property
    def common(self) -> frozenset[str]:
        """Words that very many passages have."""
        return frozenset(word for (word,) in self._database.execute("SELECT word FROM common"))

    def search(self, query: str, at_most: int) -> list[Hit]:
        """Passages that have a word of the query, best first. Errors: ValueError, if it has none."""
        return [Hit(*row) for row in self._database.execute(SEARCH, (as_match(query, self.common), at_most))]

    def window(self, page: str, line: int, most_chars: int) -> Window:
        """From `line` on, as many lines as fit, but one at least. Errors: LookupError, saying what there is."""
        title, lines = self._read(page)
        if not 1 <= line <= len(lines):
            raise LookupError(f"{page} has lines 1 to {len(lines)}; there is no line {line}")
        shown, room = [], most_chars
        for text in lines[line - 1 :]:
            room -= len(text) + 1
            if shown and room < 0:
                break
            shown.append(text)
        return Window(page, title, line, line + len(shown) - 1, len(lines), "\n".join(shown))

    def holds(self, page: str, text: str) -> bool:
        """Whether one of its lines is, or has in it, this text."""
        rows = self._database.execute("SELECT 1 FROM passages WHERE page = ? AND instr(text, ?) LIMIT 1", (page, text))
        return rows.fetchone() is not None

    def names(self) -> list[str]:
        return [name for (name,) in self._database.execute("SELECT DISTINCT page FROM passages ORDER BY page")]

    def _read(self, page: str) -> tuple[str, list[str]]:
        found = self._database.execute("SELECT title, text FROM passages WHERE page = ? ORDER BY line", (page,))
        if not (passages := found.fetchall()):
            close = difflib.get_close_matches(page[:100], self.names(), n=3, cutoff=0.5)
            hint = f"close to it: {', '.join(close)}" if close else "search gives the names of pages"
            raise LookupError(f"there is no page {page[:100]!r}; {hint}")
        return passages[0][0], [line for _, text in passages for line in text.split("\n")]


def as_match(query: str, common: Collection[str] = ()) -> str:
    """Any of its words, each quoted: nothing that is typed is syntax. The common ones only where it has no others.

    Errors: ValueError, if there is no word.
    """
    words = list(dict.fromkeys(WORD.findall(query.lower())))
    if not words:
        raise ValueError(f"the query {query[:100]!r} has no word in it")
    telling = [word for word in words if word not in common] or words
    return " OR ".join(f'"{word}"' for word in telling[:MOST_WORDS])


# --- making it


def installed_folders() -> dict[str, Path]:
    """Where Debian keeps the pages, by source. Errors: UserError, with the command that installs what is missing."""
    found = {source: _folder(place) for source, (_, place) in DEBIAN.items()}
    if missing := [DEBIAN[source][0] for source, folder in found.items() if folder is None]:
        raise UserError(
            f"doc-search reads pages of {' and '.join(missing)}, which {DOCS} does not have; install with: "
            f"apt-get install -y --no-install-recommends {' '.join(missing)}"
        )
    return {source: folder for source, folder in found.items() if folder is not None}


def _folder(place: str) -> Path | None:
    places = {place.resolve() for place in DOCS.glob(place) if (place / "index.html").is_file()}
    return max(places, default=None)


def open_corpus(folders: Mapping[str, Path]) -> Corpus:
    """The index of these folders' pages, made at the first call of all: other processes wait for it."""
    file = cache() / f"{version(folders)}.sqlite3"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                build(folders, file)
    return Corpus(file)


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "palestra" / "doc-search"


def version(folders: Mapping[str, Path]) -> str:
    """Of the pages as they lie there: their names and sizes."""
    told = [f"{FORMAT} {sqlite3.sqlite_version}"]
    for source, folder in sorted(folders.items()):
        if not folder.is_dir():
            raise UserError(f"doc-search: there is no folder {folder} with the pages of {source!r}")
        told += [f"{source} {file.relative_to(folder)} {file.stat().st_size}" for file in html_files(folder)]
    return hashlib.blake2b("\n".join(told).encode(), digest_size=8).hexdigest()


def build(folders: Mapping[str, Path], file: Path) -> None:
    """Write the index beside `file` and rename it, so that nobody sees a part of it."""
    handle, beside = tempfile.mkstemp(dir=file.parent, prefix=".building-")
    os.close(handle)
    try:
        with closing(sqlite3.connect(beside)) as database:
            database.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {SCHEMA}")
            for source, folder in sorted(folders.items()):
                for page in read_pages(source, folder):
                    rows = ((page.name, line, page.title, section, text) for line, section, text in passages(page))
                    database.executemany("INSERT INTO passages VALUES (NULL, ?, ?, ?, ?, ?)", rows)
            database.commit()
            database.executescript(INDEX)
            database.executemany("INSERT INTO common VALUES (?)", ((word,) for word in common_words(database)))
            database.commit()
        os.replace(beside, file)
    finally:
        Path(beside).unlink(missing_ok=True)


def common_words(database: sqlite3.Connection) -> list[str]:
    times: Counter[str] = Counter()
    for (text,) in database.execute("SELECT text FROM passages WHERE id % ? = 0", (SAMPLED,)):
        times.update(set(WORD.findall(text.lower())))
    return sorted(word for word, count in times.items() if count * SAMPLED >= COMMON_FROM)


def passages(page: Page) -> Iterator[tuple[int, str, str]]:
    """First line from 1, section and text; together they are the page. Each begins at a heading, or is full."""
    first, section, taken, size = 1, "", list[str](), 0
    for number, line in enumerate(page.lines, 1):
        if taken and (line.opens or size + len(line.text) > PASSAGE_CHARS):
            yield first, section, "\n".join(taken)
            first, taken, size = number, [], 0
        if line.opens:
            section = line.text.lstrip("# ")
        taken.append(line.text)
        size += len(line.text)
    if taken:
        yield first, section, "\n".join(taken)
