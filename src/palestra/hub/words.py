"""How pages say numbers, times and what a rollout holds."""

import json
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode

from palestra.hub.reading import calls_of, text_of

_DATA_IMAGES = ("data:image/png;", "data:image/jpeg;", "data:image/gif;", "data:image/webp;")


def number(value: Any) -> str:
    """At most four digits that count, thousands apart."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def fixed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def duration(seconds: float | None) -> str:
    """`4.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def when(time: float | None) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M") if time else "–"


def iso(time: float | None) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds") if time else ""


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def images_of(content: Any) -> list[str]:
    """Pictures that a message holds itself, of kinds that hold no program; nothing is fetched from elsewhere."""
    found = []
    for part in content if isinstance(content, list) else ():
        place = part.get("image_url") if isinstance(part, dict) else None
        url = place.get("url") if isinstance(place, dict) else None
        if isinstance(url, str) and url.startswith(_DATA_IMAGES):
            found.append(url)
    return found


def pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def segment(text: Any) -> str:
    """For a part of an address."""
    return quote(str(text), safe="")


def address(base: str, query: Any, **changes: Any) -> str:
    """`base` with the query as it was asked, and what changes; what says nothing is left out."""
    given = {} if query is None else query.model_dump(exclude_defaults=True)
    kept = {name: value for name, value in (given | changes).items() if value not in ("", None)}
    return f"{base}?{urlencode(kept)}" if kept else base


FILTERS = {
    "number": number,
    "fixed": fixed,
    "duration": duration,
    "when": when,
    "iso": iso,
    "percent": percent,
    "text_of": text_of,
    "calls_of": calls_of,
    "images_of": images_of,
    "pretty": pretty,
    "segment": segment,
}
GLOBALS = {"address": address, "str": str, "len": len, "zip": zip}
