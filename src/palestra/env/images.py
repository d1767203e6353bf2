"""Images in messages: how an author makes them, what a message may be made of, and how large it may become."""

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from palestra.core.content import Part, as_content, described, images_in, is_part, num_image_bytes
from palestra.core.errors import UserError

MOST_BYTES = 10 * 2**20  # of one image
MOST_TOGETHER = 48 * 2**20  # of all images of a conversation: every turn sends them again, and every record holds them

Message = str | dict[str, Any] | Sequence[str | dict[str, Any]]
"""A user's text; a user's texts and images; or chat messages."""

_KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF87a": "gif", b"GIF89a": "gif"}
_ADDRESSES = ("http://", "https://", "data:")


def image(source: str | Path | bytes) -> Part:
    """A part of a message that shows an image: a file, the bytes of one, or an address.

    The message holds the file's bytes exactly. An address on the web is only passed on: the model's server fetches it.
    Errors: UserError, if the file is not there, is none of PNG, JPEG, GIF and WebP, or is larger than MOST_BYTES.
    """
    if isinstance(source, str) and source.startswith(_ADDRESSES):
        part = {"type": "image_url", "image_url": {"url": source}}
    else:
        name, content = ("image", source) if isinstance(source, bytes) else (str(source), _read(Path(source)))
        data = base64.b64encode(content).decode()
        part = {"type": "image_url", "image_url": {"url": f"data:image/{_kind(name, content)};base64,{data}"}}
    require_small([part], "image(...)")
    return part


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"image({str(path)!r}) cannot be read: {error.strerror}; give a file, bytes, or a URL"
        ) from error


def _kind(name: str, content: bytes) -> str:
    for head, kind in _KINDS.items():
        if content.startswith(head):
            return kind
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    raise UserError(
        f"{name} ({len(content):,} bytes, which begin with {content[:8]!r}) is no PNG, JPEG, GIF or WebP; "
        "models see no other images: save it as one of these"
    )


def chat_messages(message: Message | None) -> list[dict[str, Any]]:
    """What `agent(message)` sends. Errors: UserError, if it is neither chat messages nor texts and images."""
    if message is None or isinstance(message, str):
        return [] if message is None else [{"role": "user", "content": message}]
    given = [message] if isinstance(message, dict) else list(message)
    if given and not any(isinstance(one, dict) and "role" in one for one in given):
        return [{"role": "user", "content": _content(given, "a user's message")}]
    return [_whole(number, one) for number, one in enumerate(given)]


def _whole(number: int, message: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(message, str) or "role" not in message:
        raise UserError(
            f"messages[{number}] is {_short(message)} beside chat messages; give it a role, such as "
            '{"role": "user", "content": [...]}'
        )
    content = message.get("content")
    return {**message, "content": _content(content, f"messages[{number}]")} if isinstance(content, list) else message


def _content(given: Sequence[Any], what: str) -> str | list[Part]:
    for position, one in enumerate(given):
        if not isinstance(one, str) and not is_part(one):
            raise UserError(
                f"{what}: part {position} is {_short(one)}; parts are texts, "
                'image(...), or {"type": "text" | "image_url", ...}'
            )
    return as_content(given)


def require_small(content: Any, what: str) -> None:
    """Errors: UserError naming the first image that is larger than MOST_BYTES."""
    for part in images_in(content):
        if num_image_bytes(part) > MOST_BYTES:
            raise UserError(
                f"{what} holds an image that is too large: {described(part)}, more than {MOST_BYTES:,}; "
                "scale it down, or save it as JPEG or WebP"
            )


def require_room(messages: Iterable[dict[str, Any]], what: str) -> None:
    """Errors: UserError, if an image, or all images together, are too large for a conversation."""
    total = 0
    for number, message in enumerate(messages):
        require_small(message.get("content"), f"{what}, messages[{number}] ({message.get('role')}),")
        total += sum(map(num_image_bytes, images_in(message.get("content"))))
    if total > MOST_TOGETHER:
        raise UserError(
            f"{what} holds images of {total:,} bytes together, more than {MOST_TOGETHER:,}; "
            "scale them down, send fewer, or cut the context by agent.compact(...)"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
