"""The memory server, with the tools, resources and prompts that the official conformance suite of MCP calls.

``python mcp_fixture.py FOLDER PORT`` serves it over HTTP; ``python mcp_fixture.py FOLDER PORT plain`` the memory server
alone. The suite (``conformance server --url http://127.0.0.1:PORT/mcp``) says what each fixture returns.
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

from mcp import types
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.streamable_http import EventCallback, EventMessage, EventStore

from memevolve_gpu import HashingEmbedder, VectorStore
from memevolve_gpu.integrations.mcp import memory_server


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


PNG = b"\x89PNG\r\n\x1a\n" + b"".join(
    [
        _chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)),
        _chunk(b"IDAT", zlib.compress(b"\0\xff\0\0")),
        _chunk(b"IEND", b""),
    ]
)
"""One red pixel."""

WAV = b"RIFF" + struct.pack("<I", 38) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16)
WAV += b"data" + struct.pack("<I", 2) + b"\0\0"
"""One sample of silence."""

IMAGE = types.ImageContent(type="image", data=base64.b64encode(PNG).decode(), mime_type="image/png")
SOUND = types.AudioContent(type="audio", data=base64.b64encode(WAV).decode(), mime_type="audio/wav")


def text(words: str) -> types.TextContent:
    return types.TextContent(type="text", text=words)


def embedded(uri: str, words: str, mime_type: str = "text/plain") -> types.EmbeddedResource:
    held = types.TextResourceContents(uri=uri, mime_type=mime_type, text=words)
    return types.EmbeddedResource(type="resource", resource=held)


def plain_tools(server: MCPServer) -> None:
    mixed = embedded("test://mixed-content-resource", '{"test":"data","value":123}', "application/json")
    contents: dict[str, list[Any]] = {
        "test_simple_text": [text("This is a simple text response for testing.")],
        "test_image_content": [IMAGE],
        "test_audio_content": [SOUND],
        "test_embedded_resource": [embedded("test://embedded-resource", "This is an embedded resource content.")],
        "test_multiple_content_types": [text("Multiple content types test:"), IMAGE, mixed],
    }
    for name, content in contents.items():

        def give(content: list[Any] = content) -> types.CallToolResult:
            return types.CallToolResult(content=content)

        server.add_tool(lambda give=give: give(), name=name, description="A fixture.", structured_output=False)

    @server.tool()
    def test_error_handling() -> str:
        """Fail."""
        raise ToolError("This tool intentionally returns an error for testing")

    @server.tool()
    def json_schema_2020_12_tool(name: str = "", address: dict[str, str] | None = None) -> str:
        """Tool with JSON Schema 2020-12 features"""
        return f"{name} {address}"

    tool = server._tool_manager.get_tool("json_schema_2020_12_tool")
    assert tool is not None
    words = {"type": "string"}
    tool.parameters = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "$defs": {"address": {"type": "object", "properties": {"street": words, "city": words}}},
        "properties": {"name": words, "address": {"$ref": "#/$defs/address"}},
        "additionalProperties": False,
    }


def talking_tools(server: MCPServer) -> None:
    @server.tool()
    async def test_tool_with_logging(ctx: Context) -> str:
        """Send three log messages."""
        for words in ("Tool execution started", "Tool processing data", "Tool execution completed"):
            await ctx.info(words)
            await asyncio.sleep(0.05)
        return "logged"

    @server.tool()
    async def test_tool_with_progress(ctx: Context) -> str:
        """Report progress three times."""
        for done in (0, 50, 100):
            await ctx.report_progress(done, 100)
            await asyncio.sleep(0.05)
        return "done"

    @server.tool()
    async def test_sampling(prompt: str, ctx: Context) -> str:
        """Ask the client's model."""
        message = types.SamplingMessage(role="user", content=text(prompt))
        answer = await ctx.session.create_message([message], max_tokens=100, related_request_id=ctx.request_id)
        return f"LLM response: {getattr(answer.content, 'text', answer.content)}"

    @server.tool()
    async def test_reconnection(ctx: Context) -> str:
        """Close the stream, and answer on the next one."""
        await ctx.close_sse_stream()
        await asyncio.sleep(0.1)
        return "reconnected"


def asking_tools(server: MCPServer) -> None:
    async def ask(ctx: Context, message: str, properties: dict[str, Any], required: list[str]) -> types.ElicitResult:
        schema = {"type": "object", "properties": properties, "required": required}
        return await ctx.session.elicit_form(message, schema, related_request_id=ctx.request_id)

    @server.tool()
    async def test_elicitation(message: str, ctx: Context) -> str:
        """Ask the user for a name and an address."""
        words = {"type": "string", "description": "User's response"}
        answer = await ask(ctx, message, {"username": words, "email": words}, ["username", "email"])
        return f"User response: action={answer.action}, content={json.dumps(answer.content)}"

    @server.tool()
    async def test_elicitation_sep1034_defaults(ctx: Context) -> str:
        """Ask with defaults."""
        fields = {
            "name": {"type": "string", "default": "John Doe"},
            "age": {"type": "integer", "default": 30},
            "score": {"type": "number", "default": 95.5},
            "status": {"type": "string", "enum": ["active", "inactive", "pending"], "default": "active"},
            "verified": {"type": "boolean", "default": True},
        }
        answer = await ask(ctx, "Defaults", fields, [])
        return f"Elicitation completed: action={answer.action}, content={json.dumps(answer.content)}"

    @server.tool()
    async def test_elicitation_sep1330_enums(ctx: Context) -> str:
        """Ask with every kind of enumeration."""
        plain = {"type": "string", "enum": ["option1", "option2", "option3"]}
        titled = [{"const": f"value{n}", "title": f"{word} Option"} for n, word in enumerate(WORDS, 1)]
        chosen = [{"const": f"value{n}", "title": f"{word} Choice"} for n, word in enumerate(WORDS, 1)]
        legacy = {"enum": ["opt1", "opt2", "opt3"], "enumNames": ["Option One", "Option Two", "Option Three"]}
        fields = {
            "untitledSingle": plain,
            "titledSingle": {"type": "string", "oneOf": titled},
            "legacyEnum": {"type": "string", **legacy},
            "untitledMulti": {"type": "array", "items": plain},
            "titledMulti": {"type": "array", "items": {"anyOf": chosen}},
        }
        answer = await ask(ctx, "Enumerations", fields, [])
        return f"Elicitation completed: action={answer.action}, content={json.dumps(answer.content)}"


WORDS = ("First", "Second", "Third")


def resources_and_prompts(server: MCPServer) -> None:
    @server.resource("test://static-text", mime_type="text/plain")
    def static_text() -> str:
        """Give a text."""
        return "This is the content of the static text resource."

    @server.resource("test://static-binary", mime_type="image/png")
    def static_binary() -> bytes:
        """Give an image."""
        return PNG

    @server.resource("test://watched-resource", mime_type="text/plain")
    def watched() -> str:
        """Give a text that could be watched."""
        return "Watched resource content."

    @server.resource("test://template/{id}/data", mime_type="application/json")
    def template(id: str) -> str:  # noqa: A002 - the suite's name
        """Give the id."""
        return json.dumps({"id": id, "templateTest": True, "data": f"Data for ID: {id}"})

    @server.prompt()
    def test_simple_prompt() -> str:
        """A prompt without arguments."""
        return "This is a simple prompt for testing."

    @server.prompt()
    def test_prompt_with_arguments(arg1: str, arg2: str) -> str:
        """A prompt with two arguments."""
        return f"Prompt with arguments: arg1='{arg1}', arg2='{arg2}'"

    @server.prompt()
    def test_prompt_with_embedded_resource(resourceUri: str) -> list[Any]:  # noqa: N803 - the suite's name
        """A prompt with a resource in it."""
        held = embedded(resourceUri, "Embedded resource content for testing.")
        return [_said(held), _said(text("Please process the embedded resource above."))]

    @server.prompt()
    def test_prompt_with_image() -> list[Any]:
        """A prompt with an image in it."""
        return [_said(IMAGE), _said(text("Please analyze the image above."))]


def _said(content: Any) -> Any:
    from mcp.server.mcpserver.prompts.base import UserMessage

    return UserMessage(content)


def endpoints(server: MCPServer) -> None:
    """What the memory server does not declare: levels of logging, completion and subscriptions."""

    @server.completion()  # type: ignore[no-untyped-call,untyped-decorator,unused-ignore]
    async def complete(*_about: Any) -> types.Completion:
        return types.Completion(values=["paris", "park", "party"], total=3, has_more=False)

    async def empty(_ctx: Any, _params: Any) -> types.EmptyResult:
        return types.EmptyResult()

    low = server._lowlevel_server
    low.add_request_handler("logging/setLevel", types.SetLevelRequestParams, empty)
    low.add_request_handler("resources/subscribe", types.SubscribeRequestParams, empty)
    low.add_request_handler("resources/unsubscribe", types.UnsubscribeRequestParams, empty)


class Events(EventStore):
    """Keeps the events of streams in memory, for clients that come back."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    async def store_event(self, stream_id: str, message: Any) -> str:
        self.events.append((stream_id, message))
        return str(len(self.events))

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        stream = self.events[int(last_event_id) - 1][0]
        for number, (of, message) in enumerate(self.events[int(last_event_id) :], int(last_event_id) + 1):
            if of == stream and message is not None:
                await send_callback(EventMessage(message, str(number)))
        return stream


def main(folder: str, port: str, *plain: str) -> None:
    warnings.simplefilter("ignore")  # logging and sampling are deprecated in the newest protocol, and still tested
    with VectorStore(Path(folder) / "memory", HashingEmbedder()) as store:
        server = memory_server(store)
        if not plain:
            for add in (plain_tools, talking_tools, asking_tools, resources_and_prompts, endpoints):
                add(server)
        events = None if plain else Events()
        server.run("streamable-http", host="127.0.0.1", port=int(port), event_store=events, retry_interval=500)


if __name__ == "__main__":
    main(*sys.argv[1:])
