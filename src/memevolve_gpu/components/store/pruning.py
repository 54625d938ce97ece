"""AUTO_PRUNE: a write that reaches the prune threshold deletes what is used least, in its own transaction."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...records.transaction import Transaction, in_order
from .reports import decide, noted
from .session import StoreSession, new_units

__all__ = ["Pruned", "make_room", "prepare", "tell"]

ORDERS: dict[str, Literal["used", "lfu", "oldest"]] = {"lru": "used", "lfu": "lfu", "oldest": "oldest"}

SHOWN = 100
"""Ids in the log line; the event has all of them."""


@dataclass(frozen=True)
class Pruned:
    """What a write deleted: ids, and the history with its entry as the last."""

    ids: list[str]
    history: list[dict[str, Any]]


def prepare(engine: StoreSession, coming: int) -> None:
    """Before the transaction: write down who was read, where units may have to go."""
    config = engine.config
    if config.auto_prune != "off" and engine.records.count() + coming >= _trigger(engine):
        engine.accesses.flush(timeout=None)


def make_room(engine: StoreSession, tx: Transaction, ids: Sequence[str | None]) -> Pruned | None:
    """Delete what must go for the units of these ids (None: a new one each), which stay themselves."""
    if engine.config.auto_prune == "off":
        return None
    kept, new, before = {unit_id for unit_id in ids if unit_id}, new_units(tx, ids), tx.count
    excess = _excess(engine, before, new)
    if not excess:
        return None
    order = ORDERS[engine.config.auto_prune]
    candidates = tx.outside(lambda con: in_order(con, order, excess + len(kept)))
    going = [unit_id for unit_id in candidates if unit_id not in kept][:excess]
    removed = tx.drop_many(going)
    entry = {
        "operation": "prune",
        "at": time.time(),
        "count_before": before,
        "count_after": tx.count,
        "removed": removed,
        "generation": engine.live.generation,
        "details": {"policy": engine.config.auto_prune, "auto": True, "coming": new},
    }
    return Pruned(going, noted(tx, entry)) if removed else None


def tell(engine: StoreSession, pruned: Pruned | None) -> None:
    """After the commit: one event and one log line, and the index follows."""
    if pruned is None:
        return
    entry, config = pruned.history[-1], engine.config
    counts = f"{entry['count_before']} to {entry['count_after']} of at most {config.max_memory_units}"
    names = ", ".join(pruned.ids[:SHOWN])
    more = f" and {len(pruned.ids) - SHOWN} more" if len(pruned.ids) > SHOWN else ""
    engine.events.record(
        "auto-pruned",
        f"{entry['removed']} units by {config.auto_prune}, {counts}: {names}{more}",
        level=logging.WARNING,
        policy=config.auto_prune,
        count_before=entry["count_before"],
        count_after=entry["count_after"],
        removed=entry["removed"],
        ids=pruned.ids,
    )
    decide(engine, pruned.history)


def _trigger(engine: StoreSession) -> int:
    return _share(engine.config.prune_threshold, engine.config.max_memory_units)


def _excess(engine: StoreSession, count: int, new: int) -> int:
    """How many must go so that ``new`` can come; never so many that fewer than PRUNE_TARGET would be left.

    For a batch that is larger than the target as little goes as is needed, and nothing for one that cannot fit at all.
    """
    limit = engine.config.max_memory_units
    if not new or count + new < _trigger(engine):
        return 0
    bounds = (_share(engine.config.prune_target, limit), _trigger(engine) - 1, limit)
    bound = next((bound for bound in bounds if new <= bound), None)
    return 0 if bound is None else max(0, min(count, count + new - bound))


def _share(share: float, limit: int) -> int:
    """The least whole number that is at least so much of the limit."""
    return math.ceil(share * limit - 1e-9)
