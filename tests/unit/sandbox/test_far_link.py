"""Calls to a sandbox of a provider: one that is cancelled leaves nothing that another could take for its own."""

import asyncio
import shlex

import pytest

from palestra.sandbox.backends.remote import FarLink


class Place:
    def __init__(self):
        self.answers: list[str] = []

    async def run(self, command: str, timeout_s: float) -> tuple[int, str]:
        self.answers.append(shlex.split(command)[7])
        await asyncio.sleep(3600)
        raise AssertionError

    async def write(self, path: str, content: bytes) -> None: ...


async def test_files_of_a_call_that_was_cancelled_are_no_others():
    place = Place()
    link = FarLink(place, "far", 1 << 20)  # type: ignore[arg-type]
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(link.call({"do": "ping"}), 0.05)
    assert len(set(place.answers)) == 3
