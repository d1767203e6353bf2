"""What is asked of the service in JSON. Errors of all: pydantic's ValidationError, which is a ValueError."""

import base64
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from palestra.sandbox.records import MOST_OUTPUT, Limits

MOST_OUTPUT_ASKED = 2**24
_Label = Annotated[str, Field(min_length=1, max_length=200)]
_Seconds = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
_Output = Annotated[int, Field(ge=0, le=MOST_OUTPUT_ASKED)]


def _bytes(given: Any) -> Any:
    """A text, or `{"base64": "..."}`."""
    if isinstance(given, dict) and set(given) == {"base64"}:
        return base64.b64decode(given["base64"], validate=True)
    if isinstance(given, str):
        return given.encode()
    raise ValueError('give a text, or {"base64": "..."}')


_Bytes = Annotated[bytes, BeforeValidator(_bytes)]


class _Asked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AskedLimits(_Asked):
    memory_mb: int = Limits().memory_mb
    disk_mb: int = Limits().disk_mb
    inodes: int = Limits().inodes
    processes: int = Limits().processes
    cpus: float | None = Field(default=None, allow_inf_nan=False)

    def limits(self) -> Limits:
        """Errors: UserError."""
        return Limits(
            memory_mb=self.memory_mb,
            disk_mb=self.disk_mb,
            inodes=self.inodes,
            processes=self.processes,
            cpus=self.cpus,
        )


class AskedSandbox(_Asked):
    limits: AskedLimits = AskedLimits()
    timeout_s: _Seconds = 3600.0
    labels: tuple[_Label, ...] = Field(default=(), max_length=32)
    egress: tuple[_Label, ...] = Field(default=(), max_length=256)


class AskedSandboxes(AskedSandbox):
    count: int = Field(ge=1, le=1024)


class AskedProgram(_Asked):
    """For people: the same as `Sandbox.exec`."""

    command: str | tuple[str, ...]
    cwd: str = ""
    env: dict[str, str] = {}
    stdin: _Bytes = b""
    timeout_s: _Seconds = 30.0
    max_output: _Output = MOST_OUTPUT


class AskedRun(_Asked):
    """The same as `Host.run_code`. `stream`: the answer is frames, of output as it comes, then of the result."""

    code: _Bytes
    stdin: _Bytes = b""
    files: dict[str, _Bytes] = {}
    timeout_s: _Seconds = 10.0
    limits: AskedLimits = AskedLimits()
    max_output: _Output = MOST_OUTPUT
    stream: bool = False


class AskedTimeout(_Asked):
    seconds: _Seconds


class AskedPort(_Asked):
    port: int = Field(ge=1, le=65_535)
