"""MCP servers as tools, by stdio and HTTP, with servers of the protocol's own package."""

import asyncio
import base64
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from palestra.core.errors import InfrastructureError
from palestra.core.records import Ending, Task
from palestra.env import Environment, mcp, reward
from palestra.env.play import score
from palestra.env.tools import ToolBox, as_tool_call

pytestmark = pytest.mark.slow

SERVER = Path(__file__).with_name("mcp_server.py")
COMMAND = [sys.executable, str(SERVER)]


async def said(tools, tool: str, /, **arguments):
    (message,) = await ToolBox(tools).answer([as_tool_call(0, tool, arguments)], timeout_s=30)
    return message["content"]


async def test_tools_of_a_command_are_called_as_ours_are_and_keep_their_state():
    async with mcp(COMMAND, env={"PALESTRA_TEST_SECRET": "mellon"}) as tools:
        by_name = {tool.name: tool for tool in tools}
        function = by_name["add"].schema["function"]
        assert function["description"] == "The sum of two numbers."
        assert function["parameters"]["properties"]["a"]["type"] == "integer"
        assert await said(tools, "add", a=2, b=3) == "5"
        assert await said(tools, "keep", name="x", value="1") == "x"
        assert await said(tools, "keep", name="y", value="2") == "x, y"
        assert await said(tools, "secret") == "mellon"


async def test_what_a_tool_refuses_is_told_to_the_model():
    async with mcp(COMMAND) as tools:
        assert "not today" in await said(tools, "refuse")
        assert (await said(tools, "add", a="many", b=3)).startswith("Error: ")
        assert (await said(tools, "add", a=1)).startswith("Error: ")
        assert await said(tools, "add", a=1, b=1) == "2"  # and it goes on


async def test_a_server_that_dies_is_infrastructure():
    async def use() -> None:
        async with mcp(COMMAND) as tools:
            await said(tools, "die")

    with pytest.raises(InfrastructureError, match="did not answer die"):
        await asyncio.wait_for(use(), 30)


SILENT = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.mark.parametrize("command", [["/nowhere/at/all"], [sys.executable, "-c", "raise SystemExit(1)"], SILENT])
async def test_a_server_that_does_not_start_is_infrastructure(command):
    with pytest.raises(InfrastructureError, match="MCP server"):
        async with asyncio.timeout(30), mcp(command, start_s=3):
            pass


async def test_an_error_of_the_environment_is_not_taken_for_the_servers():
    with pytest.raises(ValueError, match="mine"):
        async with mcp(COMMAND):
            raise ValueError("mine")


@asynccontextmanager
async def over_http():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port, number = listening.getsockname()[1], listening.fileno()
        process = subprocess.Popen(
            [*COMMAND, str(number)], pass_fds=[number], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    try:
        async with asyncio.timeout(60):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            assert await reader.read(1), "it serves"
        writer.close()
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.kill()
        process.wait()


async def test_a_server_at_an_address_serves_many_rollouts():
    class Sum(Environment):
        """Adds by a server."""

        url: str

        async def run(self, task, agent):
            async with mcp(self.url) as tools:
                agent.tools = tools
                await agent(task.prompt)

        @reward
        def right(self, task, rollout):
            return rollout.reply == "5"

    calls = {"calls": [("add", {"a": 2, "b": 3})]}
    async with over_http() as url:
        records = await asyncio.gather(*(score(Sum(url=url), Task(prompt="2 + 3?"), [calls, "5"]) for _ in range(4)))
    assert [(record.ending, record.reward) for record in records] == [(Ending.OK, 1.0)] * 4
    assert {record.messages[2]["content"] for record in records} == {"5"}


async def test_an_image_of_a_server_arrives_with_its_bytes():
    data = base64.b64encode(b"\x89PNG" + bytes(range(256))).decode()
    async with mcp(COMMAND) as tools:
        assert await said(tools, "show", data=data) == [
            {"type": "text", "text": "here it is"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        ]
