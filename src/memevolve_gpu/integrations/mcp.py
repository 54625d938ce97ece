"""A Model Context Protocol server over a store: tools, resources and prompts for an agent.

Built with the official Python SDK (extra ``mcp``), which is imported when a server is made.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata as packages
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, Field

from ..components.retrieve import (
    HybridRetrievalStrategy,
    KeywordRetrievalStrategy,
    RetrievalStrategy,
    SemanticRetrievalStrategy,
)
from ..components.store.base import StorageBackend
from ..components.store.history import HistoryMixin, UnitVersion
from ..errors import ConfigurationError, InvalidUnitError, MemEvolveError
from ..types import JsonObject, MemoryUnit
from ..utils.arguments import having, optional_text

if TYPE_CHECKING:
    from mcp.server import MCPServer

__all__ = ["memory_server"]

INSTRUCTIONS = """\
This server is a long-term memory. Call recall before you start a task, with the question in your own words. Call
remember when you learn something that helps next time: one fact, lesson or procedure per call. When a memory turns out
to be wrong, call update with its id; call forget only for what must not be kept."""

DEFAULT_TOKENS = 2_000
"""Tokens of an answer, unless the caller asks for more."""

MOST_TOKENS = 50_000

BYTES_PER_TOKEN = 3
"""UTF-8 bytes counted as one token: fewer than the four of English text, and right for CJK scripts."""

MOST_RESULTS = 100

Kind = Literal["lesson", "skill", "tool", "abstraction"]
Mode = Literal["hybrid", "semantic", "keyword"]

Limit = Annotated[int, Field(ge=1, le=MOST_RESULTS, description="Most memories to return.")]
Tokens = Annotated[
    int,
    Field(ge=100, le=MOST_TOKENS, description="Most tokens of the answer; longer memories are cut, the rest left out."),
]
Filters = Annotated[
    JsonObject | None,
    Field(description='Only memories that match, such as {"type": "skill"} or {"metadata.score": {"gte": 0.5}}.'),
]
Namespace = Annotated[
    list[str] | None,
    Field(description='Whose memory, such as ["org", "alice"]; nothing of another namespace is seen or changed.'),
]
UnitId = Annotated[str, Field(min_length=1, description="The id of a memory, as recall and list_memories give it.")]

_Tool = TypeVar("_Tool", bound=Callable[..., Any])


class Memories(BaseModel):
    """Memories that were found. ``left_out`` did not fit into the tokens of the answer."""

    memories: list[JsonObject]
    left_out: int = 0
    next_cursor: str | None = None


class Stored(BaseModel):
    """The id of a stored memory."""

    id: str


class Forgotten(BaseModel):
    """Ids of memories that were deleted, or would be with ``dry_run``; ``missing`` names no memory."""

    forgotten: list[str]
    missing: list[str] = []
    dry_run: bool = False


class Version(BaseModel):
    """One version of a memory: what it was after an operation, or None where that deleted it."""

    operation: int | None
    kind: str
    change: str
    at: str | None
    memory: JsonObject | None


class Versions(BaseModel):
    """Versions of a memory, newest first. ``left_out`` older ones did not fit into the tokens of the answer."""

    versions: list[Version]
    left_out: int = 0


class Undone(BaseModel):
    """The operation that took another one back, and how many memories it changed."""

    operation: int
    changes: int


def require_mcp() -> type[MCPServer]:
    """Return the class of servers. Raises ConfigurationError when the package mcp is not installed or too old."""
    try:
        from mcp.server import MCPServer
    except ImportError as error:
        raise ConfigurationError(
            "the package mcp (2.0 or newer) is not installed: pip install 'memevolve-gpu[mcp]'"
        ) from error
    return MCPServer


def memory_server(store: StorageBackend, name: str = "memevolve") -> MCPServer:
    """Make an MCP server over a store.

    Run it with ``run("stdio")`` or ``run("streamable-http", host=..., port=...)``, or mount ``streamable_http_app()``.
    Calls run in worker threads, so a slow embedding blocks no other client. Several servers, in several processes, may
    use one store.

    Args:
        store: The store. It stays open when the server ends.
        name: The name that clients show.

    Returns:
        The server of the official SDK.

    Raises:
        ConfigurationError: The package ``mcp`` is not installed.

    Examples:
        >>> from memevolve_gpu import HashingEmbedder, VectorStore
        >>> from memevolve_gpu.integrations.mcp import memory_server
        >>> store = VectorStore("memory", HashingEmbedder())
        >>> server = memory_server(store)  # doctest: +SKIP
        >>> server.run("stdio")  # doctest: +SKIP
    """
    having("store", store, "search_units", "a store")
    optional_text("name", name)
    server = require_mcp()(
        name, title="MemEvolve memory", instructions=INSTRUCTIONS, version=packages.version("memevolve-gpu")
    )
    _add_writing(server, store)
    _add_reading(server, store)
    if isinstance(store, HistoryMixin):
        _add_past(server, store)
    _add_resources(server, store)
    _add_prompts(server)
    return server


# An optional text is "", not None: the SDK reads a text that looks like JSON as JSON where the type allows None.


def _add_writing(server: MCPServer, store: StorageBackend) -> None:
    @_tool(server, "Remember", idempotent=False)
    def remember(
        content: Annotated[str, Field(min_length=1, description="What to remember: one fact, lesson or procedure.")],
        kind: Annotated[Kind, Field(description="What the memory is.")] = "lesson",
        tags: Annotated[list[str] | None, Field(description="Words to filter by.")] = None,
        metadata: Annotated[JsonObject | None, Field(description="Any JSON to keep beside the text.")] = None,
        unit_id: Annotated[str, Field(description="An id of your own; leave out for a new one.")] = "",
        namespace: Namespace = None,
    ) -> Stored:
        """Store one memory. It is durable when this call returns."""
        unit: MemoryUnit = {"type": kind, "content": content, "tags": tags or [], "metadata": metadata or {}}
        return Stored(id=_scoped(store, namespace).store({"id": unit_id, **unit} if unit_id else unit))

    @_tool(server, "Update a memory", destructive=True)
    def update(
        unit_id: UnitId,
        content: Annotated[str, Field(description="The new text; leave out to keep it.")] = "",
        kind: Annotated[Kind | None, Field(description="The new kind.")] = None,
        tags: Annotated[list[str] | None, Field(description="The new tags, in place of the old ones.")] = None,
        metadata: Annotated[
            JsonObject | None, Field(description="Keys to change; null removes a key, others are kept.")
        ] = None,
        namespace: Namespace = None,
    ) -> JsonObject:
        """Change a memory in place: only what is given. Returns the memory as it is now."""
        scoped = _scoped(store, namespace)
        given = {"type": kind, "content": content or None, "tags": tags, "metadata": metadata}
        changes = {key: value for key, value in given.items() if value is not None}
        if not changes:
            raise InvalidUnitError("nothing to change: give content, kind, tags or metadata")
        changed = scoped.retrieve(unit_id) if scoped.patch(unit_id, changes) else None
        if changed is None:
            raise InvalidUnitError(_no_such(unit_id))
        return changed

    @_tool(server, "Forget memories", destructive=True)
    def forget(
        unit_ids: Annotated[list[str], Field(min_length=1, max_length=1_000, description="Ids of memories.")],
        dry_run: Annotated[bool, Field(description="True only says what would be deleted.")] = False,
        namespace: Namespace = None,
    ) -> Forgotten:
        """Delete memories; undo brings them back for some days. Use update for one that is merely out of date."""
        scoped = _scoped(store, namespace)
        known = list(scoped.retrieve_batch(unit_ids))
        missing = [unit_id for unit_id in unit_ids if unit_id not in set(known)]
        if not dry_run:
            scoped.delete_batch(known)
        return Forgotten(forgotten=known, missing=missing, dry_run=dry_run)


def _add_reading(server: MCPServer, store: StorageBackend) -> None:
    @_tool(server, "Recall", read_only=True)
    def recall(
        query: Annotated[str, Field(min_length=1, description="The question or situation, in plain words.")],
        limit: Limit = 5,
        mode: Annotated[
            Mode, Field(description="hybrid: by meaning and words; semantic: by meaning; keyword: by words.")
        ] = "hybrid",
        filters: Filters = None,
        max_tokens: Tokens = DEFAULT_TOKENS,
        namespace: Namespace = None,
    ) -> Memories:
        """Find the memories that help with a question, best first. Each has its id and a score."""
        found = _strategy(mode).retrieve(query, _scoped(store, namespace), limit, filters)
        return _fitted([{**result.unit, "score": round(result.score, 4)} for result in found], max_tokens)

    @_tool(server, "List memories", read_only=True)
    def list_memories(
        limit: Limit = 20,
        filters: Filters = None,
        cursor: Annotated[str, Field(description="next_cursor of the page before; leave out for the first.")] = "",
        max_tokens: Tokens = DEFAULT_TOKENS,
        namespace: Namespace = None,
    ) -> Memories:
        """List memories page by page, oldest first."""
        return _page(_scoped(store, namespace), limit, filters, cursor, max_tokens)

    @_tool(server, "Health", read_only=True)
    def health() -> JsonObject:
        """Say how full and how healthy the memory is, and what to do about a problem."""
        report: Mapping[str, object] = store.get_storage_health()
        kept = ("current_count", "max_units", "memory_usage_mb", "max_memory_mb", "damage", "recommendations")
        return {key: report[key] for key in kept if key in report}


def _add_past(server: MCPServer, store: HistoryMixin) -> None:
    @_tool(server, "History of a memory", read_only=True)
    def history(unit_id: UnitId, max_tokens: Tokens = DEFAULT_TOKENS, namespace: Namespace = None) -> Versions:
        """Show the kept versions of a memory, newest first, also of a forgotten one; undo takes their operation."""
        versions = [_version(one) for one in reversed(_past(store, namespace).history(unit_id))]
        kept, left = list[Version](), max_tokens
        for one in versions:
            cost = _tokens(one.model_dump())
            if cost > left:
                if kept:
                    break
                one.memory = one.memory and _cut(one.memory, left)
            kept.append(one)
            left -= cost
        return Versions(versions=kept, left_out=len(versions) - len(kept))

    @_tool(server, "Undo an operation", destructive=True, idempotent=False)
    def undo(
        operation: Annotated[int, Field(ge=1, description="The operation, as history gives it.")],
        namespace: Namespace = None,
    ) -> Undone:
        """Take back an operation with every memory that it changed, such as a forget. An undo can be undone."""
        done = _past(store, namespace).undo(operation)
        return Undone(operation=done.id, changes=done.changes)


def _past(store: HistoryMixin, namespace: Sequence[str] | None) -> HistoryMixin:
    return cast("HistoryMixin", _scoped(cast("StorageBackend", store), namespace))


def _version(version: UnitVersion) -> Version:
    at = None if version.at is None else datetime.fromtimestamp(version.at, timezone.utc).isoformat()
    kind, change = version.kind or "unknown", version.change
    return Version(operation=version.operation, kind=kind, change=change, at=at, memory=version.unit)


def _add_resources(server: MCPServer, store: StorageBackend) -> None:
    from mcp.server.mcpserver.exceptions import ResourceNotFoundError

    @server.resource("memory://units/{unit_id}", title="A memory", mime_type="application/json")
    def unit(unit_id: str) -> str:
        """Give one memory of the default namespace as JSON."""
        found = store.retrieve(unit_id)
        if found is None:
            raise ResourceNotFoundError(_no_such(unit_id))
        return json.dumps(found, ensure_ascii=False)

    @server.resource("memory://overview", title="Overview of the memory", mime_type="application/json")
    def overview() -> str:
        """Give the number of memories."""
        return json.dumps({"count": store.count()}, ensure_ascii=False)


def _add_prompts(server: MCPServer) -> None:
    @server.prompt(title="Start with what is known")
    def start_task(task: str) -> str:
        """Recall what is known before a task."""
        return f"Before you start, call recall for this task and use what it gives: {task}"

    @server.prompt(title="Keep what was learned")
    def reflect(session: str = "this session") -> str:
        """Remember what a session taught."""
        return (
            f"List what {session} taught that helps next time: lessons, skills, tools. Call recall for each one; call "
            "update where a memory says the same, remember where none does. Keep each to one or two sentences."
        )


def _tool(
    server: MCPServer, title: str, *, read_only: bool = False, destructive: bool = False, idempotent: bool = True
) -> Callable[[_Tool], _Tool]:
    """Register a tool; errors of this package reach the model with their message, which names the remedy."""
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp.types import ToolAnnotations

    def register(function: _Tool) -> _Tool:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            try:
                return function(*arguments, **named)
            except MemEvolveError as error:
                raise ToolError(str(error)) from error

        hints = ToolAnnotations(
            read_only_hint=read_only, destructive_hint=destructive, idempotent_hint=idempotent, open_world_hint=False
        )
        call.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
        server.tool(title=title, annotations=hints)(call)
        return function

    return register


def _scoped(store: StorageBackend, namespace: Sequence[str] | None) -> StorageBackend:
    if not namespace:
        return store
    return store.namespace(*namespace)


def _strategy(mode: Mode) -> RetrievalStrategy:
    if mode == "keyword":
        return KeywordRetrievalStrategy()
    return SemanticRetrievalStrategy() if mode == "semantic" else HybridRetrievalStrategy()


def _no_such(unit_id: str) -> str:
    return f"there is no memory with id {unit_id!r}; use an id that recall or list_memories gave"


def _page(store: StorageBackend, limit: int, filters: Filters | None, cursor: str, max_tokens: int) -> Memories:
    listing = store.units(filters, after=cursor or None)
    read = [(unit, listing.cursor) for unit in islice(listing, limit)]
    page = _fitted([unit for unit, _ in read], max_tokens)
    if page.left_out or next(listing, None) is not None:
        page.next_cursor = read[len(page.memories) - 1][1]
    return page


def _fitted(units: Sequence[MemoryUnit], max_tokens: int) -> Memories:
    """Return the units that fit into the tokens, the first one cut if it must be."""
    kept, left = list[MemoryUnit](), max_tokens
    for unit in units:
        cost = _tokens(unit)
        if kept and cost > left:
            break
        kept.append(unit if cost <= left else _cut(unit, left))
        left -= cost
    return Memories(memories=kept, left_out=len(units) - len(kept))


def _tokens(unit: Any) -> int:
    return math.ceil(len(json.dumps(unit, ensure_ascii=False).encode(errors="surrogatepass")) / BYTES_PER_TOKEN)


def _cut(unit: MemoryUnit, tokens: int) -> MemoryUnit:
    """Keep the id and the start of the text; the resource of the memory has the whole."""
    whole = str(unit.get("content") or json.dumps(unit, ensure_ascii=False))
    most = tokens * BYTES_PER_TOKEN // 2
    text = whole.encode(errors="replace")[:most].decode(errors="ignore")
    note = f" [cut: {len(text)} of {len(whole)} characters; raise max_tokens for the rest]"
    return {"id": unit.get("id"), "type": unit.get("type"), "content": text + note, "score": unit.get("score")}
