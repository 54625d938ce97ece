"""Who reads which list: the pairs of queries and lists, ordered so that each list is read for many queries at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .door import host_tensor, load_torch
from .geometry import BLOCK_GROUPS

__all__ = ["ListWork", "Lists"]


@dataclass(frozen=True, slots=True)
class Lists:
    """Where the inverted lists lie: list i holds groups ``start[i]`` up to ``start[i + 1]`` (int64, on the device).

    ``widest[p]`` is the number of groups in the p largest lists, known on the host.
    """

    start: Any
    widest: tuple[int, ...]

    @classmethod
    def of(cls, groups: list[int], device: Any) -> Lists:
        """Lists of ``groups`` each."""
        start = host_tensor(np.cumsum([0, *groups], dtype=np.int64))
        widest = [0]
        for size in sorted(groups, reverse=True):
            widest.append(widest[-1] + size)
        return cls(start.to(device), tuple(widest))

    @property
    def nlist(self) -> int:
        """How many."""
        return len(self.widest) - 1


@dataclass(frozen=True, slots=True)
class ListWork:
    """nq queries that probe ``nprobe`` of ``nlist`` lists each.

    probed int64 (nq, nprobe); ends int64 (nq, nprobe): the column after each probed list's groups in a query's row of
    minima; columns int64 (nq, nprobe): the first such column; width: columns of that row, enough for any query;
    pairs int64 (nq * nprobe,): query * nprobe + place in ``probed``, list after list; first_pair int64 (nlist + 1,):
    where each list's pairs begin; list_start as in :class:`Lists`.
    """

    nlist: int
    nprobe: int
    width: int
    probed: Any
    ends: Any
    columns: Any
    pairs: Any
    first_pair: Any
    list_start: Any

    @classmethod
    def of(cls, lists: Lists, probed: Any) -> ListWork:
        """For ``probed`` int64 (nq, nprobe), no list twice in a row."""
        torch = load_torch()
        sizes = lists.start.diff()[probed]
        ends = sizes.cumsum(1)
        ordered = torch.sort(probed.flatten(), stable=True)
        bounds = torch.arange(lists.nlist + 1, device=probed.device)
        first = torch.searchsorted(ordered.values, bounds)
        nprobe = int(probed.shape[1])
        width = -(-lists.widest[nprobe] // BLOCK_GROUPS) * BLOCK_GROUPS
        return cls(lists.nlist, nprobe, width, probed, ends, ends - sizes, ordered.indices, first, lists.start)

    def groups_at(self, columns: Any) -> Any:
        """The groups int64 (nq, w) behind ``columns`` int64 (nq, w) of the minima."""
        torch = load_torch()
        place = torch.searchsorted(self.ends, columns, right=True).clamp_max(self.nprobe - 1)
        within = columns - self.columns.gather(1, place)
        return self.list_start[self.probed.gather(1, place)] + within

    def tiles(self, block_q: int, block_groups: int = BLOCK_GROUPS) -> tuple[Any, Any, Any]:
        """Cut the work into pieces of ``block_q`` pairs and ``block_groups`` groups.

        Returns:
            (work_list, work_start, tiles): the list of each piece int32 (pieces,), ``nlist`` for surplus pieces; the
            first piece of each list, and its pairs in units of ``block_q``, int64 (nlist,).
        """
        torch = load_torch()
        tiles = (self.first_pair.diff() + block_q - 1) // block_q
        blocks = (self.list_start.diff() + block_groups - 1) // block_groups
        ends = (tiles * blocks).cumsum(0)
        alone = len(self.probed) == 1  # then there is no need to wait for the device: no query has more
        total = self.width // block_groups + self.nprobe if alone else int(ends[-1].item())
        pieces = torch.arange(total, device=ends.device)
        return torch.searchsorted(ends, pieces, right=True).to(torch.int32), ends - tiles * blocks, tiles
