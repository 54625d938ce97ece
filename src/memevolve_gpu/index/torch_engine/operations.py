"""The kernels where they run, their references where they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from . import reference
from .door import load_torch, triton_kernels
from .failures import cause_of, kernel_errors
from .geometry import span_columns, tile_columns
from .lists import ListWork

__all__ = ["Operations"]

T = TypeVar("T")

_ONE_GROUPS = 2
_MANY_GROUPS = 4
_LIST_GROUPS = 4
_ASSIGN_ROWS, _ASSIGN_CENTROIDS = 128, 128
_SUM_ROWS = 32
_LOCATED = 1024


class Operations:
    """The steps of a search and of training on one device; arguments and results as in :mod:`.reference`.

    A kernel that cannot be compiled or launched is not tried again: its reference answers, on the same device, and
    ``note`` is told once. Running out of memory and losing the device are not the kernel's fault and are raised.
    """

    def __init__(self, device: Any, note: Callable[[str], None], kernels: Any = None) -> None:
        """``kernels``: those of :func:`.kernels.load` for a device that would not use them by itself."""
        self._kernels, why = (kernels, "") if kernels is not None else triton_kernels(device)
        self._note = note
        self._broken: set[str] = set()
        if why and device.type == "cuda":
            note(why)

    def minima(self, rows: Any, q: Any, factor: Any) -> Any:
        """The best score of each group; a kernel of its own for one query in float32."""
        return self._either(
            "minima_one" if len(q) == 1 else "minima_many",
            self._minima_one if len(q) == 1 else self._minima_many,
            reference.minima,
            rows,
            q,
            factor,
        )

    def rescore(self, rows: Any, q: Any, factor: Any, chosen: Any) -> Any:
        """The scores of all rows of the chosen groups."""
        return self._either("rescore", self._rescore, reference.rescore, rows, q, factor, chosen)

    def locate(self, rows: Any, groups: Any, near: Any) -> Any:
        """The positions of rows that were chosen by their scores."""
        return self._either("locate", self._locate, reference.locate, rows, groups, near)

    def list_minima(self, rows: Any, q: Any, factor: Any, work: ListWork) -> Any:
        """The best score of each group of the probed lists."""
        return self._either("list_minima", self._list_minima, reference.list_minima, rows, q, factor, work)

    def assign(self, x: Any, centroids: Any, norms: Any) -> tuple[Any, Any]:
        """The nearest centroid of each row."""
        return self._either("assign", self._assign, reference.assign, x, centroids, norms)

    def sum_lists(self, x: Any, order: Any, starts: Any) -> Any:
        """The sum of each list's rows."""
        return self._either("sum_lists", self._sum_lists, reference.sum_lists, x, order, starts)

    def _either(self, name: str, kernel: Callable[..., T], plain: Callable[..., T], *args: Any) -> T:
        if self._kernels is None or name in self._broken:
            return plain(*args)
        try:
            return kernel(*args)
        except kernel_errors() as error:
            if cause_of(error) in {"out-of-memory", "device-lost", "limit"}:
                raise
            self._broken.add(name)
            text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            self._note(f"kernel {name} does not run here ({text}); torch's own operations answer")
            return plain(*args)

    def _minima_one(self, rows: Any, q: Any, factor: Any) -> Any:
        out = _floats((1, rows.groups), q)
        self._kernels.minima_one[(rows.groups // _ONE_GROUPS,)](
            rows.x,
            rows.scales,
            rows.bias,
            q,
            factor,
            out,
            dim=rows.columns,
            block_d=tile_columns(rows.columns),
            span=span_columns(rows.columns),
            block_g=_ONE_GROUPS,
            scaled=rows.scales.numel() > 0,
            num_warps=4,
        )
        return out

    def _minima_many(self, rows: Any, q: Any, factor: Any) -> Any:
        nq = len(q)
        out = _floats((nq, rows.groups), q)
        block_q = _queries_at_once(nq, 128)
        self._kernels.minima_many[(rows.groups // _MANY_GROUPS * -(-nq // block_q),)](
            rows.x,
            rows.scales,
            rows.bias,
            q,
            factor,
            out,
            rows.groups,
            nq,
            dim=rows.columns,
            block_d=tile_columns(rows.columns, 64),
            block_g=_MANY_GROUPS,
            block_q=block_q,
            scaled=rows.scales.numel() > 0,
            num_warps=8 if block_q == 128 else 4,
            num_stages=3,
        )
        return out

    def _rescore(self, rows: Any, q: Any, factor: Any, chosen: Any) -> Any:
        nq, width = chosen.shape
        out = _floats((nq, width * 32), q)
        self._kernels.rescore[(width, nq)](
            rows.x,
            rows.scales,
            rows.bias,
            q,
            factor,
            chosen,
            out,
            dim=rows.columns,
            block_d=tile_columns(rows.columns),
            span=span_columns(rows.columns),
            scaled=rows.scales.numel() > 0,
            num_warps=4,
        )
        return out

    def _locate(self, rows: Any, groups: Any, near: Any) -> Any:
        nq, count = near.indices.shape
        out = load_torch().empty((nq, count), dtype=groups.dtype, device=groups.device)
        block = max(16, min(_LOCATED, 1 << (count - 1).bit_length()))
        self._kernels.locate[(nq, -(-count // block))](
            groups,
            near.indices,
            near.values,
            rows.order,
            out,
            groups.shape[1],
            count,
            block=block,
            num_warps=1 if count <= 128 else 4,
        )
        return out

    def _list_minima(self, rows: Any, q: Any, factor: Any, work: ListWork) -> Any:
        torch = load_torch()
        out = torch.full((len(q), work.width), float("inf"), dtype=torch.float32, device=q.device)
        block_q = _queries_at_once(len(work.pairs) // work.nlist, 64)
        work_list, work_start, tiles = work.tiles(block_q, _LIST_GROUPS)
        if len(work_list):
            self._kernels.list_minima[(len(work_list),)](
                rows.x,
                rows.scales,
                rows.bias,
                q,
                factor,
                out,
                work_list,
                work_start,
                tiles,
                work.first_pair,
                work.pairs,
                work.columns,
                work.list_start,
                work.nlist,
                work.nprobe,
                work.width,
                dim=rows.columns,
                block_d=tile_columns(rows.columns, 64),
                block_g=_LIST_GROUPS,
                block_q=block_q,
                scaled=rows.scales.numel() > 0,
                num_warps=4,
                num_stages=3,
            )
        return out

    def _assign(self, x: Any, centroids: Any, norms: Any) -> tuple[Any, Any]:
        torch = load_torch()
        labels = torch.empty(len(x), dtype=torch.int32, device=x.device)
        scores = _floats((len(x),), x)
        self._kernels.assign[(-(-len(x) // _ASSIGN_ROWS),)](
            x,
            centroids,
            norms,
            labels,
            scores,
            len(x),
            len(centroids),
            dim=x.shape[1],
            block_d=tile_columns(x.shape[1], 64),
            block_n=_ASSIGN_ROWS,
            block_c=_ASSIGN_CENTROIDS,
            num_warps=8,
            num_stages=3,
        )
        return labels, scores

    def _sum_lists(self, x: Any, order: Any, starts: Any) -> Any:
        block_d = tile_columns(x.shape[1])
        out = _floats((len(starts) - 1, x.shape[1]), x)
        self._kernels.sum_lists[(len(starts) - 1, x.shape[1] // block_d)](
            x, order, starts, out, dim=x.shape[1], block_d=block_d, block_r=_SUM_ROWS, num_warps=4
        )
        return out


def _floats(shape: tuple[int, ...], like: Any) -> Any:
    torch = load_torch()
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _queries_at_once(nq: int, most: int) -> int:
    """A power of two from 16 (the least that matrix units take) to ``most``, near ``nq``."""
    return min(most, max(16, 1 << max(0, nq - 1).bit_length()))
