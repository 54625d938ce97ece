"""The device's part of a search: best groups, best rows, float32 distances, in batches that fit the scratch memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...types import Device, FloatArray, IntArray, Matrix, Tensor
from .device_rows import BLOCK_GROUPS, GROUP, DeviceRows, Queries
from .kernel_ops import Lists, ListWork, Operations
from .memory_accounting import SCRATCH, Account
from .runtime import fetched, host_tensor, load_torch, sent


def some(queries: Matrix, rows: IntArray) -> Matrix:
    """These rows of the queries, which are an array or a tensor."""
    if isinstance(queries, np.ndarray):
        return np.ascontiguousarray(queries[rows])
    return queries[host_tensor(rows).to(queries.device)]


def widened(positions: IntArray, want: int) -> IntArray:
    """``positions`` (nq, w) with ``want`` columns, -1 in the new ones; C-contiguous."""
    if positions.shape[1] == want:
        return np.ascontiguousarray(positions)
    wide = np.full((len(positions), want), -1, np.int64)
    wide[:, : positions.shape[1]] = positions[:, :want]
    return wide


def columns(distances: FloatArray, positions: IntArray, k: int) -> tuple[FloatArray, IntArray]:
    """The first k columns of both, C-contiguous."""
    return np.ascontiguousarray(distances[:, :k]), np.ascontiguousarray(positions[:, :k])


def joined(found: list[tuple[FloatArray | None, IntArray]], want: int) -> tuple[FloatArray | None, IntArray]:
    """The results of batches of queries, one below the other, with ``want`` columns."""
    positions = np.concatenate([widened(one, want) for _, one in found])
    if found[0][0] is None:
        return None, positions
    distances = np.full(positions.shape, np.inf, np.float32)
    row = 0
    for own, _ in found:
        if own is not None:
            distances[row : row + len(own), : own.shape[1]] = own
            row += len(own)
    return distances, positions


LEAST_CANDIDATES = 32
"""The fewest rows that are proposed, so that float16 loses none of those that are wanted."""
SPARE_GROUPS = 6
"""Groups that are looked into beyond one for each result: the k best rows lie in the k best groups, and rounding may
put others before them."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Which lists a search reads: the ``nprobe`` whose centroids are nearest; 0 for all rows.

    centroids float32 (nlist, columns) and norms float32 (nlist,), zeros under inner product.
    """

    lists: Lists
    centroids: Tensor
    norms: Tensor
    nprobe: int

    def lists_of(self, queries: Queries, operations: Operations) -> Tensor:
        """The lists of each query, int64 (nq, nprobe)."""
        torch = load_torch()
        if len(queries.wide) == 1:  # without cuBLAS, whose own buffers no recording should hold
            dots = (self.centroids * queries.wide).sum(1)[None]
        else:
            dots = queries.wide @ self.centroids.T
        scores = torch.addcmul(self.norms, queries.factor[:, None], dots, value=-1)
        return operations.best(scores, self.nprobe).indices


def propose(
    rows: DeviceRows, queries: Queries, widths: tuple[int, int], operations: Operations, probe: Probe | None
) -> Tensor:
    """The best rows of each query by the narrow rows, as positions int64 (nq, up to want), best first, -1 at the end
    where fewer were met. widths: ``want`` rows, from as many groups as the second number says.
    """
    want, most = widths
    if probe is None:
        given = (queries.wide, queries.factor) if len(queries.wide) == 1 else queries.narrow(rows)
        groups = operations.best(operations.minima(rows, *given), most).indices
    elif len(queries.wide) == 1:
        probed = probe.lists_of(queries, operations)
        best, groups = operations.list_minima_one(rows, queries.wide, queries.factor, probe.lists, probed)
        groups = groups.gather(1, operations.best(best, most).indices)
    else:
        work = ListWork.of(probe.lists, probe.lists_of(queries, operations))
        near = operations.best(operations.list_minima(rows, *queries.narrow(rows), work), most)
        # A group without a row that may be found scores +inf; columns behind a query's lists have no group.
        groups = work.groups_at(near.indices).masked_fill_(near.values.isinf(), -1)
    scores = operations.rescore(rows, queries.wide, queries.factor, groups)
    return operations.locate(rows, groups, operations.best(scores, want))


def decide(rows: DeviceRows, queries: Queries, positions: Tensor, k: int, *, cosine: bool) -> tuple[Tensor, Tensor]:
    """The k nearest of ``positions`` int64 (nq, w) by float32 rows: distances float32 and positions, (nq, up to k)."""
    torch = load_torch()
    missing = positions < 0
    found = rows.float32_rows[positions.clamp_min(0)]
    if rows.metric == "l2" and not cosine:
        distances = found.sub_(queries.raw[:, None]).square_().sum(2)
    else:
        dots = found.mul_(queries.raw[:, None]).sum(2)
        distances = (1 - dots).clamp_min(0) if cosine else -dots
    distances = distances.masked_fill(missing, float("inf"))
    ordered = torch.sort(distances, dim=1, stable=True)
    return ordered.values[:, :k], positions.gather(1, ordered.indices)[:, :k]


def scratch_each(rows: DeviceRows, widths: tuple[int, int], width: int) -> int:
    """Bytes that one query of a batch takes: ``width`` minima and those of their folds, the candidates' scores (twice:
    what selects the best of them may copy them), and their float32 rows."""
    want, chosen = widths[0], min(widths[1], width)
    float32_rows = 0 if rows.float32_rows is None else 4 * want * int(rows.float32_rows.shape[1])
    return (
        4 * width + 4 * width // BLOCK_GROUPS + 8 * chosen * (GROUP + 8) + 24 * want + float32_rows + 12 * rows.columns
    )


_MOST_QUERIES = 16_384


@dataclass(frozen=True, slots=True)
class Search:
    """What is searched: rows on a device, all of them or the lists of ``probe``, on the account of that device."""

    rows: DeviceRows
    device: Device
    operations: Operations
    probe: Probe | None
    account: Account
    cosine: bool

    def scratch_each(self, widths: tuple[int, int]) -> int:
        """Bytes that a query takes for a moment."""
        width = self.rows.groups if self.probe is None else self.probe.lists.widest[self.probe.nprobe]
        return scratch_each(self.rows, widths, width)


def found_in_batches(
    search: Search, queries: Matrix, widths: tuple[int, int], batch: int
) -> tuple[FloatArray | None, IntArray]:
    """Candidates (nq, want), at most ``batch`` queries at once, in equal parts; with their distances, nearest first,
    where float32 rows lie on the device. widths as in :func:`propose`.
    """
    each, want, found = search.scratch_each(widths), widths[0], []
    most = max(1, min(batch, _MOST_QUERIES, SCRATCH // each))
    step = -(-len(queries) // -(-len(queries) // most))
    for start in range(0, len(queries), step):
        part = queries[start : start + step]
        with search.account.scratch(each * len(part), "a search"):
            prepared = Queries.prepare(sent(part, search.device), search.rows)
            positions = propose(search.rows, prepared, widths, search.operations, search.probe)
            found.append(_decided(search, prepared, positions, want))
    return joined(found, want)


def _decided(search: Search, queries: Queries, positions: Tensor, k: int) -> tuple[FloatArray | None, IntArray]:
    if search.rows.float32_rows is None:
        return None, fetched(positions)
    distances, positions = decide(search.rows, queries, positions, k, cosine=search.cosine)
    return fetched(distances), fetched(positions)
