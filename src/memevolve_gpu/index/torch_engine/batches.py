"""Many queries in parts that keep to the scratch memory of a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...types import FloatArray, IntArray
from .arrays import joined
from .door import device_tensor
from .memory import SCRATCH, Account
from .operations import Operations
from .resident import Queries, Resident
from .search import Probe, decide, propose, scratch_each

__all__ = ["Search", "found_in_batches"]

_MOST_QUERIES = 16_384


@dataclass(frozen=True, slots=True)
class Search:
    """What is searched: rows on a device, all of them or the lists of ``probe``, on the account of that device."""

    rows: Resident
    device: Any
    operations: Operations
    probe: Probe | None
    account: Account
    cosine: bool

    def scratch_each(self, want: int) -> int:
        """Bytes that a query takes for a moment."""
        width = self.rows.groups if self.probe is None else self.probe.lists.widest[self.probe.nprobe]
        return scratch_each(self.rows, want, width)


def found_in_batches(search: Search, queries: Any, want: int, batch: int) -> tuple[FloatArray | None, IntArray]:
    """Candidates (nq, want), at most ``batch`` queries at once; with their distances, nearest first, where float32 rows
    lie on the device.
    """
    each, found = search.scratch_each(want), []
    step = max(1, min(batch, _MOST_QUERIES, SCRATCH // each))
    for start in range(0, len(queries), step):
        part = queries[start : start + step]
        with search.account.scratch(each * len(part), "a search"):
            asked = Queries.prepare(device_tensor(part, search.device), search.rows)
            positions = propose(search.rows, asked, want, search.operations, search.probe)
            found.append(_decided(search, asked, positions, want))
    return joined(found, want)


def _decided(search: Search, asked: Queries, positions: Any, k: int) -> tuple[FloatArray | None, IntArray]:
    if search.rows.full is None:
        return None, positions.cpu().numpy()
    distances, positions = decide(search.rows, asked, positions, k, cosine=search.cosine)
    return distances.cpu().numpy(), positions.cpu().numpy()
