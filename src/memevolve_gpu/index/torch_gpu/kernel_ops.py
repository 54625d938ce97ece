"""Kernel operations: Triton where it runs, torch reference implementations elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ...errors import first_line
from ...types import Device, Tensor
from ..device_failover import cause_of
from .device_rows import BLOCK_GROUPS, GROUP, DeviceRows, span_columns, tile_columns
from .runtime import host_tensor, kernel_errors, load_torch, triton_kernels


@dataclass(frozen=True, slots=True)
class Lists:
    """The inverted lists: list i holds groups ``start[i]`` up to ``start[i + 1]`` (int64, on the device).

    ``widest[p]`` is the number of groups in the p largest lists, known on the host.
    """

    start: Tensor
    widest: tuple[int, ...]

    @classmethod
    def of(cls, groups: list[int], device: Device) -> Lists:
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

    def width(self, nprobe: int) -> int:
        """Groups in any ``nprobe`` lists, at most; a multiple of 8."""
        return -(-self.widest[nprobe] // BLOCK_GROUPS) * BLOCK_GROUPS


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
    probed: Tensor
    ends: Tensor
    columns: Tensor
    pairs: Tensor
    first_pair: Tensor
    list_start: Tensor

    @classmethod
    def of(cls, lists: Lists, probed: Tensor) -> ListWork:
        """For ``probed`` int64 (nq, nprobe), no list twice in a row."""
        torch = load_torch()
        sizes = lists.start.diff()[probed]
        ends = sizes.cumsum(1)
        ordered = torch.sort(probed.flatten(), stable=True)
        bounds = torch.arange(lists.nlist + 1, device=probed.device)
        first = torch.searchsorted(ordered.values, bounds)
        nprobe = int(probed.shape[1])
        return cls(
            lists.nlist, nprobe, lists.width(nprobe), probed, ends, ends - sizes, ordered.indices, first, lists.start
        )

    def groups_at(self, columns: Tensor) -> Tensor:
        """The groups int64 (nq, w) behind ``columns`` int64 (nq, w) of the minima."""
        torch = load_torch()
        place = torch.searchsorted(self.ends, columns, right=True).clamp_max(self.nprobe - 1)
        within = columns - self.columns.gather(1, place)
        return self.list_start[self.probed.gather(1, place)] + within

    def tiles(self, block_q: int, block_groups: int = BLOCK_GROUPS) -> tuple[Tensor, Tensor, Tensor]:
        """Cut the work into pieces of ``block_q`` pairs and ``block_groups`` groups.

        Returns:
            (work_list, work_start, tiles): the list of each piece int32 (pieces,); the first piece of each list, and
            its pairs in units of ``block_q``, int64 (nlist,).
        """
        torch = load_torch()
        tiles = (self.first_pair.diff() + block_q - 1) // block_q
        blocks = (self.list_start.diff() + block_groups - 1) // block_groups
        ends = (tiles * blocks).cumsum(0)
        pieces = torch.arange(int(ends[-1].item()), device=ends.device)
        return torch.searchsorted(ends, pieces, right=True).to(torch.int32), ends - tiles * blocks, tiles


_TILE = 1 << 24
"""Numbers held at a time."""


def minima(rows: DeviceRows, q: Tensor, factor: Tensor) -> Tensor:
    """The best score of each group: float32 (nq, groups).

    rows: :class:`~.device_rows.DeviceRows`; q float32 or in the format of the rows (nq, columns); factor float32 (nq,).
    """
    torch = load_torch()
    out = torch.empty((len(q), rows.groups), dtype=torch.float32, device=q.device)
    for some in _pieces(0, rows.groups, max(len(q), rows.columns)):
        out[:, some] = _best_in(rows, some, q, factor)
    return out


def rescore(rows: DeviceRows, q: Tensor, factor: Tensor, chosen: Tensor) -> Tensor:
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


def locate(rows: DeviceRows, groups: Tensor, near: Near) -> Tensor:
    """Positions int64 (nq, w) of the rows ``near`` names by their scores: ``values`` and ``indices`` (nq, w) into the
    rows of ``groups`` int64 (nq, any); -1 where the score is +inf.
    """
    row = groups.gather(1, near.indices // GROUP).clamp_min(0) * GROUP + near.indices % GROUP
    return rows.order[row].long().masked_fill(near.values.isinf(), -1)


def list_minima_one(rows: DeviceRows, q: Tensor, factor: Tensor, lists: Lists, probed: Tensor) -> tuple[Tensor, Tensor]:
    """For one query: the best score of each group of the lists ``probed`` int64 (1, nprobe), float32 (1, w), and the
    groups int64 (1, w); +inf and -1 behind the last."""
    torch = load_torch()
    start = lists.start[probed]
    sizes = lists.start[probed + 1] - start
    ends, column = sizes.cumsum(1), torch.arange(lists.width(probed.shape[1]), device=q.device)[None]
    place = torch.searchsorted(ends, column, right=True).clamp_max(probed.shape[1] - 1)
    groups = (start - ends + sizes).gather(1, place) + column
    groups = groups.masked_fill(column >= ends[:, -1:], -1)
    return rescore(rows, q, factor, groups).unflatten(1, (-1, GROUP)).amin(2), groups


def list_minima(rows: DeviceRows, q: Tensor, factor: Tensor, work: ListWork) -> Tensor:
    """The best score of each group of each probed list, in the columns of ``work``; +inf where there is none."""
    torch = load_torch()
    out = torch.full((len(q), work.width), float("inf"), dtype=torch.float32, device=q.device)
    starts, first = work.list_start.tolist(), work.first_pair.tolist()
    for place in range(work.nlist):
        size = starts[place + 1] - starts[place]
        pairs = work.pairs[first[place] : first[place + 1]]
        if size == 0 or len(pairs) == 0:
            continue
        query = pairs // work.nprobe
        for some in _pieces(starts[place], starts[place + 1], max(len(pairs), rows.columns)):
            within = torch.arange(some.start - starts[place], some.stop - starts[place], device=q.device)
            column = work.columns.flatten()[pairs][:, None] + within
            out[query[:, None], column] = _best_in(rows, some, q[query], factor[query])
    return out


def assign(x: Tensor, centroids: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
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


def sum_lists(x: Tensor, order: Tensor, starts: Tensor) -> Tensor:
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


class Near(NamedTuple):
    """The least values of each row, least first: ``values`` float32 (nq, w) and their columns, ``indices`` int64."""

    values: Tensor
    indices: Tensor


_FOLDED = 8
"""The fewest folds for each wanted column from which folding saves time."""


def best_columns(values: Tensor, want: int) -> Near:
    """The least of each row of ``values`` float32 (nq, w), up to ``want`` of them.

    Long rows of many queries are folded first: the least values of all lie in the folds with the least values.
    torch reads a row many times over to select from it.
    """
    torch = load_torch()
    (nq, width), folds = values.shape, values.shape[1] // BLOCK_GROUPS
    if nq == 1 or width % BLOCK_GROUPS or folds < _FOLDED * want:
        return Near(*torch.topk(values, min(want, width), dim=1, largest=False, sorted=True))
    fold = torch.topk(values.unflatten(1, (folds, -1)).amin(2), want, dim=1, largest=False, sorted=False).indices
    within = torch.arange(BLOCK_GROUPS, device=values.device)
    columns = (fold[:, :, None] * BLOCK_GROUPS + within).flatten(1)
    top = torch.topk(values.gather(1, columns), want, dim=1, largest=False, sorted=True)
    return Near(top.values, columns.gather(1, top.indices))


def _pieces(start: int, stop: int, wide: int) -> Iterator[slice]:
    """Groups ``start`` to ``stop`` (exclusive) in slices whose rows times ``wide`` numbers fit a tile."""
    step = max(1, _TILE // (GROUP * wide))
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def _best_in(rows: DeviceRows, groups: slice, q: Tensor, factor: Tensor) -> Tensor:
    """The best score of each of these groups, float32 (nq, groups)."""
    some = slice(groups.start * GROUP, groups.stop * GROUP)
    return _scores(rows, some, q, factor).unflatten(1, (-1, GROUP)).amin(2)


def _scores(rows: DeviceRows, some: slice, q: Tensor, factor: Tensor) -> Tensor:
    """Scores float32 (nq, m) of the rows in ``some``."""
    torch = load_torch()
    dots = q.to(torch.float32) @ rows.x[some].to(torch.float32).T
    if rows.scales.numel():
        dots *= rows.scales[some]
    return rows.bias[some] - factor[:, None] * dots


T = TypeVar("T")

_ONE_SPAN = 768
_chosen: dict[tuple[object, ...], int] = {}
"""What measured fastest in this process, by step, device, columns, number format and number of queries."""
_verified: set[tuple[object, ...]] = set()
"""Kernels that gave the result of their reference once, by step, device, columns and number format."""
_MEASURED_GROUPS = 8192
"""Groups on which candidates are measured: more bytes than caches hold."""
MEASURED_QUERIES = (1, 16, 64, 256, 1024)
_SHARED = 220 << 10
"""Bytes of shared memory that the largest candidates take; a card with less refuses them."""
_SELECTED = 64
"""The most columns that the kernel of that name selects."""
_LEAST_SELECTED = 32
"""So that there are two compiled forms of it; with 16, one register spilled (looked up for sm_90)."""
_SELECT_BLOCK = 512
_OFF = 4e-3
"""How far a kernel may be from its reference, relative to the largest value: half precision, sums in another order."""
_LIST_GROUPS = 4
_ASSIGN_ROWS, _ASSIGN_CENTROIDS = 128, 128
_SUM_ROWS = 32
_LOCATED = 1024


class Many(NamedTuple):
    """A shape of the scan for many queries: queries and groups at once, warps, stages of the loads, and whether the
    queries are held in shared memory while rows stream by."""

    queries: int
    groups: int
    warps: int
    stages: int
    held: bool


def _by_kernel(plain: Callable[..., T]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """A step that a kernel computes, by the launcher below, or ``plain`` where the kernel does not run."""

    def step_of(launch: Callable[..., T]) -> Callable[..., T]:
        @wraps(plain)
        def step(self: Operations, *args: Any) -> T:
            return self._either(plain.__name__, partial(launch, self), plain, *args)

        return step

    return step_of


class Operations:
    """The steps of a search and of training on one device; arguments and results as in :mod:`.kernel_ops`.

    A kernel that cannot be compiled or launched is not tried again: its reference answers, on the same device, and
    ``note`` is called once. Out of memory and a lost device are not the kernel's fault and are raised.
    """

    def __init__(self, device: Device, note: Callable[[str], None], kernels: Any = None) -> None:
        """``kernels``: those of :func:`.kernels.load` for a device that would not use them by itself."""
        self._kernels, why = (kernels, "") if kernels is not None else triton_kernels(device)
        self._note = note
        self._broken: set[str] = set()
        """Kernels that are not tried again, and what was said of their forms."""
        if why and device.type == "cuda":
            note(why)

    def tune(self, rows: DeviceRows, seconds: Callable[[Callable[[], object]], float]) -> None:
        """Measure the candidates for each step on some of ``rows`` with the clock ``seconds``, and keep the fastest for
        this process; those that do not run, or give another result than their reference, are left out."""
        if self._kernels is None:
            return
        torch, part = load_torch(), rows.first(_MEASURED_GROUPS)
        for nq in MEASURED_QUERIES:
            q = torch.randn((nq, rows.columns), dtype=torch.float32, device=rows.x.device)
            factor = torch.ones(nq, dtype=torch.float32, device=rows.x.device)
            run: Callable[..., Tensor] = self._minima_one if nq == 1 else self._minima_many
            shapes: Sequence[object] = one_shapes(rows.columns)
            if nq > 1:
                shapes = many_shapes(rows.columns, rows.x.element_size(), nq)
                q = (q * 30).round_().clamp_(-127, 127).to(rows.x.dtype)
            wanted = minima(part, q, factor)
            self._choose(_key("minima", rows, nq), shapes, partial(run, part, q, factor), wanted, seconds)
            self._choose_selection(wanted, 16, seconds)
            self._choose_selection(q.new_empty((nq, 16 * GROUP), dtype=torch.float32).normal_(), 32, seconds)

    def _choose_selection(self, values: Tensor, want: int, seconds: Callable[[Callable[[], object]], float]) -> None:
        def run(way: Callable[[Tensor, int], Near]) -> Tensor:
            near = way(values, min(want, values.shape[1]))
            columns = near.indices.clamp(0, values.shape[1] - 1)  # wrong ones must not end the device
            return load_torch().stack((near.values, values.gather(1, columns)))

        ways, wanted = (best_columns, self._select), run(best_columns)
        self._choose(_selection_key(values), ways, run, wanted, seconds)

    def _choose(
        self,
        key: tuple[object, ...],
        candidates: Sequence[T],
        run: Callable[[T], Tensor],
        wanted: Tensor,
        seconds: Callable[[Callable[[], object]], float],
    ) -> None:
        """Keep the place of the fastest candidate under ``key``, among those whose ``run`` gives ``wanted``.

        One that the device has too little shared memory for is left out in silence.
        """
        if key in _chosen:
            return
        taken = {}
        for place, candidate in enumerate(candidates):
            try:
                if agrees(run(candidate), wanted):
                    taken[place] = seconds(partial(run, candidate))
                else:
                    self._note(f"{key[0]} by {candidate} gives another result than torch here; it is not used")
            except kernel_errors() as error:
                if cause_of(error) in {"out-of-memory", "device-lost", "limit"}:
                    raise
                why = f"a form of {key[0]} does not run here ({first_line(error)}); it is not used"
                if "out of resource" not in str(error) and why not in self._broken:
                    self._broken.add(why)
                    self._note(why)
        if taken:
            _chosen[key] = min(taken, key=taken.__getitem__)

    def minima(self, rows: DeviceRows, q: Tensor, factor: Tensor) -> Tensor:
        """The best score of each group; a kernel of its own for one query in float32."""
        name, kernel = ("minima_one", self._minima_one) if len(q) == 1 else ("minima_many", self._minima_many)
        return self._either(name, kernel, minima, rows, q, factor)

    def best(self, values: Tensor, want: int) -> Near:
        """The least of each row: by the kernel where it measured faster; it takes rows of a multiple of 8 columns."""
        most = min(want, values.shape[1])
        able = most <= _SELECTED and values.shape[1] % BLOCK_GROUPS == 0
        if able and _chosen.get(_selection_key(values)) == 1:
            return self._either("select", self._select, best_columns, values, most)
        return best_columns(values, want)

    def _either(self, name: str, kernel: Callable[..., T], plain: Callable[..., T], *args: Any) -> T:
        """By the kernel where it runs; its first result in this process is compared with that of the reference."""
        if self._kernels is None or name in self._broken:
            return plain(*args)
        try:
            size = args[1] if isinstance(args[1], int) else len(args[1])
            found, key = kernel(*args), _key(name, args[0], size)
            if key in _verified:
                return found
            wanted = plain(*args)
            if agrees(found, wanted):
                _verified.add(key)
                return found
            why = "its result is not that of its reference"
        except kernel_errors() as error:
            if cause_of(error) in {"out-of-memory", "device-lost", "limit"}:
                raise
            wanted, why = plain(*args), first_line(error)
        self._broken.add(name)
        self._note(f"kernel {name} does not run here ({why}); torch's own operations answer")
        return wanted

    def _minima_one(
        self, rows: DeviceRows, q: Tensor, factor: Tensor, shape: tuple[int, int, int] | None = None
    ) -> Tensor:
        out = _floats((1, rows.groups), q)
        groups, warps, span = shape or one_shapes(rows.columns)[_chosen.get(_key("minima", rows, 1), 0)]
        self._kernels.minima_one[(rows.groups // groups,)](
            *_scan(rows, q, factor), out, **_form(rows), span=span, block_g=groups, num_warps=warps
        )
        return out

    def _minima_many(self, rows: DeviceRows, q: Tensor, factor: Tensor, shape: Many | None = None) -> Tensor:
        nq, size = len(q), rows.x.element_size()
        if shape is None:
            shape = many_shapes(rows.columns, size, _usual(nq))[_chosen.get(_key("minima", rows, nq), 0)]
        out, blocks = _floats((nq, rows.groups), q), -(-nq // shape.queries)
        tiles = rows.groups // shape.groups
        if shape.held:
            kernel, shares = self._kernels.minima_stream, _programs(rows.x.device, shape, rows.columns * size) // blocks
            tiles = max(1, min(tiles, shares))
        else:
            kernel = self._kernels.minima_many
        kernel[(tiles * blocks,)](
            *_scan(rows, q, factor),
            out,
            rows.groups,
            nq,
            **_form(rows, 128 if shape.held else 64),
            block_g=shape.groups,
            block_q=shape.queries,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
        return out

    def _select(self, values: Tensor, want: int) -> Near:
        torch, (nq, width) = load_torch(), values.shape
        best = _floats((nq, want), values)
        columns = torch.empty((nq, want), dtype=torch.int64, device=values.device)
        self._kernels.select[(nq,)](
            values.contiguous(),
            best,
            columns,
            width,
            want=want,
            kept=max(_LEAST_SELECTED, 1 << (want - 1).bit_length()),
            fold=_fold(width),
            block=_SELECT_BLOCK,
            num_warps=8,
        )
        return Near(best, columns)

    @_by_kernel(rescore)
    def rescore(self, rows: DeviceRows, q: Tensor, factor: Tensor, chosen: Tensor) -> Tensor:
        nq, width = chosen.shape
        out = _floats((nq, width * GROUP), q)
        self._kernels.rescore[(width, nq)](
            *_scan(rows, q, factor), chosen, out, **_form(rows), span=span_columns(rows.columns), num_warps=4
        )
        return out

    @_by_kernel(locate)
    def locate(self, rows: DeviceRows, groups: Tensor, near: Near) -> Tensor:
        nq, count = near.indices.shape
        out = load_torch().empty((nq, count), dtype=groups.dtype, device=groups.device)
        block = max(16, min(_LOCATED, 1 << (count - 1).bit_length()))
        given = (groups, near.indices, near.values, rows.order, out, groups.shape[1], count)
        self._kernels.locate[(nq, -(-count // block))](*given, block=block, num_warps=1 if count <= 128 else 4)
        return out

    @_by_kernel(list_minima_one)
    def list_minima_one(
        self, rows: DeviceRows, q: Tensor, factor: Tensor, lists: Lists, probed: Tensor
    ) -> tuple[Tensor, Tensor]:
        nprobe = probed.shape[1]
        width = lists.width(nprobe)
        out, groups = _floats((1, width), q), load_torch().empty((1, width), dtype=probed.dtype, device=q.device)
        self._kernels.list_minima_one[(width,)](
            *_scan(rows, q, factor),
            *(probed, lists.start, out, groups, nprobe),
            **_form(rows),
            span=span_columns(rows.columns),
            block_p=1 << (nprobe - 1).bit_length(),
            num_warps=4,
        )
        return out, groups

    @_by_kernel(list_minima)
    def list_minima(self, rows: DeviceRows, q: Tensor, factor: Tensor, work: ListWork) -> Tensor:
        torch = load_torch()
        out = torch.full((len(q), work.width), float("inf"), dtype=torch.float32, device=q.device)
        block_q = _queries_at_once(len(work.pairs) // work.nlist, 64)
        work_list, work_start, tiles = work.tiles(block_q, _LIST_GROUPS)
        if len(work_list):
            self._kernels.list_minima[(len(work_list),)](
                *_scan(rows, q, factor),
                *(out, work_list, work_start, tiles, work.first_pair, work.pairs, work.columns, work.list_start),
                *(work.nlist, work.nprobe, work.width),
                **_form(rows, 64),
                block_g=_LIST_GROUPS,
                block_q=block_q,
                num_warps=4,
                num_stages=3,
            )
        return out

    @_by_kernel(assign)
    def assign(self, x: Tensor, centroids: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        (m, dim), torch = x.shape, load_torch()
        labels, scores = torch.empty(m, dtype=torch.int32, device=x.device), _floats((m,), x)
        self._kernels.assign[(-(-m // _ASSIGN_ROWS),)](
            *(x, centroids, norms, labels, scores, m, len(centroids)),
            dim=dim,
            block_d=tile_columns(dim, 64),
            block_n=_ASSIGN_ROWS,
            block_c=_ASSIGN_CENTROIDS,
            num_warps=8,
            num_stages=3,
        )
        return labels, scores

    @_by_kernel(sum_lists)
    def sum_lists(self, x: Tensor, order: Tensor, starts: Tensor) -> Tensor:
        nlist, dim = len(starts) - 1, x.shape[1]
        block_d, out = tile_columns(dim), _floats((nlist, dim), x)
        self._kernels.sum_lists[(nlist, dim // block_d)](
            x, order, starts, out, dim=dim, block_d=block_d, block_r=_SUM_ROWS, num_warps=4
        )
        return out


def one_shapes(columns: int) -> list[tuple[int, int, int]]:
    """Candidates (groups, warps, span) for the single-query scan: spans decide how many loads are in flight."""
    wide = span_columns(columns, _ONE_SPAN)
    return list(dict.fromkeys([(2, 4, span_columns(columns)), (1, 4, wide), (2, 8, wide)]))


def many_shapes(columns: int, size: int, nq: int, shared: int = _SHARED) -> list[Many]:
    """Candidates for ``nq`` queries over rows of ``columns`` numbers of ``size`` bytes: the one that reads its queries
    again for each tile, and those that hold them in ``shared`` bytes, with two tiles of rows beside or with one part
    of a tile."""
    most, row = _queries_at_once(nq, 256), columns * size
    plain = min(most, 128)
    found = [Many(plain, 4, 8 if plain == 128 else 4, 3, held=False)]
    for queries in (most, most // 2):
        stages = next((n for n in (2, 1) if _held_bytes(queries, row, n) <= shared), 0)
        if stages and (queries == most or queries >= 64):  # few, since each is compiled once on a machine
            found.append(Many(queries, 2, 8 if queries >= 128 else 4, stages, held=True))
    return found


def _held_bytes(queries: int, row: int, stages: int) -> int:
    """Shared memory of a scan that holds its queries, as compiled for sm_90 or a little more."""
    return queries * row + (2 * 64 * row + (4 << 10) if stages == 2 else 20 << 10)


def _programs(device: Device, shape: Many, row: int) -> int:
    """How many programs of a scan run on the device at once."""
    processors = load_torch().cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
    return int(processors) * max(1, min(2, _SHARED // _held_bytes(shape.queries, row, shape.stages)))


def agrees(found: Any, wanted: Any) -> bool:
    """Whether a kernel's result is that of its reference: infinities in the same places, the rest as close as sums of
    half precision are; of whole numbers nine in ten, since equal scores have no order."""
    torch = load_torch()
    if isinstance(wanted, Near):
        return agrees(found.values, wanted.values)
    if isinstance(wanted, tuple):
        return all(agrees(*pair) for pair in zip(found, wanted, strict=True))
    if not wanted.is_floating_point():
        return wanted.numel() == 0 or float((found == wanted).float().mean()) > 0.9
    finite = wanted.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return False
    largest = wanted.abs().masked_fill(~finite, 0).amax() if wanted.numel() else 0
    return bool(((found - wanted).abs().masked_fill(~finite, 0) <= _OFF * largest).all())


def _usual(nq: int) -> int:
    """The number of queries, of those that are measured, that stands for ``nq``: the next larger one."""
    return next((one for one in MEASURED_QUERIES if nq <= one), MEASURED_QUERIES[-1])


def _key(step: str, rows: DeviceRows | Tensor, nq: int) -> tuple[object, ...]:
    x: Tensor = getattr(rows, "x", rows)
    return step, str(x.device), int(x.shape[1]), x.dtype, _usual(nq)


def _selection_key(values: Tensor) -> tuple[object, ...]:
    return "select", str(values.device), _fold(values.shape[1]), _usual(len(values))


def _fold(width: int) -> int:
    """Columns of a fold: one where a program reads the row at once anyway."""
    return 1 if width <= _SELECT_BLOCK else BLOCK_GROUPS


def _scan(rows: DeviceRows, q: Tensor, factor: Tensor) -> tuple[object, ...]:
    """The first arguments of a kernel that scores rows."""
    return rows.x, rows.scales, rows.bias, q, factor


def _form(rows: DeviceRows, most: int = 128) -> dict[str, int]:
    """What is compiled into such a kernel; it reads up to ``most`` columns at once."""
    columns = rows.columns
    return {"dim": columns, "block_d": tile_columns(columns, most), "scaled": rows.scales.numel() > 0}


def _floats(shape: tuple[int, ...], beside: Tensor) -> Tensor:
    torch = load_torch()
    return torch.empty(shape, dtype=torch.float32, device=beside.device)


def _queries_at_once(nq: int, most: int) -> int:
    """A power of two from 16 (the least that matrix units take) to ``most``, near ``nq``."""
    return min(most, max(16, 1 << max(0, nq - 1).bit_length()))
