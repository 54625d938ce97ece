"""What each Triton kernel computes, in torch's own operations: their oracle, and the way on devices without them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .door import load_torch
from .geometry import GROUP
from .lists import ListWork

__all__ = ["assign", "list_minima", "locate", "minima", "rescore", "sum_lists"]

_TILE = 1 << 24
"""Numbers held at a time."""


def minima(rows: Any, q: Any, factor: Any) -> Any:
    """The best score of each group: float32 (nq, groups).

    rows: a :class:`~.resident.Resident`; q float32 or float16 (nq, columns); factor float32 (nq,).
    """
    torch = load_torch()
    out = torch.empty((len(q), rows.groups), dtype=torch.float32, device=q.device)
    for some in _pieces(0, rows.groups, max(len(q), rows.columns)):
        out[:, some] = _best_in(rows, some, q, factor)
    return out


def rescore(rows: Any, q: Any, factor: Any, chosen: Any) -> Any:
    """The scores of all rows of ``chosen`` groups int64 (nq, w): float32 (nq, 32 * w), +inf for group -1."""
    torch = load_torch()
    nq, width = chosen.shape
    out = torch.empty((nq, width, GROUP), dtype=torch.float32, device=q.device)
    x, bias = rows.x.unflatten(0, (-1, GROUP)), rows.bias.unflatten(0, (-1, GROUP))
    step = max(1, _TILE // max(1, width * GROUP * rows.columns))
    for start in range(0, nq, step):
        some = slice(start, start + step)
        at = chosen[some].clamp_min(0)
        dots = (x[at].to(torch.float32) * q[some, None, None].to(torch.float32)).sum(3)
        if rows.scales.numel():
            dots *= rows.scales.unflatten(0, (-1, GROUP))[at]
        scores = bias[at] - factor[some, None, None] * dots
        out[some] = scores.masked_fill((chosen[some] < 0)[..., None], float("inf"))
    return out.flatten(1)


def locate(rows: Any, groups: Any, near: Any) -> Any:
    """Positions int64 (nq, w) of the rows ``near`` names by their scores: ``values`` and ``indices`` (nq, w) into the
    rows of ``groups`` int64 (nq, any); -1 where the score is +inf.
    """
    row = groups.gather(1, near.indices // GROUP).clamp_min(0) * GROUP + near.indices % GROUP
    return rows.order[row].long().masked_fill(near.values.isinf(), -1)


def list_minima(rows: Any, q: Any, factor: Any, work: ListWork) -> Any:
    """The best score of each group of each probed list, in the columns of ``work``; +inf where there is none."""
    torch = load_torch()
    out = torch.full((len(q), work.width), float("inf"), dtype=torch.float32, device=q.device)
    starts, first = work.list_start.tolist(), work.first_pair.tolist()
    for place in range(work.nlist):
        size = starts[place + 1] - starts[place]
        pairs = work.pairs[first[place] : first[place + 1]]
        if size == 0 or len(pairs) == 0:
            continue
        asking = pairs // work.nprobe
        for some in _pieces(starts[place], starts[place + 1], max(len(pairs), rows.columns)):
            within = torch.arange(some.start - starts[place], some.stop - starts[place], device=q.device)
            column = work.columns.flatten()[pairs][:, None] + within
            out[asking[:, None], column] = _best_in(rows, some, q[asking], factor[asking])
    return out


def assign(x: Any, centroids: Any, norms: Any) -> tuple[Any, Any]:
    """The nearest centroid of each row, the first of equals: int32 (m,), and |c|^2 - 2 x.c: float32 (m,).

    x and centroids float16 (m, columns) and (nlist, columns); norms float32 (nlist,).
    """
    torch = load_torch()
    labels = torch.empty(len(x), dtype=torch.int32, device=x.device)
    scores = torch.empty(len(x), dtype=torch.float32, device=x.device)
    wide, step = centroids.to(torch.float32).T, max(1, _TILE // max(len(centroids), x.shape[1]))
    for start in range(0, len(x), step):
        least = torch.min(norms - 2 * (x[start : start + step].to(torch.float32) @ wide), 1)
        scores[start : start + step], labels[start : start + step] = least.values, least.indices.to(torch.int32)
    return labels, scores


def sum_lists(x: Any, order: Any, starts: Any) -> Any:
    """The sum of each list's rows, float32 (nlist, columns): list i holds rows ``order[starts[i]:starts[i + 1]]``."""
    torch = load_torch()
    nlist = len(starts) - 1
    out = torch.zeros((nlist, x.shape[1]), dtype=torch.float32, device=x.device)
    owner = torch.repeat_interleave(torch.arange(nlist, device=x.device), starts.diff())
    step = max(1, _TILE // x.shape[1])
    for start in range(0, len(owner), step):
        some = slice(start, start + step)
        out.index_add_(0, owner[some], x[order[some]].to(torch.float32))
    return out


def _pieces(start: int, stop: int, wide: int) -> Iterator[slice]:
    """Groups ``start`` to ``stop`` (exclusive), so many at a time that their rows times ``wide`` numbers fit a tile."""
    step = max(1, _TILE // (GROUP * wide))
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def _best_in(rows: Any, groups: slice, q: Any, factor: Any) -> Any:
    """The best score of each of these groups, float32 (nq, groups)."""
    some = slice(groups.start * GROUP, groups.stop * GROUP)
    return _scores(rows, some, q, factor).unflatten(1, (-1, GROUP)).amin(2)


def _scores(rows: Any, some: slice, q: Any, factor: Any) -> Any:
    """Scores float32 (nq, m) of the rows in ``some``."""
    torch = load_torch()
    dots = q.to(torch.float32) @ rows.x[some].to(torch.float32).T
    if rows.scales.numel():
        dots *= rows.scales[some]
    return rows.bias[some] - factor[:, None] * dots
