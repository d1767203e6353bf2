"""A program in the background, as its owner sees it; what answers is written here."""

import asyncio
from typing import Any

import pytest

from palestra.sandbox.box import Process


class Slow:
    """Says one word, then nothing until it is let go, then another, and ends."""

    def __init__(self):
        self.go, self._num_said = asyncio.Event(), 0

    async def call(self, header: dict[str, Any], body: bytes = b"", **_: Any) -> tuple[dict[str, Any], bytes]:
        if self._num_said == 1:
            await self.go.wait()
        said = [b"early ", b"late"][self._num_said]
        self._num_said += 1
        ended = {"status": "ok", "exit_code": 0, "stdout_bytes": 0} if self._num_said == 2 else None
        at = {"stdout": header["stdout"], "stderr": header["stderr"]}
        return {"stdout_bytes": len(said), **at, "ended": ended}, said


async def test_a_wait_in_vain_loses_no_output():
    connection = Slow()
    process = Process(connection, 1, 2)  # type: ignore[arg-type]
    with pytest.raises(TimeoutError):
        await process.wait(0.05)
    connection.go.set()
    assert (await process.wait(5)).stdout == "early late"
