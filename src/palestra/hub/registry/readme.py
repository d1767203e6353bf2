"""A README as safe HTML: rendered without raw HTML, then cleaned to a short list of elements."""

from functools import lru_cache
from html import escape
from typing import Any

import nh3
from markdown_it import MarkdownIt

MAX_CHARACTERS = 200_000
_ALLOWED = {
    *(
        "a",
        "abbr",
        "blockquote",
        "br",
        "code",
        "dd",
        "del",
        "dl",
        "dt",
        "em",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "hr",
        "kbd",
    ),
    *("li", "ol", "p", "pre", "s", "strong", "sub", "sup", "table", "tbody", "td", "th", "thead", "tr", "ul"),
}
_MARKDOWN = ("text/markdown", "")


@lru_cache(maxsize=256)
def render(text: str, kind: str) -> str:
    """HTML that holds no program, no picture from elsewhere, and no link but to the web."""
    text = text[:MAX_CHARACTERS]
    html = _markdown().render(text) if kind in _MARKDOWN else f"<pre>{escape(text)}</pre>"
    return nh3.clean(
        html,
        tags=_ALLOWED,
        attributes={"a": {"href", "title"}, "ol": {"start"}},
        url_schemes={"http", "https", "mailto"},
        link_rel="nofollow noopener noreferrer",
        strip_comments=True,
    )


@lru_cache(maxsize=1)
def _markdown() -> MarkdownIt:
    found = MarkdownIt("commonmark", {"html": False, "maxNesting": 20}).enable(["table", "strikethrough"])
    found.add_render_rule("image", _image)
    for rule in ("heading_open", "heading_close"):
        found.add_render_rule(rule, _heading)
    return found


def _image(_renderer: Any, tokens: Any, at: int, _options: Any, _env: Any) -> str:
    """Pages load nothing from elsewhere: a picture is a link to it."""
    token = tokens[at]
    return f'<a href="{escape(str(token.attrGet("src") or ""))}">{escape(token.content or "picture")}</a>'


def _heading(_renderer: Any, tokens: Any, at: int, _options: Any, _env: Any) -> str:
    """One level lower: the page has a heading of its own."""
    token = tokens[at]
    level = min(6, int(token.tag[1]) + 1)
    return f"<h{level}>" if token.nesting == 1 else f"</h{level}>\n"
