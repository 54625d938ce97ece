"""What management did to the store: a bounded history, and whether the index should follow."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from ...errors import InvalidQueryError
from ...live.causes import Cause
from .engine import AFTER_COMMIT, Engine
from .units import checked_unit

__all__ = ["OPERATIONS", "history", "register"]

OPERATIONS = ("prune", "consolidate", "deduplicate", "forget")
HISTORY_KEY = "management_history"
KEPT = 100

RETRAIN_SHARE = 0.25
"""Management that removed this share of what the index was trained on has changed what it should be trained on."""


def register(engine: Engine, operation: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """Note an operation and decide what it means for the index; see ``VectorStore.register_management_operation``."""
    if operation not in OPERATIONS:
        raise InvalidQueryError(f"operation_type must be one of {', '.join(OPERATIONS)}, got {operation!r}")
    entry = _entry(engine, operation, checked_unit(dict(details), "details"))
    with engine.records.write() as tx:
        held = tx.get_meta(HISTORY_KEY)
        kept = [*(json.loads(held) if held else []), entry][-KEPT:]
        tx.set_meta(HISTORY_KEY, json.dumps(kept).encode())
    try:
        entry["decision"] = _decide(engine, kept)
    except AFTER_COMMIT as error:
        engine.events.record("apply-failed", f"{operation} is noted, the index follows later: {error}")
        entry["decision"] = "nothing"
    engine.events.record("management", f"{operation}: {entry['decision']}", **_figures(entry))
    return entry


def history(engine: Engine) -> list[dict[str, Any]]:
    """The newest operations, oldest of them first."""
    held = engine.records.get_meta(HISTORY_KEY)
    found: list[dict[str, Any]] = json.loads(held) if held else []
    return found


def _entry(engine: Engine, operation: str, details: dict[str, Any]) -> dict[str, Any]:
    after = engine.records.count()
    removed = _removed(details)
    before = details.get("count_before", after + removed)
    return {
        "operation": operation,
        "at": time.time(),
        "count_before": before,
        "count_after": after,
        "removed": removed,
        "generation": engine.live.generation,
        "details": details,
    }


def _removed(details: Mapping[str, Any]) -> int:
    """How many units went, by whichever word the caller says it."""
    for name in ("removed", "deleted", "count"):
        value = details.get(name)
        if isinstance(value, int):
            return value
    ids = details.get("ids", ())
    return len(ids) if isinstance(ids, (list, tuple)) else 0


def _decide(engine: Engine, kept: list[dict[str, Any]]) -> str:
    view = engine.live.catch_up()
    trained = view.facts.trained_rows
    removed = sum(entry["removed"] for entry in kept if entry["generation"] == engine.live.generation)
    if trained and removed >= RETRAIN_SHARE * trained:
        engine.maintenance.ask(Cause("train", f"management removed {removed} of {trained} units since the training"))
        decision = "retrain"
    else:
        cause = engine.maintenance.cause(view)
        decision = "nothing" if cause is None else {"train": "retrain"}.get(cause.kind, cause.kind)
    if decision != "nothing":
        engine.wake()
    return decision


def _figures(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in ("count_before", "count_after", "removed")}
