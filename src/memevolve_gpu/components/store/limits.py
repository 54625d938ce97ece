"""Limits are checked inside the transaction, before the first row of it is written."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ...errors import CapacityError
from ...live.tail import row_bytes
from ...records.transaction import Transaction
from .engine import Engine

__all__ = ["check_room"]


def check_room(engine: Engine, tx: Transaction, ids: Sequence[str | None]) -> None:
    """Raise CapacityError when the units of these ids (None: a new one each) do not all fit; warn once per crossing.

    Replacing a unit that is there needs no room.
    """
    new = _new_units(tx, ids)
    limit = engine.config.max_memory_units
    if new and tx.count + new > limit:
        raise CapacityError(
            f"the store holds {tx.count} of at most {limit} units and cannot take {new} more; "
            "delete units or raise MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS"
        )
    _check_memory(engine, tx.count, new)
    _warn_once(engine, tx.count + new, limit)


def _new_units(tx: Transaction, ids: Sequence[str | None]) -> int:
    named = {unit_id for unit_id in ids if unit_id}
    known = sum(1 for unit_id in named if tx.find(unit_id) is not None)
    return len(named) - known + sum(1 for unit_id in ids if not unit_id)


def _check_memory(engine: Engine, count: int, new: int) -> None:
    waiting = max(0, count - engine.live.view.count)  # committed and not applied yet
    needed = engine.live.nbytes + (waiting + new) * row_bytes(engine.records.dim)
    if new and needed > engine.max_memory_bytes:
        raise CapacityError(
            f"index and vectors would take {needed / 2**20:.1f} MB of at most {engine.max_memory_bytes / 2**20:.1f}; "
            "delete units or raise MEMEVOLVE_STORAGE_MAX_MEMORY_MB"
        )


def _warn_once(engine: Engine, count: int, limit: int) -> None:
    above = count >= engine.config.warning_threshold * limit
    if above and not engine.warned:
        engine.events.record(
            "near-limit",
            f"{count} of {limit} units: prune or consolidate, or raise MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS",
            level=logging.WARNING,
            count=count,
            limit=limit,
        )
    engine.warned = above
