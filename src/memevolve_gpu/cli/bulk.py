"""Storing many units, and saying truthfully how many of them are in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np

from ..components.store.opening import AnyStore
from ..errors import MemEvolveError
from ..types import FloatArray, MemoryUnit
from .codes import Interrupted
from .interrupts import held_interrupt
from .output import Output

__all__ = ["Bulk", "add_batches", "add_whole", "bulk_into", "nothing_stored"]


class Bulk:
    """What one command has stored so far: ``ids`` in order, and how many of them were there before."""

    def __init__(self, store: AnyStore, output: Output, source: str) -> None:
        self.store = store
        self.output = output
        self.source = _name(source)
        self.ids: list[str] = []
        self.replaced = 0
        self.last_line = 0
        self._unclear = False

    def put(self, units: Sequence[MemoryUnit], vectors: FloatArray | None = None, last_line: int = 0) -> None:
        """Store the units in one transaction. Ctrl-C acts before it or after it; a second Ctrl-C at once.

        Raises KeyboardInterrupt, or what ``VectorStore.store_batch`` raises.
        """
        known = sum(1 for unit in units if unit.get("id") and self.store.exists(unit["id"]))
        with self.output.progress("embedding" if vectors is None else "storing") as report, held_interrupt() as held:

            def told(stage: str, share: float) -> None:
                held.check()
                report(stage, share)

            try:
                held.check()
                self.ids += self.store.store_batch(units, vectors, told)
            except KeyboardInterrupt:
                self._unclear = held.twice
                raise
            self.replaced += known
            self.last_line = last_line
            held.check()

    def finish(self, verb: str, **more: Any) -> None:
        """Bring the index up to date and report."""
        if self.store.get_storage_health()["needs_retraining"]:
            with self.output.progress("building the index") as report:
                self.store.run_maintenance(report)
        count = self.store.count()
        document = {verb: len(self.ids), "replaced": self.replaced, "count": count, "ids": self.ids, **more}
        replaced = f", {self.replaced} of them in place of older ones" if self.replaced else ""
        text = f"{verb} {len(self.ids)} units from {self.source}{replaced}; the store holds {count}"
        self.output.show(document, text)

    def said(self) -> str:
        """How much of the source is in the store."""
        if not self.ids:
            text = f"nothing of {self.source} was stored"
        else:
            lines = f" (lines 1 to {self.last_line})" if self.last_line else ""
            text = f"{len(self.ids)} units of {self.source}{lines} are in the store"
        return text + ("; the batch that was being stored is wholly in or wholly out" if self._unclear else "")


@contextmanager
def bulk_into(store: AnyStore, output: Output, source: str) -> Iterator[Bulk]:
    """Errors and Ctrl-C leave with a message that says what is in the store."""
    bulk = Bulk(store, output, source)
    try:
        yield bulk
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {bulk.said()}") from None
    except MemEvolveError as error:
        error.args = (f"{error}; {bulk.said()}",)
        raise


@contextmanager
def nothing_stored(source: str) -> Iterator[None]:
    """Errors and Ctrl-C while an input is read before anything is stored say so."""
    said = f"nothing of {_name(source)} was stored"
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {said}") from None
    except MemEvolveError as error:
        error.args = (f"{error}; {said}",)
        raise


def add_whole(bulk: Bulk, units: Sequence[MemoryUnit], vectors: Sequence[FloatArray] | None = None) -> None:
    """Store all units, or none; vectors[i] (dim,) belongs to units[i]."""
    if units:
        bulk.put(units, None if vectors is None else np.stack(list(vectors)))


def add_batches(bulk: Bulk, numbered: Iterable[tuple[int, MemoryUnit]], size: int) -> None:
    """Store (line number, unit) in transactions of ``size``; those before a mistake stay."""
    left = iter(numbered)
    while batch := list(islice(left, size)):
        bulk.put([unit for _, unit in batch], last_line=batch[-1][0])


def _name(source: str) -> str:
    return "stdin" if source == "-" else source
