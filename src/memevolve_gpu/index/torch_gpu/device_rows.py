"""Rows on the device: their quantisation, padding and groups, and the queries that scan them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ...types import Device, FloatArray, Matrix, Metric, Precision, Tensor
from ..vector_table import VectorTable
from .runtime import host_tensor, load_torch, sent

GROUP = 32
"""Rows of which a scan keeps one number, the best of their scores. The k best rows of all lie in the k groups with the
best such numbers, so a scan writes 4 bytes per 32 rows and query instead of 128, and what it read is never sorted."""
BLOCK_GROUPS = 8
"""The number of groups is a multiple of this, so that no kernel needs to check where the rows end."""


def padded_columns(dim: int) -> int:
    """Columns of a row on the device: a multiple of 32 (aligned, and what matrix units want of int8), 64 from 512 on,
    so that :func:`tile_columns` stays wide."""
    step = 32 if dim < 512 else 64
    return -(-dim // step) * step


def tile_columns(columns: int, most: int = 128) -> int:
    """The widest power of two up to ``most`` that divides ``columns``."""
    return min(most, columns & -columns)


def span_columns(columns: int, most: int = 512) -> int:
    """The widest multiple of :func:`tile_columns` up to ``most`` that divides ``columns``: a kernel holds so many of a
    row's columns in registers. Twice as many spilled from 1,536 columns on (looked up in compiled kernels, sm_90).
    """
    tile = tile_columns(columns)
    return max(step for step in range(tile, max(tile, most) + 1, tile) if columns % step == 0)


def padded_groups(groups: int) -> int:
    """``groups`` rounded up to whole blocks, at least one."""
    return max(1, -(-groups // BLOCK_GROUPS)) * BLOCK_GROUPS


_BLOCK_BYTES = 32 << 20
_TYPICAL_NORM = 16.0
_LARGEST = 2.0**14
_FARTHEST = 128
"""How far away a new cluster of rows may lie, in units of the usual cluster's width. float16 rounds rows
by their length: in 8 to 1,024 dimensions recall@10 among 2,000 such rows was 1.0 up to 256 times, 0.92 to 1.0 at 400,
and 0.34 (384 dimensions) at 1,000 times."""
_CENTRE_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Quantization:
    """How vectors are stored on the device: ``(vector - centre) * scale``, in float16.

    Moving the origin changes no squared distance and moves all dot products of a query alike, so the order of rows
    stays. Around their median, in units in which a usual row has length 16 and no component exceeds 2**14, float16's
    11 significant bits serve vectors of any size and any place.
    """

    centre: FloatArray
    scale: float
    farthest: float = _FARTHEST * _TYPICAL_NORM
    """The longest new row, in this space, that is accepted."""

    @classmethod
    def around(cls, sample: FloatArray, least: FloatArray, most: FloatArray, *, centred: bool) -> Quantization:
        """For rows like ``sample`` (m, dim) whose columns lie between ``least`` and ``most`` (dim,)."""
        rows = sample[:: max(1, len(sample) // _CENTRE_ROWS)]
        centre = np.median(rows, axis=0).astype(np.float32) if centred and len(rows) else np.zeros_like(least)
        norms = np.linalg.norm((rows - centre).astype(np.float64), axis=1) if len(rows) else np.zeros(1)
        norm, long = (float(one) for one in np.quantile(norms, (0.5, 0.9)))
        reach = float(np.maximum(most - centre, centre - least).max(initial=0.0))
        scale = min(
            _TYPICAL_NORM / norm if norm > 0 else np.inf,
            _LARGEST / reach if reach > 0 else np.inf,
        )
        scale = float(np.float32(scale)) if np.isfinite(scale) else 1.0
        return cls(centre, scale, scale * max(_FARTHEST * norm, 2 * long) or _FARTHEST * _TYPICAL_NORM)

    def holds(self, vectors: FloatArray) -> bool:
        """Can float16 distinguish new ``vectors`` (m, dim) in this space, which was made for others?"""
        far = vectors - self.centre
        longest = float(np.einsum("ij,ij->i", far, far, dtype=np.float64).max(initial=0.0)) ** 0.5
        reach = float(np.abs(far, out=far).max(initial=0.0))
        return longest * self.scale <= self.farthest and reach * self.scale <= 2 * _LARGEST

    def enter(self, vectors: Matrix, columns: int, device: Device) -> Tensor:
        """``vectors`` float32 (m, dim), on the host or the device already, in this space: float32 (m, columns)."""
        torch = load_torch()
        rows = sent(vectors, device) if isinstance(vectors, np.ndarray) else vectors
        rows = rows.sub(host_tensor(self.centre).to(device)).mul_(self.scale)
        return torch.nn.functional.pad(rows, (0, columns - rows.shape[1]))


def blocks_of(table: VectorTable, first: int = 0) -> Iterator[tuple[int, FloatArray]]:
    """The rows from ``first`` on in blocks of 32 MB with the position of the first."""
    step = max(1024, _BLOCK_BYTES // (4 * table.dim))
    for start in range(first, table.n, step):
        yield start, np.ascontiguousarray(table.gather(slice(start, min(start + step, table.n))))


def measured_quantization(table: VectorTable, precision: Precision) -> Quantization:
    """The space of a table's rows; around the origin for int8, whose codes are of the rows as they are.

    The host reads its own memory: to send the rows for two numbers a column would take longer.
    """
    least = np.full(table.dim, np.inf, np.float32)
    most = np.full(table.dim, -np.inf, np.float32)
    for _, block in blocks_of(table):
        np.minimum(least, block.min(0), out=least)
        np.maximum(most, block.max(0), out=most)
    step = max(1, table.n // 1024)
    sample = table.gather(np.arange(0, table.n, step, dtype=np.int64))
    return Quantization.around(sample, least, most, centred=precision != "int8")


_LARGEST_QUERY = {False: 1024.0, True: 127.0}
_SLICE = 1 << 20
"""Rows at a time where a step takes some bytes for each."""


@dataclass(frozen=True, slots=True)
class Queries:
    """Queries on the device: ``wide`` float32 (nq, columns), in the rows' space, with their factor float32 (nq,).

    A row's score is ``bias - factor * dot``. ``raw`` float32 (nq, dim) is what was given; None for one query.
    """

    raw: Tensor
    wide: Tensor
    factor: Tensor

    @classmethod
    def prepare(cls, raw: Tensor, rows: DeviceRows) -> Queries:
        """``raw`` float32 (nq, dim) on the device of ``rows``."""
        torch = load_torch()
        wide = raw if rows.metric == "ip" else raw.sub(rows.centre).mul_(rows.scale)
        if rows.columns != raw.shape[1]:
            wide = torch.nn.functional.pad(wide, (0, rows.columns - raw.shape[1]))
        return cls.from_wide(raw, wide.contiguous(), rows)

    @classmethod
    def from_wide(cls, raw: Tensor | None, wide: Tensor, rows: DeviceRows) -> Queries:
        """``wide`` as :meth:`DeviceRows.to_device_space` returns it, on the device."""
        torch = load_torch()
        factor = 1.0 if rows.metric == "ip" else 2.0
        return cls(raw, wide, torch.full((len(wide),), factor, dtype=torch.float32, device=wide.device))

    def narrow(self, rows: DeviceRows) -> tuple[Tensor, Tensor]:
        """The queries (nq, columns) in the number format of ``rows``, float16 or int8, stretched to use its range, with
        the factors that undo it."""
        int8 = rows.x.dtype == load_torch().int8
        stretch = _LARGEST_QUERY[int8] / self.wide.abs().amax(1).clamp_min_(1e-30)
        stretched = self.wide * stretch[:, None]
        return (stretched.round_() if int8 else stretched).to(rows.x.dtype), self.factor / stretch


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """n rows on a device in padded groups of 32.

    x float16 or int8 (32 * groups, columns); scales float32 (32 * groups,) for int8, else empty; bias float32
    (32 * groups,), +inf in padding; living, the same with +inf for rows that died (see
    :class:`~.device_masks.Tombstones`); order int32 (32 * groups,), the position of each row, -1 in padding; places
    int32 (n,), where each position lies, or None where that is the position itself; float32_rows (n, dim) by position,
    or None; centre float32 (dim,).
    """

    metric: Metric
    x: Tensor
    scales: Tensor
    bias: Tensor
    living: Tensor
    order: Tensor
    places: Tensor
    float32_rows: Tensor
    centre: Tensor
    scale: float

    @classmethod
    def empty(
        cls, metric: Metric, quantization: Quantization, shape: tuple[int, int, int], device: Device, **kinds: bool
    ) -> DeviceRows:
        """Memory for ``shape`` = (n, dim, groups); kinds: ``int8``, ``float32_rows`` for float32 rows beside it,
        ``listed`` for rows in another order than that of their positions.
        """
        torch = load_torch()
        n, dim, groups = shape
        rows, columns, int8 = groups * GROUP, padded_columns(dim), kinds.get("int8")
        return cls(
            metric,
            torch.zeros((rows, columns), dtype=torch.int8 if int8 else torch.float16, device=device),
            torch.zeros(rows if int8 else 0, dtype=torch.float32, device=device),
            torch.full((rows,), float("inf"), dtype=torch.float32, device=device),
            torch.full((rows,), float("inf"), dtype=torch.float32, device=device),
            torch.full((rows,), -1, dtype=torch.int32, device=device),
            torch.zeros(n, dtype=torch.int32, device=device) if kinds.get("listed") else None,
            torch.zeros((n, dim), dtype=torch.float32, device=device) if kinds.get("float32_rows") else None,
            host_tensor(quantization.centre).to(device),
            quantization.scale,
        )

    @property
    def columns(self) -> int:
        """Columns of a row, padding included."""
        return int(self.x.shape[1])

    @property
    def groups(self) -> int:
        """Groups of 32 rows, padding included."""
        return int(self.x.shape[0]) // GROUP

    def to_device_space(self, query: FloatArray, quantization: Quantization) -> FloatArray:
        """One query, float32 (1, dim) on the host, as a scan wants it: float32 (1, columns), on the host."""
        wide = np.zeros((1, self.columns), np.float32)
        own = wide[:, : query.shape[1]]
        if self.metric == "ip":
            own[:] = query
        else:
            np.subtract(query, quantization.centre, out=own)
            own *= np.float32(quantization.scale)
        return wide

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        own = (self.x, self.scales, self.bias, self.living, self.order, self.places, self.float32_rows, self.centre)
        return sum(int(one.numel() * one.element_size()) for one in own if one is not None)

    def put(self, start: int, block: Tensor, vectors: Tensor | None = None) -> None:
        """Fill in rows ``start`` and following, where ``places`` says.

        block float32 (m, columns) as :meth:`Quantization.enter` returns them; vectors float32 (m, dim), kept where
        float32 rows are.
        """
        torch, positions = load_torch(), slice(start, start + len(block))
        at = positions if self.places is None else self.places[positions].long()
        if self.scales.numel():
            block, scales = _whole_numbers(block)
            self.x[at], self.scales[at] = block.to(torch.int8), scales
            block.mul_(scales[:, None])
        else:
            narrow = block.to(torch.float16)
            self.x[at], block = narrow, narrow.to(torch.float32)
        self.bias[at] = self.living[at] = 0.0 if self.metric == "ip" else block.square().sum(1)
        self.order[at] = torch.arange(start, positions.stop, dtype=torch.int32, device=self.x.device)
        if self.float32_rows is not None:
            self.float32_rows[positions] = vectors

    def take_over(self, old: DeviceRows, moved: Tensor) -> None:
        """Fill in the rows of ``old``, all of them alive: its group i goes to ``moved[i]``, rows stay in their groups.

        moved int64 (groups in use,).
        """
        torch = load_torch()
        used = len(moved)
        for name in ("x", "scales", "bias", "order"):
            to, of = getattr(self, name), getattr(old, name)
            if of.numel():
                to.view(self.groups, -1).index_copy_(0, moved, of.view(old.groups, -1)[:used])
        self.living.copy_(self.bias)
        if old.places is not None:
            group = torch.div(old.places, GROUP, rounding_mode="floor")
            self.places[: len(group)] = moved[group.long()] * GROUP + old.places % GROUP
        if old.float32_rows is not None and self.float32_rows is not None:
            self.float32_rows[: len(old.float32_rows)] = old.float32_rows

    def first(self, groups: int) -> DeviceRows:
        """The first ``groups`` of them, or all; nothing is copied."""
        m = min(groups, self.groups) * GROUP
        return replace(self, x=self.x[:m], scales=self.scales[:m], bias=self.bias[:m], order=self.order[:m])

    def only(self, row_filter: Tensor) -> DeviceRows:
        """The same rows with those hidden that ``row_filter`` bool (n,) on the device does not name."""
        bias = self.bias.clone()
        for start in range(0, len(bias), _SLICE):
            some = slice(start, start + _SLICE)
            shown = row_filter.index_select(0, self.order[some].clamp_min(0))
            bias[some].masked_fill_(~shown, float("inf"))
        return replace(self, bias=bias)


def _whole_numbers(block: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127, float32 (m, columns), and scales float32 (m,) that give them the length of the
    rows of ``block``."""
    step = block.abs().amax(1, keepdim=True).div_(127)
    steps = block / step.masked_fill_(step == 0, 1.0)
    whole = steps.round()
    lengths, kept = (one.square().sum(1).sqrt_() for one in (steps, whole))
    return whole, step[:, 0] * lengths / kept.clamp_min_(1.0)
