"""Other data than that of the main part: wide vectors, documents, mixed text, a million units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import Data

from .data import documents, mixed_text, prepared, wide_units
from .sections import ingest, reopen, search, unseen
from .session import Plan, Session

__all__ = ["SETS", "Set", "sets"]

Record = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Set:
    """make: the data from the units of the folder (None: those units themselves); size: rows."""

    size: int
    make: Callable[[Data], Data] | None


SETS = {
    "wide": Set(8_000, wide_units),
    "documents": Set(40_000, documents),
    "mixed text": Set(40_000, mixed_text),
    "million": Set(1_000_000, None),
}


def sets(
    names: Sequence[str],
    name: str,
    size: int,
    source: Path,
    plan: Plan,
    folder: Path,
    core: int,
    record: Record,
    tick: Callable[[str], None],
) -> None:
    """One data set: build, questions of a kind not seen before, search at both targets, reopening."""
    plan = replace(plan, builds=1, reopens=1, limit=max(plan.limit, 7200.0) if size > 200_000 else plan.limit)
    work = prepared(source, folder / "data", size, 0, plan.queries // 2, SETS[name].make)
    about = {"section": "sets", "set": name, "size": size, "dimension": int(work.vectors.shape[1])}
    record({**about, "data": work.name})

    def filed(found: dict[str, Any]) -> None:
        record({**found, **about, "of": found["section"]})

    session = Session(list(names), work, plan, folder / "stores", core, filed, tick)
    try:
        ingest(session)
        unseen(session)
        search(session, curves=False)
        reopen(session)
    finally:
        session.finish()
