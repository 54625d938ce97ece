"""Capacity: the limits of a store in units and memory, and AUTO_PRUNE, which deletes what is used least."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...errors import CapacityError
from ...live.delta_buffer import row_bytes
from ...records.transaction import Transaction, in_order
from ...types import JsonObject
from ...utils.report_types import OperationEntry
from .reports import append_history, decide, operation_entry
from .session import AFTER_COMMIT, StoreSession

ORDERS: dict[str, Literal["used", "lfu", "oldest"]] = {"lru": "used", "lfu": "lfu", "oldest": "oldest"}

MOVED_SHARE = 0.1
"""Of the memory limit: fewer bytes in the delta buffer are not worth a round of maintenance."""

SHOWN = 100
"""Ids in the log line; the event has all of them."""


@dataclass(frozen=True)
class Pruned:
    """What a write deleted: ids, and the history with its entry as the last."""

    ids: list[str]
    history: list[OperationEntry]
    limit: int


def reserve_room(session: StoreSession, tx: Transaction, ids: Sequence[str | None]) -> Pruned | None:
    """Make sure that the units of these ids (None: a new one each) fit; return what AUTO_PRUNE deleted for them.

    Warns once for each crossing of the warning threshold. Replacing a unit needs no room. Raises CapacityError.
    Ids are looked up only where it matters how many of the units are new.
    """
    if _has_room(session, tx, len(ids)):
        return None
    new = _new_units(tx, ids)
    pruned = None if session.config.auto_prune == "off" else _prune(session, tx, {one for one in ids if one}, new)
    limit, own = session.config.max_memory_units, tx.limits.max_units
    if new and own is not None and tx.count + new > own:
        raise CapacityError(
            f"the namespace holds {tx.count} of at most {own} units and cannot take {new} more; "
            "delete units or raise its limit with set_limits"
        )
    if new and tx.total + new > limit:
        raise CapacityError(
            f"the store holds {tx.total} of at most {limit} units and cannot take {new} more; "
            "delete units or raise MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS"
        )
    used, needed = _check_memory(session, tx.total, new)
    _warn_once(session, "units", tx.total, tx.total + new, limit)
    _warn_once(session, "memory", used, needed, session.max_memory_bytes)
    return pruned


def move_waiting_rows(session: StoreSession, new: int) -> None:
    """Before a write: let maintenance move rows from the delta buffer to the snapshot file, where memory is short.

    Waits for a round that is running, at most LOCK_TIMEOUT seconds. Whether the units fit then, the write decides.
    """
    if not _is_short(session, new):
        return
    deadline = time.monotonic() + session.config.lock_timeout
    while not session.maintenance.in_round() and _is_short(session, new):
        try:
            report = session.maintenance.run(wait=False, quiet=True)
        except AFTER_COMMIT as error:
            session.events.record("maintenance-failed", str(error), level=logging.WARNING)
            return
        if not report.skipped or time.monotonic() > deadline:
            return
        time.sleep(0.02)


def _is_short(session: StoreSession, new: int) -> bool:
    live, most, each = session.live, session.max_memory_bytes, row_bytes(session.records.dim)
    delta, worth = live.view.delta, MOVED_SHARE * most
    moving = session.maintenance.running or (delta.n * each >= worth and delta.nbytes >= worth)
    return moving and live.nbytes + new * each > most


def _has_room(session: StoreSession, tx: Transaction, most: int) -> bool:
    """Do ``most`` new units stay below every limit, threshold and warning, so that there is nothing to do?"""
    if tx.limits.max_units is not None:
        return False
    share, auto_prune = session.config.warning_threshold, session.config.auto_prune
    if session.warned or tx.most + most >= share * session.config.max_memory_units:
        return False
    if auto_prune != "off" and _excess(session, tx.most, most, session.config.max_memory_units):
        return False
    if tx.most + most > session.measured_room:
        _, needed = _memory(session, tx.most, most)
        spare = int(min(share, 1.0) * session.max_memory_bytes) - needed
        if spare <= 0:
            return False
        session.measured_room = tx.most + most + spare // row_bytes(session.records.dim)
    return True


def report_pruned(session: StoreSession, pruned: Pruned | None) -> None:
    """After the commit: record one event, log one line, and let the index follow."""
    if pruned is None:
        return
    entry, config = pruned.history[-1], session.config
    counts = f"{entry['count_before']} to {entry['count_after']} of at most {pruned.limit}"
    names = ", ".join(pruned.ids[:SHOWN])
    more = f" and {len(pruned.ids) - SHOWN} more" if len(pruned.ids) > SHOWN else ""
    session.events.record(
        "auto-pruned",
        f"{entry['removed']} units by {config.auto_prune}, {counts}: {names}{more}",
        level=logging.WARNING,
        policy=config.auto_prune,
        count_before=entry["count_before"],
        count_after=entry["count_after"],
        removed=entry["removed"],
        ids=pruned.ids,
    )
    decide(session, pruned.history)


def _prune(session: StoreSession, tx: Transaction, kept: set[str], new: int) -> Pruned | None:
    """Delete what must go for ``new`` units; the units of the ids ``kept`` stay."""
    before, limit = tx.count, session.config.max_memory_units
    excess = _excess(session, tx.total, new, limit)
    if tx.limits.max_units is not None:
        own = _excess(session, before, new, tx.limits.max_units)
        excess, limit = max(excess, own), tx.limits.max_units if own else limit
    if not excess:
        return None
    session.accesses.write_in(tx)
    order = ORDERS[session.config.auto_prune]
    candidates = tx.read(lambda con: in_order(con, order, excess + len(kept), tx.namespace))
    going = [unit_id for unit_id in candidates if unit_id not in kept][:excess]
    removed = tx.drop_many(going)
    if not removed:
        return None
    details: JsonObject = {"policy": session.config.auto_prune, "auto": True, "coming": new}
    entry = operation_entry(session, "prune", details, removed, before, tx.count)
    return Pruned(going, append_history(tx, entry), limit)


def _excess(session: StoreSession, count: int, new: int, limit: int) -> int:
    """How many must go so that ``new`` can come; never so many that fewer than PRUNE_TARGET would be left.

    For a batch that is larger than the target as little goes as is needed, and nothing for one that cannot fit at all.
    """
    trigger = _share(session.config.prune_threshold, limit)
    if not new or count + new < trigger:
        return 0
    bounds = (_share(session.config.prune_target, limit), trigger - 1, limit)
    bound = next((bound for bound in bounds if new <= bound), None)
    return 0 if bound is None else max(0, min(count, count + new - bound))


def _share(share: float, limit: int) -> int:
    """The least whole number that is at least so much of the limit."""
    return math.ceil(share * limit - 1e-9)


def _new_units(tx: Transaction, ids: Sequence[str | None]) -> int:
    """How many of the units of these ids (None: a new one each) are not stored yet."""
    named = {unit_id for unit_id in ids if unit_id}
    known = sum(1 for unit_id in named if tx.find(unit_id) is not None)
    return len(named) - known + sum(1 for unit_id in ids if not unit_id)


def _memory(session: StoreSession, count: int, new: int) -> tuple[int, int]:
    """Bytes in use, and bytes that will be."""
    not_applied = max(0, count - session.live.view.count)
    each = row_bytes(session.records.dim)
    used = session.live.nbytes + not_applied * each
    return used, used + new * each


def _check_memory(session: StoreSession, count: int, new: int) -> tuple[int, int]:
    """As :func:`_memory`; raise CapacityError where those are too many, even without the columns of filters."""
    used, needed = _memory(session, count, new)
    if new and needed > session.max_memory_bytes and session.live.columns.nbytes:
        session.live.columns.clear()  # a filter that needs them reads them again
        used, needed = _memory(session, count, new)
    if new and needed > session.max_memory_bytes:
        raise CapacityError(
            f"index and vectors would take {needed / 2**20:.1f} MB of at most {session.max_memory_bytes / 2**20:.1f}; "
            "delete units or raise MEMEVOLVE_STORAGE_MAX_MEMORY_MB"
        )
    return used, needed


def _warn_once(session: StoreSession, what: Literal["units", "memory"], held: int, wanted: int, limit: int) -> None:
    """Warn when a write crosses the warning threshold; again only after the store has fallen below it."""
    least = session.config.warning_threshold * limit
    if held < least:
        session.warned.discard(what)
    if wanted < least or what in session.warned:
        return
    session.warned.add(what)
    text = f"{wanted} of {limit} units: prune or consolidate, or raise MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS"
    if what == "memory":
        text = (
            f"index and vectors take {wanted / 2**20:.1f} of {limit / 2**20:.1f} MB: prune, narrow "
            "MEMEVOLVE_STORAGE_PRECISION, or raise MEMEVOLVE_STORAGE_MAX_MEMORY_MB"
        )
    session.events.record("near-limit", text, level=logging.WARNING, count=wanted, limit=limit)
