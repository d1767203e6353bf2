"""`palestra serve sandbox` and `palestra sandbox run`: programs in sandboxes, of others by HTTP, or of a file."""

import asyncio
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from palestra.core.errors import UserError
from palestra.launch.outcome import FAILURE
from palestra.launch.ports import require_free

_TIMED_OUT, _SIGNALLED = 124, 128  # as the shell and `timeout` say it
_KILLED = 9


def serve(backend: str | None, settings: dict[str, Any]) -> None:
    """Until it is told to end. Errors: UserError, for a port, a file or a number that cannot work."""
    from palestra.sandbox.host import Options
    from palestra.sandbox.service import Settings
    from palestra.sandbox.service import serve as serve_until_told

    wished = Settings(**{name: value for name, value in settings.items() if value is not None})
    for name in ("most", "running", "starting", "most_memory_mb", "most_waiting", "most_body_mb"):
        if (value := getattr(wished, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}={value} must be at least 1")
    for name in ("wait_s", "most_lifetime_s", "most_program_s", "drain_s"):
        if not getattr(wished, name) > 0:
            raise UserError(f"--{name.replace('_', '-')}={getattr(wished, name):g} must be above 0")
    if backend is not None and "://" in backend:
        raise UserError(f"--backend={backend} is a service already; name what runs sandboxes here, or leave it out")
    if wished.port:
        require_free(wished.host, wished.port, field="--port")
    serve_until_told(wished, Options(backend=backend))


def print_token(name: str) -> None:
    """A fresh one, and its lines for the file of tenants: the token is nowhere else."""
    from palestra.sandbox.tenants import lines_for

    token, lines = lines_for(name)
    print(f"give {name} this token, which is not kept: {token}", file=sys.stderr)
    print(lines, end="")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A program to run: `stdin` is a file, or None for nothing to read."""

    file: Path
    backend: str | None = None
    timeout_s: float = 10.0
    memory_mb: int = 512
    stdin: Path | None = None


def run(wish: Wish, *, as_json: bool) -> int:
    """The program's exit code; 128 and its signal; 124, if its time was over. Errors: UserError, SandboxError."""
    return asyncio.run(_run(wish, as_json))


async def _run(wish: Wish, as_json: bool) -> int:
    from palestra.sandbox.host import Options, close_hosts, host_of
    from palestra.sandbox.records import Limits

    if not wish.timeout_s > 0:
        raise UserError(f"--timeout-s={wish.timeout_s:g} must be above 0")
    code = _read(wish.file, "FILE")
    stdin = _read(wish.stdin, "--stdin") if wish.stdin else b""
    limits = Limits(memory_mb=wish.memory_mb)
    try:
        host = await host_of(Options(backend=wish.backend))
        backend = host.backend
        walls = f"{backend.isolation.name.lower()} ({', '.join(backend.layers)})"
        print(f"sandbox: {backend.name}, {walls}", file=sys.stderr, flush=True)
        end = await host.run_code(
            code, stdin=stdin, timeout_s=wish.timeout_s, limits=limits, on_output=None if as_json else _show
        )
    finally:
        await close_hosts()
    if as_json:
        print(msgspec.json.encode({**msgspec.to_builtins(end), "status": end.status}).decode())
    if end.timed_out:
        print(f"killed: its time of {wish.timeout_s:g} s was over", file=sys.stderr)
        return _TIMED_OUT
    if end.oom:
        print(f"killed: it took more memory than {wish.memory_mb} MB", file=sys.stderr)
    if end.exit_code is None:
        return _SIGNALLED + (end.signal or _KILLED)
    return end.exit_code or (FAILURE if end.oom else 0)


def _show(name: str, piece: bytes) -> None:
    """Bytes as they are, through whatever else prints."""
    stream = sys.stdout if name == "stdout" else sys.stderr
    stream.flush()
    view = memoryview(piece)
    while view:
        view = view[os.write(stream.fileno(), view) :]


def _read(path: Path, field: str) -> bytes:
    """Errors: UserError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{field}={path} cannot be read: {error.strerror}") from error
