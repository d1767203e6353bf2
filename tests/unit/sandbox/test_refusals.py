"""Errors over HTTP: what is raised on one side is raised on the other."""

import errno

import pytest

from palestra.core.errors import DeadlineError, InfrastructureError, UserError
from palestra.sandbox import refusals
from palestra.sandbox.admission import RefusedError
from palestra.sandbox.records import (
    SandboxError,
    SandboxFullError,
    SandboxGoneError,
    SandboxStartError,
    SandboxUnreachableError,
    UnsupportedError,
)


@pytest.mark.parametrize(
    ("error", "status", "heard_as"),
    [
        (refusals.TokenError("x"), 401, UserError),
        (refusals.UnknownError("x"), 404, SandboxGoneError),
        (refusals.ConflictError("x"), 409, UserError),
        (SandboxGoneError("x"), 410, SandboxGoneError),
        (refusals.TooLongError("x"), 413, ValueError),
        (RefusedError("full", "x"), 429, SandboxFullError),
        (SandboxUnreachableError("x"), 503, SandboxUnreachableError),
        (SandboxStartError("x"), 503, SandboxStartError),
        (UnsupportedError("x"), 501, UnsupportedError),
        (DeadlineError("x", 1), 504, SandboxError),
        (UserError("x"), 400, UserError),
        (ValueError("x"), 400, ValueError),
        (InfrastructureError("x"), 500, SandboxError),
    ],
)
def test_every_error_has_a_status_and_comes_out_as_what_it_is(error: Exception, status: int, heard_as: type):
    told, body, _ = refusals.told(error)
    assert told == status
    heard = refusals.heard(told, refusals.encoded(body), "http://x")
    assert type(heard) is heard_as
    assert str(heard) == str(error)


@pytest.mark.parametrize(
    ("number", "status", "kind"),
    [(errno.ENOENT, 404, FileNotFoundError), (errno.EACCES, 403, PermissionError), (errno.EPIPE, 400, BrokenPipeError)],
)
def test_an_error_of_files_keeps_its_number(number: int, status: int, kind: type[OSError]):
    told, body, _ = refusals.told(OSError(number, "no luck", "a"))
    heard = refusals.heard(told, refusals.encoded(body), "http://x")
    assert told == status
    assert type(heard) is kind
    assert str(heard) == f"[Errno {number}] no luck: 'a'"


def test_when_to_ask_again_is_told_where_it_helps():
    assert refusals.told(RefusedError("full", "x", after_s=7))[2] == {"Retry-After": "7"}
    assert refusals.told(UserError("x"))[2] == {}


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b'{"error": 3}', b'{"error": {"kind": "new", "message": ""}}'])
def test_who_speaks_otherwise_is_no_service(body: bytes):
    heard = refusals.heard(502, body, "http://x")
    assert type(heard) is SandboxUnreachableError
    assert "http://x answered 502" in str(heard)


def test_a_bug_is_not_taken_for_a_refusal():
    with pytest.raises(ZeroDivisionError):
        refusals.told(ZeroDivisionError())
