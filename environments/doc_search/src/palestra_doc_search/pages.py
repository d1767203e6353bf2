"""HTML pages of documentation as lines of text."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

LONGEST_LINE = 1000  # characters; a longer paragraph is several lines
NO_PAGES = re.compile(  # lists of what others say, and other pages once more
    r"genindex|search$|contents$|py-modindex|_static|_sources|_crossref$|keyword_index$|requirements$|capi3ref$"
)


@dataclass(frozen=True, slots=True)
class Line:
    """`owner`: id of the definition whose own line it is; those of a list inside it are not. `opens`: it is a heading,
    or the head of a definition."""

    text: str
    owner: str = ""
    opens: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    name: str
    title: str
    lines: list[Line]


def read_pages(source: str, folder: Path) -> Iterator[Page]:
    """Every page under the folder, in the order of their names, which begin with `source`."""
    for file in html_files(folder):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if not NO_PAGES.search(name):
            page = read_page(f"{source}/{name}", file.read_text(encoding="utf-8", errors="replace"))
            if page.lines:
                yield page


def html_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.html"))


def read_page(name: str, html: str) -> Page:
    reader = _Reader()
    reader.feed(_INLINE.sub("", html))
    reader.close()
    reader.end_line()
    title = re.split(r" [—-] Python [\d.]+ documentation", " ".join(reader.title.split()))[0]
    return Page(name, title or name, reader.lines)


_INLINE = (
    re.compile(  # what the reader need not see, which is most of the tags: it takes a third of the time without them
        r'<a class="headerlink".*?</a>|</?(?:a|b|code|em|i|img|span|strong|sup|tt|u|var)\b[^>]*>',
        re.DOTALL | re.IGNORECASE,
    )
)
_BLOCKS = {
    "address", "article", "blockquote", "body", "br", "center", "dd", "details", "div", "dl", "dt",
    "fieldset", "figure", "form", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "main", "ol", "p", "pre",
    "section", "summary", "table", "tr", "ul",
}  # fmt: skip
_LISTS = {"dl", "ol", "ul"}
_HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
_IN_A_ROW = {"br", "div", "p"}  # do not end the line in a table: a row is a line
_SILENT = {"script", "style", "nav", "svg"}
_SILENT_CLASSES = {"related", "sphinxsidebar", "footer", "nosearch", "clearer"}  # of <div>


class _Reader(HTMLParser):
    """Follows the tags that Sphinx and SQLite's documentation use; what is not text of the page is left out."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.lines: list[Line] = []
        self.title = ""
        self._text: list[str] = []
        self._lead = ""  # of the line that is being read
        self._silent, self._depth = "", 0  # the element whose text is left out, and how many of its kind are open
        self._owners: list[str] = []  # a definition for each open list, "" where it is any other list
        self._opens = self._in_title = self._in_row = self._in_pre = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._silent:
            self._depth += tag == self._silent
            return
        classes = next((value or "" for key, value in attrs if key == "class"), "").split()
        if tag in _SILENT or (tag == "div" and not _SILENT_CLASSES.isdisjoint(classes)):
            self._silent, self._depth = tag, 1
        elif tag in ("td", "th"):
            self._text.append(" | " if self._text else "")
        elif tag in _BLOCKS:
            self._start_block(tag, classes, attrs)
        elif tag == "title":
            self._in_title = True

    def _start_block(self, tag: str, classes: list[str], attrs: list[tuple[str, str | None]]) -> None:
        if self._in_row and tag in _IN_A_ROW:
            self._text.append(" ")
            return
        self.end_line()
        if tag in _HEADINGS:
            self._opens, self._lead = True, "#" * int(tag[1]) + " "
        elif tag == "li":
            self._lead = "- "
        elif tag in _LISTS:
            self._owners.append("")
        elif tag == "dt" and "sig" in classes and self._owners:
            self._opens, self._owners[-1] = True, next((value or "" for key, value in attrs if key == "id"), "")
        self._in_row = tag == "tr" or (self._in_row and tag != "table")
        self._in_pre = tag == "pre" or self._in_pre

    def handle_endtag(self, tag: str) -> None:
        if self._silent:
            self._depth -= tag == self._silent
            self._silent = self._silent if self._depth else ""
        elif tag == "title":
            self._in_title = False
        elif tag in _BLOCKS and not (self._in_row and tag in _IN_A_ROW):
            self.end_line()
            self._in_row = self._in_row and tag not in ("tr", "table")
            self._in_pre = self._in_pre and tag != "pre"
            if tag in _LISTS and self._owners:
                self._owners.pop()

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
        elif not self._silent:
            self._text.append(data)

    def end_line(self) -> None:
        text, lead, opens = "".join(self._text), self._lead, self._opens
        found = [line.rstrip() for line in text.split("\n")] if self._in_pre else [" ".join(text.split())]
        owner = self._owners[-1] if self._owners else ""
        for line in found:
            if line.strip(" |"):
                self.lines += [Line(part, owner, opens) for part in cut(lead + line)]
                self._lead, self._opens, lead, opens = "", False, "", False
        self._text = []


def cut(line: str, longest: int = LONGEST_LINE) -> Iterator[str]:
    """Pieces that are no longer, broken between words if there are some."""
    while len(line) > longest:
        space = line.rfind(" ", longest // 2, longest)
        end = space if space > 0 else longest
        yield line[:end]
        line = line[end:].lstrip(" ")
    yield line
