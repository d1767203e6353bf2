"""MCP servers as tools: `async with mcp(url_or_command) as tools: agent.tools = tools`.

The protocol is that of the `mcp` package, which is imported with the first server.
"""

import asyncio
import shlex
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from palestra.core.content import as_content
from palestra.core.deadline import within
from palestra.core.errors import InfrastructureError, UserError
from palestra.env.tools import BadCall, Tool

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import ContentBlock

_START_S = 60.0


@asynccontextmanager
async def mcp(
    server: str | Sequence[str], *, env: Mapping[str, str] | None = None, start_s: float = _START_S
) -> AsyncIterator[tuple[Tool, ...]]:
    """The tools of a server while the block lasts: one at an http(s) address, or a command that is started here and
    ended with the block, which finds `env` in its environment beside PATH, HOME and a few others.

    What a tool refuses is told to the model. Errors: InfrastructureError, if the server does not start, or is gone;
    UserError, if the package of the protocol is not installed.
    """
    try:
        from mcp import Client, MCPError, StdioServerParameters
    except ImportError as error:
        raise UserError("MCP servers need the package mcp: pip install 'palestra[mcp]'") from error

    name = server if isinstance(server, str) else shlex.join(server)
    if name.startswith(("http://", "https://")):
        client = Client(name)
    else:
        command, *args = shlex.split(server) if isinstance(server, str) else server
        client = Client(StdioServerParameters(command=command, args=args, env=dict(env or {})))
    began, raised = False, None
    try:
        async with AsyncExitStack() as entered:
            starting = _start(entered, client, name)
            tools = await within(start_s, starting, waiting_for=f"the MCP server {name} to tell its tools")
            began = True
            try:
                yield tools
            except BaseException as error:  # not the server's: it passes by the client, which would wrap it
                raised = error
    except (OSError, MCPError, ExceptionGroup) as error:
        if not began:
            raise InfrastructureError(f"the MCP server {name} did not start: {_first(error)}") from error
        if raised is None or _is_cancelled_by_others(raised):
            raise InfrastructureError(f"the MCP server {name} broke off: {_first(error)}") from error
    if raised is not None and _is_cancelled_by_others(raised):
        raise InfrastructureError(f"the MCP server {name} broke off") from raised
    if raised is not None:
        raise raised


def _is_cancelled_by_others(raised: BaseException) -> bool:
    """By the transport, as its connection broke; not because the rollout is over."""
    task = asyncio.current_task()
    return isinstance(raised, asyncio.CancelledError) and task is not None and not task.cancelling()


async def _start(entered: AsyncExitStack, client: "Client", server: str) -> tuple[Tool, ...]:
    await entered.enter_async_context(client)
    listed = await client.list_tools()
    tools = [*listed.tools]
    while listed.next_cursor:
        listed = await client.list_tools(cursor=listed.next_cursor)
        tools += listed.tools
    return tuple(
        Tool(tool.name, tool.description or "", tool.input_schema, partial(_call, client, server, tool.name))
        for tool in tools
    )


async def _call(client: "Client", server: str, name: str, arguments: dict[str, Any]) -> str | list[dict[str, Any]]:
    """Errors: BadCall, with what the tool refuses; InfrastructureError, if the server does not answer."""
    from mcp import MCPError
    from mcp.types import CONNECTION_CLOSED, INTERNAL_ERROR, INVALID_REQUEST, PARSE_ERROR, REQUEST_TIMEOUT

    of_transport = {CONNECTION_CLOSED, REQUEST_TIMEOUT, INTERNAL_ERROR, INVALID_REQUEST, PARSE_ERROR}  # HTTP errors too

    try:
        result = await client.call_tool(name, arguments)
    except MCPError as error:
        if error.code in of_transport:
            raise InfrastructureError(f"the MCP server {server} did not answer {name}: {error.message}") from error
        raise BadCall(error.message) from error
    parts = [_part(block) for block in result.content]
    if result.is_error:
        raise BadCall("\n".join(part["text"] for part in parts if part["type"] == "text") or "the tool failed")
    return as_content(parts)


def _part(block: "ContentBlock") -> dict[str, Any]:
    """As messages hold it: text, or an image; of a resource its text, or where it is."""
    match block.type:
        case "text":
            return {"type": "text", "text": block.text}
        case "image":
            return _image(block.mime_type, block.data)
        case "resource":
            kind, data = block.resource.mime_type or "", getattr(block.resource, "blob", "")
            if kind.startswith("image/") and data:
                return _image(kind, data)
            return {"type": "text", "text": getattr(block.resource, "text", "") or str(block.resource.uri)}
        case "resource_link":
            return {"type": "text", "text": str(block.uri)}
        case kind:
            return {"type": "text", "text": f"({kind})"}


def _image(mime_type: str, data: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:{mime_type};base64,{data}"}}


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
