"""Logs as lines of JSON. What looks like a token is struck out of every line, wherever it came from."""

import json
import logging
import re
import sys
import time
import traceback
from typing import Any

ACCESS = "palestra.hub.access"
_SECRETS = (
    re.compile(r"palestra_[0-9a-f]{12}[A-Za-z0-9_-]*"),
    re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/=._~-]{6,}"),
    re.compile(r"(?<=//)[^/@\s\"]+:[^/@\s\"]+(?=@)"),  # user and password in a URL
)


def redacted(text: str) -> str:
    for secret in _SECRETS:
        text = secret.sub("[redacted]", text)
    return text


class JsonLines(logging.Formatter):
    """`time`, `level`, `logger` and `message`; and what was given as `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        row |= getattr(record, "fields", {})
        if record.exc_info:
            row["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return redacted(json.dumps(row, default=str, ensure_ascii=True))


def configuration() -> dict[str, Any]:
    """For logging.config and uvicorn: everything on stderr, one line each."""
    handler = {"class": "logging.StreamHandler", "formatter": "lines", "stream": "ext://sys.stderr"}
    quiet = {"handlers": ["lines"], "level": "WARNING", "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": f"{__name__}.{JsonLines.__name__}"}},
        "handlers": {"lines": handler},
        "loggers": {"uvicorn": quiet, "palestra.hub": quiet | {"level": "INFO"}},
    }


def log(message: str, /, **fields: Any) -> None:
    """An error, with its traceback, within `except`."""
    is_caught = sys.exc_info()[0] is not None
    level = logging.ERROR if is_caught else logging.INFO
    logging.getLogger("palestra.hub").log(level, message, exc_info=is_caught, extra={"fields": fields})
