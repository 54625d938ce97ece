"""What management did to the store: a bounded history, and whether the index should follow."""

from __future__ import annotations

import json
import math
import numbers
import time
from collections.abc import Mapping
from typing import Any

from ...errors import InvalidQueryError
from ...live.causes import Cause
from ...records.transaction import Transaction
from .engine import AFTER_COMMIT, Engine
from .units import MAX_UNIT_BYTES

__all__ = ["OPERATIONS", "decide", "history", "noted", "plain_details", "register"]

OPERATIONS = ("prune", "consolidate", "deduplicate", "forget")
HISTORY_KEY = "management_history"
KEPT = 100

MOST_DEEP = 32
"""Levels of details that are kept; what lies deeper, or contains itself, is kept as its repr."""

MOST_REPR = 1000
"""Characters of a repr that are kept."""

RETRAIN_SHARE = 0.25
"""Management that removed this share of what the index was trained on has changed what it should be trained on."""


def register(engine: Engine, operation: str, details: Any) -> dict[str, Any]:
    """Note an operation and decide what it means for the index; see ``VectorStore.register_management_operation``."""
    if operation not in OPERATIONS:
        raise InvalidQueryError(f"operation_type must be one of {', '.join(OPERATIONS)}, got {operation!r}")
    entry = _entry(engine, operation, plain_details(details))
    with engine.records.write() as tx:
        kept = noted(tx, entry)
    entry["decision"] = decide(engine, kept)
    engine.events.record("management", f"{operation}: {entry['decision']}", **_figures(entry))
    return entry


def noted(tx: Transaction, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Add the entry to the history, which is returned, in this transaction."""
    held = tx.get_meta(HISTORY_KEY)
    kept = [*(json.loads(held) if held else []), entry][-KEPT:]
    tx.set_meta(HISTORY_KEY, json.dumps(kept).encode())
    return kept


def plain_details(details: Any) -> dict[str, Any]:
    """Whatever management said of an operation, as JSON keeps it: what JSON has no word for as its ``repr``.

    What is no mapping comes under ``details``; what would take more than MAX_UNIT_BYTES is cut to its beginning.
    """
    plain = _plain(details if isinstance(details, Mapping) else {"details": details}, MOST_DEEP)
    size = len(json.dumps(plain))
    if size <= MAX_UNIT_BYTES:
        return dict(plain)
    return {"removed": _removed(plain), "details": f"{_repr(details)}, {size} bytes as JSON"}


def history(engine: Engine) -> list[dict[str, Any]]:
    """The newest operations, oldest of them first."""
    held = engine.records.get_meta(HISTORY_KEY)
    found: list[dict[str, Any]] = json.loads(held) if held else []
    return found


def _entry(engine: Engine, operation: str, details: dict[str, Any]) -> dict[str, Any]:
    after = engine.records.count()
    removed = _removed(details)
    before = details.get("count_before")
    if not isinstance(before, int) or isinstance(before, bool):
        before = after + removed
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
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    ids = details.get("ids")
    return len(ids) if isinstance(ids, list) else 0


def decide(engine: Engine, kept: list[dict[str, Any]]) -> str:
    """What the index should do after the operations of this history: retrain, compact, append or nothing.

    The operations are committed: an index that cannot follow now is an event, and the next search tries again.
    """
    try:
        return _decide(engine, kept)
    except AFTER_COMMIT as error:
        engine.events.record("apply-failed", f"the operation is noted, the index follows later: {error}")
        return "nothing"


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


def _plain(value: Any, deep: int) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral) and abs(int(value)) < 2**63:
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral) and math.isfinite(value):
        return float(value)
    if deep and isinstance(value, Mapping):
        return {key if isinstance(key, str) else _repr(key): _plain(one, deep - 1) for key, one in value.items()}
    if deep and isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(one, deep - 1) for one in value]
    return _repr(value)


def _repr(value: Any) -> str:
    """The beginning of its repr; that of any object where its own fails."""
    try:
        return repr(value)[:MOST_REPR]
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError):
        return object.__repr__(value)
