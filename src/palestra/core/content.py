"""The content of a chat message: a text, or parts, each a text or an image, as OpenAI's chat completions have them.

A part is `{"type": "text", "text": ...}` or `{"type": "image_url", "image_url": {"url": ...}}`; an image's address is a
data URL, which holds its bytes, or points to where others find it.
"""

import re
from collections.abc import Sequence
from typing import Any

Part = dict[str, Any]
Content = str | list[Part]

_MEDIA = {"image_url", "image", "input_image"}
_DATA = re.compile(r"data:([^;,]*);base64,")


def text_part(text: str) -> Part:
    return {"type": "text", "text": text}


def is_part(value: Any) -> bool:
    """Whether it is a text or an image as messages hold it."""
    if not isinstance(value, dict):
        return False
    return is_image(value) or (value.get("type") == "text" and isinstance(value.get("text"), str))


def is_image(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("type") != "image_url":
        return False
    return isinstance(place := value.get("image_url"), dict) and isinstance(place.get("url"), str)


def as_parts(content: Any) -> list[Part]:
    """Of a text, one; of none, none."""
    return [text_part(content)] if isinstance(content, str) and content else list(content or ())


def as_content(given: Sequence[str | Part]) -> Content:
    """Texts alone are one text, a line each: so a template without parts shows them too. With an image, parts."""
    parts = [text_part(one) if isinstance(one, str) else one for one in given]
    if all(part.get("type") == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def images_in(content: Any) -> list[Part]:
    """Its parts that are an image, in whatever way they say so."""
    if not isinstance(content, list):
        return []
    return [part for part in content if isinstance(part, dict) and part.get("type") in _MEDIA]


def num_image_bytes(image: Part) -> int:
    """Of the file that its data URL holds; 0, if others have it."""
    url = _url(image)
    if (data := _DATA.match(url)) is None:
        return 0
    return (len(url) - data.end()) * 3 // 4 - url[-2:].count("=")


def described(image: Part) -> str:
    """For errors, which must not hold megabytes."""
    url = _url(image)
    data = _DATA.match(url)
    if data is not None:
        return f"{data[1]} of {num_image_bytes(image):,} bytes"
    return f"at {url[:100]!r}" if url else f"of type {image.get('type')!r}"


def _url(image: Part) -> str:
    """ "", if it is none of those that a part of ours has."""
    place = image.get("image_url")
    url = place.get("url") if isinstance(place, dict) else place
    return url if isinstance(url, str) else ""
