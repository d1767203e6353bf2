"""A server of the `mcp` package: `mcp_server.py [FD]`; by stdio, or by HTTP at /mcp of a socket that listens."""

import base64
import os
import socket
import sys

import uvicorn
from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("test")
held: dict[str, str] = {}


@server.tool()
def add(a: int, b: int) -> str:
    """The sum of two numbers."""
    return str(a + b)


@server.tool()
def keep(name: str, value: str) -> str:
    """Remember something."""
    held[name] = value
    return ", ".join(held)


@server.tool()
def refuse() -> str:
    """Fails always."""
    raise ToolError("not today")


@server.tool()
def die() -> str:
    """Ends the server."""
    os._exit(3)


@server.tool()
def secret() -> str:
    """What the environment has."""
    return os.environ.get("PALESTRA_TEST_SECRET", "nothing")


@server.tool()
def show(data: str) -> list:
    """A picture, with words."""
    return ["here it is", Image(data=base64.b64decode(data), format="png")]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        uvicorn.Server(uvicorn.Config(server.streamable_http_app())).run([socket.socket(fileno=int(sys.argv[1]))])
    else:
        server.run()
