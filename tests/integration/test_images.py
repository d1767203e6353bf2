"""`palestra eval` of an environment with images: the bytes that arrive, after a kill too, and what is kept of them."""

import base64
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from palestra.wire.results import read_results
from palestra.wire.rundir import RunDir
from tests.integration.endpoint import Endpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_TASKS = 3
GALLERY = '''
import hashlib
from pathlib import Path
from palestra.env import Environment, Task, image, reward

HEAD = b"\\x89PNG\\r\\n\\x1a\\n"

class Gallery(Environment):
    """Say the hashes of two pictures: the prompt's, and one that a tool gives."""

    def tasks(self):
        for number in range({num_tasks}):
            first, second = HEAD + bytes([number] * 300), HEAD + bytes(range(number, 256))
            told = " ".join(hashlib.sha256(one).hexdigest() for one in (first, second))
            yield Task(prompt=["What is this?", image(first)], answer=told, info={{"second": second.hex()}})

    async def run(self, task, agent):
        async def look() -> list:
            """Look closer."""
            return ["closer:", image(bytes.fromhex(task.info["second"]))]

        agent.tools = [look]
        await agent(task.prompt)

    @reward
    def right(self, task, rollout):
        return {worth} * (rollout.reply == task.answer)
'''


def images_of(body: dict, *roles: str) -> list[bytes]:
    """Of the user's messages of a request, decoded as a server does."""
    parts = [
        part for m in body["messages"] if m["role"] in roles and isinstance(m["content"], list) for part in m["content"]
    ]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    return [base64.b64decode(url.partition(",")[2], validate=True) for url in urls]


def looking(body: dict) -> dict:
    """A model that looks twice and says what it saw, byte by byte."""
    if body["messages"][-1]["role"] == "user" and len(body["messages"]) == 1:
        call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    seen = images_of(body, "user")
    return {"role": "assistant", "content": " ".join(hashlib.sha256(one).hexdigest() for one in seen)}


def blinking(body: dict) -> dict:
    """The same, but one bit of the last picture is another one on its way."""
    broken = json.loads(json.dumps(body))
    if len(body["messages"]) > 1:
        place = broken["messages"][-1]["content"][-1]["image_url"]
        data = bytearray(base64.b64decode(place["url"].partition(",")[2]))
        data[-1] ^= 1
        place["url"] = "data:image/png;base64," + base64.b64encode(bytes(data)).decode()
    return looking(broken)


def palestra(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "palestra.launch.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)


def evaluate(endpoint: Endpoint, cwd: Path) -> dict:
    (cwd / "gallery.py").write_text(GALLERY.format(num_tasks=NUM_TASKS, worth=1))
    at = ("--base-url", endpoint.url, "--model", "m", "-n", NUM_TASKS, "--output", "out", "--json")
    done = palestra("eval", "gallery.py:Gallery", *at, cwd=cwd)
    assert done.returncode == 0, done.stderr
    [found] = json.loads(done.stdout)["sets"].values()
    return found


def test_the_bytes_of_every_image_arrive_and_are_kept_and_an_interrupted_evaluation_sends_them_again(tmp_path):
    with Endpoint(speak=looking) as endpoint:
        assert evaluate(endpoint, tmp_path)["reward"]["mean"] == 1.0
        [first, second] = [[body for body in endpoint.asked if len(body["messages"]) == n] for n in (1, 4)]
        assert len(first) == len(second) == NUM_TASKS
        for body in second:
            assert [message["role"] for message in body["messages"]] == ["user", "assistant", "tool", "user"]
            assert body["messages"][2]["content"] == "closer:\n[image 1]"
        whole = (tmp_path / "out" / "results.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "out" / "results.jsonl").write_text("".join(whole[:1]) + whole[1][:500])
        endpoint.asked.clear()
        resumed = palestra("eval", "--resume", tmp_path / "out", cwd=tmp_path)
        assert resumed.returncode == 0, resumed.stderr
        assert len(endpoint.asked) == 2 * (NUM_TASKS - 1)
    [records] = read_results(RunDir(tmp_path / "out")).values()
    assert sorted(records) == list(range(NUM_TASKS))
    for record in records.values():
        assert record.reward == 1.0
        kept = images_of({"messages": record.messages}, "user", "tool")
        assert " ".join(hashlib.sha256(one).hexdigest() for one in kept) == record.task.answer
        assert record.messages[2]["content"][0] == {"type": "text", "text": "closer:"}
        assert record.task.prompt[1] == record.messages[0]["content"][1]

    (tmp_path / "gallery.py").write_text(GALLERY.format(num_tasks=NUM_TASKS, worth=0.5))
    again = palestra("replay", tmp_path / "out", "--rewards", "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    [row] = json.loads(again.stdout).values()
    assert (row["before"], row["after"], row["changed"]) == (1.0, 0.5, NUM_TASKS)


def test_one_bit_of_one_image_is_noticed(tmp_path):
    """The control of the test above: were it blind to the bytes, this would score too."""
    with Endpoint(speak=blinking) as endpoint:
        assert evaluate(endpoint, tmp_path)["reward"]["mean"] == 0.0
