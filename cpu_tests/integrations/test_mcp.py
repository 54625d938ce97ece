"""The MCP server, through the SDK's own client: in memory, and as processes that share a store."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memevolve_gpu import HashingEmbedder, VectorStore

pytest.importorskip("mcp.server.mcpserver", reason="the extra mcp is not installed")

from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

from memevolve_gpu.integrations.mcp import BYTES_PER_TOKEN, memory_server


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VectorStore]:
    with VectorStore(tmp_path / "memory", HashingEmbedder()) as opened:
        yield opened


async def answer(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    assert result.structured_content is not None
    answered: dict[str, Any] = result.structured_content
    return answered


async def error(client: Client, tool: str, **arguments: Any) -> str:
    result = await client.call_tool(tool, arguments)
    assert result.is_error
    return str(result.content[0].text)  # type: ignore[union-attr]


async def test_a_memory_is_kept_found_changed_and_forgotten(store: VectorStore) -> None:
    async with Client(memory_server(store)) as client:
        unit_id = (await answer(client, "remember", content="git bisect finds the bad commit", kind="skill"))["id"]
        await answer(client, "remember", content="Rotate the API keys every month", metadata={"owner": "ops", "n": 1})
        for mode in ("hybrid", "semantic", "keyword"):
            found = await answer(client, "recall", query="which commit is bad", limit=1, mode=mode)
            assert [unit["id"] for unit in found["memories"]] == [unit_id]
        changed = await answer(client, "update", unit_id="unit_1", metadata={"owner": None, "n": 2})
        assert (changed["content"], changed["metadata"]["n"]) == ("Rotate the API keys every month", 2)
        assert "owner" not in changed["metadata"]
        expected = {"forgotten": [unit_id], "missing": ["absent"]}
        planned = await answer(client, "forget", unit_ids=[unit_id, "absent"], dry_run=True)
        assert planned == {**expected, "dry_run": True}
        assert store.exists(unit_id)
        assert await answer(client, "forget", unit_ids=[unit_id, "absent"]) == {**expected, "dry_run": False}
        assert [unit["id"] for unit in store.units()] == ["unit_1"]


async def test_a_text_that_looks_like_json_stays_a_text(store: VectorStore) -> None:
    async with Client(memory_server(store)) as client:
        unit_id = (await answer(client, "remember", content='{"retries": 3}', unit_id="[1]"))["id"]
        assert unit_id == "[1]"
        changed = await answer(client, "update", unit_id=unit_id, content='["retry", 5]')
        assert changed["content"] == '["retry", 5]'


async def test_tools_say_what_they_do(store: VectorStore) -> None:
    async with Client(memory_server(store)) as client:
        tools = {tool.name: tool.annotations for tool in (await client.list_tools()).tools}
    reading = {name for name, hints in tools.items() if hints is not None and hints.read_only_hint}
    destroying = {name for name, hints in tools.items() if hints is not None and hints.destructive_hint}
    assert reading == {"recall", "list_memories", "history", "health"}
    assert destroying == {"update", "forget", "undo"}
    assert set(tools) == reading | destroying | {"remember"}


async def test_an_error_names_the_remedy(store: VectorStore) -> None:
    async with Client(memory_server(store)) as client:
        assert "list_memories gave" in await error(client, "update", unit_id="absent", content="new")
        assert "nothing to change" in await error(client, "update", unit_id=store.store({"content": "a"}))
        assert "unknown operator" in await error(client, "recall", query="a", filters={"type": {"wrong": 1}})
        assert "cursor" in await error(client, "list_memories", cursor="x")
        assert "at least 1 character" in await error(client, "recall", query="")


async def test_an_answer_fits_into_its_tokens(store: VectorStore) -> None:
    store.store_batch([{"content": f"rule {number}: " + "always close files. " * 20} for number in range(30)])
    async with Client(memory_server(store)) as client:
        found = await answer(client, "recall", query="close files", limit=30, max_tokens=1_000)
        assert 0 < len(found["memories"]) < 30
        assert len(found["memories"]) + found["left_out"] == 30
        assert len(str(found).encode()) < 1_100 * BYTES_PER_TOKEN
        cut = await answer(client, "recall", query="close files", limit=1, max_tokens=100)
        assert "[cut: " in cut["memories"][0]["content"]


async def test_pages_give_every_memory_once(store: VectorStore) -> None:
    ids = store.store_batch([{"content": f"rule {number}"} for number in range(25)])
    seen: list[str] = []
    async with Client(memory_server(store)) as client:
        page = await answer(client, "list_memories", limit=7)
        seen += [unit["id"] for unit in page["memories"]]
        while page["next_cursor"] is not None:
            page = await answer(client, "list_memories", limit=7, cursor=page["next_cursor"], max_tokens=200)
            seen += [unit["id"] for unit in page["memories"]]
    assert seen == ids


async def test_history_shows_versions_and_undo_takes_back(store: VectorStore) -> None:
    space = ["org", "alice"]
    async with Client(memory_server(store)) as client:
        assert (await answer(client, "history", unit_id="absent"))["versions"] == []
        for namespace in (None, space):
            await answer(client, "remember", content="first text", unit_id="a", namespace=namespace)
        await answer(client, "update", unit_id="a", content="second text", namespace=space)
        await answer(client, "forget", unit_ids=["a"], namespace=space)
        versions = (await answer(client, "history", unit_id="a", namespace=space))["versions"]
        assert [version["change"] for version in versions] == ["delete", "put", "put"]
        texts = [version["memory"] and version["memory"]["content"] for version in versions]
        assert texts == [None, "second text", "first text"]
        assert versions[0]["at"] >= versions[1]["at"]
        assert "another namespace" in await error(client, "undo", operation=versions[0]["operation"])
        undone = await answer(client, "undo", operation=versions[0]["operation"], namespace=space)
        assert undone["changes"] == 1
        assert store.namespace(*space).retrieve("a")["content"] == "second text"  # type: ignore[index]
        assert "changed" in await error(client, "undo", operation=versions[2]["operation"], namespace=space)


async def test_a_long_history_fits_into_its_tokens(store: VectorStore) -> None:
    for number in range(30):
        store.store({"id": "a", "content": f"text {number}: " + "always close files. " * 20})
    async with Client(memory_server(store)) as client:
        found = await answer(client, "history", unit_id="a", max_tokens=1_000)
        assert 0 < len(found["versions"]) < 30
        assert len(found["versions"]) + found["left_out"] == 30
        assert found["versions"][0]["memory"]["content"].startswith("text 29: ")
        cut = await answer(client, "history", unit_id="a", max_tokens=100)
        assert "[cut: " in cut["versions"][0]["memory"]["content"]


async def test_resources_and_prompts(store: VectorStore) -> None:
    unit_id = store.store({"content": "Measure before you optimise"})
    async with Client(memory_server(store)) as client:
        text = (await client.read_resource(f"memory://units/{unit_id}")).contents[0]
        assert "Measure before" in text.text  # type: ignore[union-attr]
        with pytest.raises(Exception, match="no memory with id"):
            await client.read_resource("memory://units/absent")
        prompt = await client.get_prompt("start_task", {"task": "fix the build"})
        assert "fix the build" in str(prompt.messages[0].content)


async def test_servers_share_a_store(tmp_path: Path) -> None:
    command = ["-m", "memevolve_gpu", "mcp", "--store", str(tmp_path / "memory"), "--embedder", "hashing"]
    server = StdioServerParameters(command=sys.executable, args=command)
    async with Client(stdio_client(server)) as first, Client(stdio_client(server)) as second:

        async def remember(client: Client, name: str) -> list[str]:
            return [(await answer(client, "remember", content=f"{name} {number}"))["id"] for number in range(10)]

        ids = await asyncio.gather(remember(first, "apple"), remember(second, "pear"))
        assert len({*ids[0], *ids[1]}) == 20
        found = await answer(first, "recall", query="pear 7", limit=1, mode="keyword")
        assert found["memories"][0]["content"] == "pear 7"
