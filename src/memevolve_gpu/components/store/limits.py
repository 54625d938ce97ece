"""Limits are checked inside the transaction, before the first row of it is written."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

from ...errors import CapacityError
from ...live.tail import row_bytes
from ...records.transaction import Transaction
from .engine import Engine

__all__ = ["check_room", "new_units"]


def check_room(engine: Engine, tx: Transaction, ids: Sequence[str | None]) -> None:
    """Raise CapacityError when the units of these ids (None: a new one each) do not all fit; warn once per crossing.

    Replacing a unit that is there needs no room.
    """
    new = new_units(tx, ids)
    limit = engine.config.max_memory_units
    if new and tx.count + new > limit:
        raise CapacityError(
            f"the store holds {tx.count} of at most {limit} units and cannot take {new} more; "
            "delete units or raise MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS"
        )
    needed = _check_memory(engine, tx.count, new)
    _warn_once(engine, "units", (tx.count, tx.count + new, limit))
    _warn_once(engine, "memory", (*needed, engine.max_memory_bytes))


def new_units(tx: Transaction, ids: Sequence[str | None]) -> int:
    """How many of the units of these ids (None: a new one each) are not there yet."""
    named = {unit_id for unit_id in ids if unit_id}
    known = sum(1 for unit_id in named if tx.find(unit_id) is not None)
    return len(named) - known + sum(1 for unit_id in ids if not unit_id)


def _check_memory(engine: Engine, count: int, new: int) -> tuple[int, int]:
    """Bytes in use, and bytes that will be; raise CapacityError where those are too many."""
    waiting, each = max(0, count - engine.live.view.count), row_bytes(engine.records.dim)  # committed, not applied yet
    used = engine.live.nbytes + waiting * each
    needed = used + new * each
    if new and needed > engine.max_memory_bytes:
        raise CapacityError(
            f"index and vectors would take {needed / 2**20:.1f} MB of at most {engine.max_memory_bytes / 2**20:.1f}; "
            "delete units or raise MEMEVOLVE_STORAGE_MAX_MEMORY_MB"
        )
    return used, needed


def _warn_once(engine: Engine, what: Literal["units", "memory"], figures: tuple[int, int, int]) -> None:
    """Warn when a write crosses the warning threshold. figures: how much there is, how much there will be, the most.

    What has fallen below the threshold since the last warning, by whomever, may cross it again.
    """
    held, wanted, limit = figures
    least = engine.config.warning_threshold * limit
    if held < least:
        engine.warned.discard(what)
    if wanted < least or what in engine.warned:
        return
    engine.warned.add(what)
    text = f"{wanted} of {limit} units: prune or consolidate, or raise MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS"
    if what == "memory":
        text = (
            f"index and vectors take {wanted / 2**20:.1f} of {limit / 2**20:.1f} MB: prune, narrow "
            "MEMEVOLVE_STORAGE_PRECISION, or raise MEMEVOLVE_STORAGE_MAX_MEMORY_MB"
        )
    engine.events.record("near-limit", text, level=logging.WARNING, count=wanted, limit=limit)
