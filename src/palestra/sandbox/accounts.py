"""What tenants used: lines of JSON that are only appended, and their sums.

A line is with the operating system before what it accounts for is answered, so `kill -9` loses nothing that was
answered; it is on the disk within a second, which is what a machine that loses power may lose. A sandbox is accounted
for at every beat: one that lives when the service is killed, up to the last of them. CPU time is that of programs that
ended: what is killed with its sandbox is in the seconds of the sandbox alone.

`usage-000001.jsonl` is followed by `usage-000002.jsonl` when it is long; each begins with the sums of those before, and
the newest alone is read at the start. Older ones are for whoever wants to keep them.
"""

import asyncio
import fcntl
import os
import sys
from pathlib import Path

import msgspec
from msgspec import Struct

from palestra.core.clock import unix_now
from palestra.core.errors import InfrastructureError, UserError
from palestra.core.files import AppendFile, write_atomically

_SYNC_S = 0.5
_MOST_BYTES = 2**26


class Usage(Struct, kw_only=True, omit_defaults=True):
    """What came to what was used before. Of a line, or summed. `programs`: how many, by how they ended."""

    sandboxes: int = 0
    sandbox_s: float = 0.0
    memory_mb_s: float = 0.0
    cpu_s: float = 0.0
    programs: dict[str, int] = {}

    def add(self, other: "Usage") -> None:
        self.sandboxes += other.sandboxes
        self.sandbox_s += other.sandbox_s
        self.memory_mb_s += other.memory_mb_s
        self.cpu_s += other.cpu_s
        for status, count in other.programs.items():
            self.programs[status] = self.programs.get(status, 0) + count


class _Line(Struct, kw_only=True, omit_defaults=True):
    at: float  # Unix time
    tenant: str
    used: Usage
    is_sum: bool = False
    sandbox: str = ""


class Accounts:
    """Without a directory, the sums end with the process. Errors of all that write: InfrastructureError."""

    def __init__(self, directory: Path | None = None, *, most_bytes: int = _MOST_BYTES):
        self.sums: dict[str, Usage] = {}
        self._directory, self._most_bytes, self._file = directory, most_bytes, None
        self._encode, self._dirty = msgspec.json.Encoder().encode, asyncio.Event()
        self._syncing: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Errors: UserError, if another service has the directory, or a line of it is not ours."""
        if self._directory is None:
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UserError(f"--data={self._directory} cannot be written: {error.strerror}; name another") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise UserError(f"--data={self._directory} is another service's, which runs; name another") from None
        try:
            self._file = self._continued(self._directory)
        except BaseException:
            os.close(self._lock)
            raise
        self._syncing = asyncio.get_running_loop().create_task(self._sync_always())

    def _continued(self, directory: Path) -> AppendFile:
        """The newest file, after all that it says; a last line that is torn was never answered for."""
        names = sorted(directory.glob("usage-*.jsonl"))
        path = names[-1] if names else directory / "usage-000001.jsonl"
        if names:
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(path, whole)
            for number, text in enumerate(data[:whole].splitlines(), 1):
                self._sum(_line(path, number, text))
        file = AppendFile(path)
        self._num_bytes = path.stat().st_size
        return file

    def add(self, tenant: str, used: Usage, *, sandbox: str = "") -> None:
        """It is written when this returns."""
        line = _Line(at=unix_now(), tenant=tenant, used=used, sandbox=sandbox)
        if self._file is not None:
            text = self._encode(line) + b"\n"
            self._file.append(text)
            self._num_bytes += len(text)
            self._dirty.set()
        self._sum(line)
        if self._file is not None and self._num_bytes > self._most_bytes:
            try:
                self._turn_over(self._file)
            except (OSError, InfrastructureError):
                pass  # it is written all the same; the next one tries again

    def _sum(self, line: _Line) -> None:
        self.sums.setdefault(line.tenant, Usage()).add(line.used)

    def _turn_over(self, old: AppendFile) -> None:
        """The next file is there as a whole, with the sums, before anything is added to it."""
        number = int(old.path.stem.rpartition("-")[2]) + 1
        now = unix_now()
        lines = [_Line(at=now, tenant=name, used=used, is_sum=True) for name, used in self.sums.items()]
        text = b"".join(self._encode(line) + b"\n" for line in lines)
        path = write_atomically(old.path.with_name(f"usage-{number:06}.jsonl"), text)
        self._file, self._num_bytes = AppendFile(path), 0
        old.close()

    def of(self, tenant: str) -> Usage:
        return self.sums.get(tenant) or Usage()

    async def _sync_always(self) -> None:
        while True:
            await self._dirty.wait()
            await asyncio.sleep(_SYNC_S)
            self._dirty.clear()
            try:
                if self._file is not None:
                    await asyncio.to_thread(_sync, self._file.path)
            except OSError as error:
                print(f"accounts are not synced to the disk, tried again later: {error}", file=sys.stderr, flush=True)
                self._dirty.set()

    def close(self) -> None:
        """With all on the disk."""
        if self._syncing is not None:
            self._syncing.cancel()
        if self._file is not None:
            _sync(self._file.path)
            self._file.close()
            self._file = None
            os.close(self._lock)


def _line(path: Path, number: int, text: bytes) -> _Line:
    try:
        return msgspec.json.decode(text, type=_Line)
    except msgspec.MsgspecError as error:
        raise UserError(f"{path}, line {number} is no account: {error}; take it out, or name another --data") from None


def _sync(path: Path) -> None:
    """Any descriptor of a file will do."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
