"""Errors over HTTP: `{"error": {"kind": ..., "message": ...}}` with a status, and the same error on the other side."""

import json
import os
from collections.abc import Mapping
from typing import Any

import msgspec

from palestra.core.errors import DeadlineError, PalestraError, UserError
from palestra.sandbox.admission import RefusedError
from palestra.sandbox.records import (
    SandboxError,
    SandboxFullError,
    SandboxGoneError,
    SandboxStartError,
    SandboxUnreachableError,
    UnsupportedError,
)


class TokenError(UserError):
    """No tenant has this token."""


class UnknownError(SandboxGoneError):
    """There is no such sandbox, or it is another tenant's: who asks is not told which."""


class ConflictError(UserError):
    """An idempotency key that was used for something else."""


class TooLongError(ValueError):
    """A body above the limit."""


_KINDS: dict[str, tuple[int, type[Exception], type[Exception]]] = {
    "token": (401, TokenError, UserError),
    "not_found": (404, UnknownError, SandboxGoneError),
    "conflict": (409, ConflictError, UserError),
    "gone": (410, SandboxGoneError, SandboxGoneError),
    "too_large": (413, TooLongError, ValueError),
    "full": (429, SandboxFullError, SandboxFullError),
    "draining": (503, SandboxUnreachableError, SandboxUnreachableError),
    "start": (503, SandboxStartError, SandboxStartError),
    "unsupported": (501, UnsupportedError, UnsupportedError),
    "deadline": (504, DeadlineError, SandboxError),
    "input": (400, UserError, UserError),
    "value": (400, ValueError, ValueError),
    "os": (400, OSError, OSError),
    "failed": (500, PalestraError, SandboxError),
}
"""Status, what it is on the side of the service, and on that of whoever asked; the first that fits is taken."""
_OS_STATUS = {"FileNotFoundError": 404, "PermissionError": 403}


def told(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of an answer. Errors: `error` itself, where it is none that was foreseen."""
    for kind, (status, ours, _) in _KINDS.items():
        if isinstance(error, ours):
            about: dict[str, Any] = {"kind": kind, "message": str(error)}
            if isinstance(error, OSError):
                about["errno"] = error.errno
                status = _OS_STATUS.get(type(error).__name__, status)
            return status, {"error": about}, _headers(kind, error)
    raise error


def _headers(kind: str, error: Exception) -> dict[str, str]:
    if kind == "token":
        return {"WWW-Authenticate": "Bearer"}
    if kind in ("full", "draining"):
        after_s = error.after_s if isinstance(error, RefusedError) else 1.0
        return {"Retry-After": str(max(round(after_s), 1))}
    return {}


def heard(status: int, body: bytes, where: str) -> Exception:
    """The error that an answer tells. A server that speaks otherwise is one that cannot be reached."""
    try:
        about = msgspec.json.decode(body)["error"]
        return error_of(about)
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError):
        said = body[:200].decode("utf-8", "replace")
        return SandboxUnreachableError(f"{where} answered {status}, which is none of a sandbox service: {said!r}")


def error_of(about: Mapping[str, Any]) -> Exception:
    """Errors: KeyError, for a kind that there is not."""
    kind, message = about["kind"], str(about["message"])
    if kind == "os" and about.get("errno"):
        return OSError(int(about["errno"]), _without_number(message))
    return _KINDS[kind][2](message)


def _without_number(message: str) -> str:
    """What the system says of an error begins with its number, and would do so twice."""
    return message.partition("] ")[2] if message.startswith("[Errno ") else message


def as_answer(error: Exception) -> dict[str, Any]:
    """Of the sandbox's own files and programs: as its agent tells it, in a frame."""
    if isinstance(error, OSError):
        return {"error": "os", "errno": error.errno, "message": error.strerror or os.strerror(error.errno or 0)}
    return {"error": "value", "message": str(error)}


def encoded(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body).encode()
