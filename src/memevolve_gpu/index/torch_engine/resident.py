"""Rows as they lie on the device, and queries as a scan of them wants them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...types import FloatArray, Metric
from .door import host_tensor, load_torch
from .geometry import GROUP, padded_columns
from .space import Space

__all__ = ["Queries", "Resident"]

_LARGEST_QUERY = 1024.0
_SLICE = 1 << 20
"""Rows at a time where a step takes some bytes for each."""


@dataclass(frozen=True, slots=True)
class Queries:
    """Queries on the device: ``wide`` float32 (nq, columns), in the rows' space, with their factor float32 (nq,).

    A row's score is ``bias - factor * dot``. ``raw`` float32 (nq, dim) is what was given; None for one query.
    """

    raw: Any
    wide: Any
    factor: Any

    @classmethod
    def prepare(cls, raw: Any, rows: Resident) -> Queries:
        """``raw`` float32 (nq, dim) on the device of ``rows``."""
        torch = load_torch()
        wide = raw if rows.metric == "ip" else raw.sub(rows.centre).mul_(rows.scale)
        if rows.columns != raw.shape[1]:
            wide = torch.nn.functional.pad(wide, (0, rows.columns - raw.shape[1]))
        return cls.entered(raw, wide.contiguous(), rows)

    @classmethod
    def entered(cls, raw: Any, wide: Any, rows: Resident) -> Queries:
        """``wide`` as :meth:`Resident.entered` gives it, on the device."""
        torch = load_torch()
        factor = 1.0 if rows.metric == "ip" else 2.0
        return cls(raw, wide, torch.full((len(wide),), factor, dtype=torch.float32, device=wide.device))

    def narrow(self) -> tuple[Any, Any]:
        """The queries in float16 (nq, columns), stretched to use its range, with the factors that undo it."""
        torch = load_torch()
        stretch = _LARGEST_QUERY / self.wide.abs().amax(1).clamp_min_(1e-30)
        return (self.wide * stretch[:, None]).to(torch.float16), self.factor / stretch


@dataclass(frozen=True, slots=True)
class Resident:
    """n rows on a device in padded groups of 32.

    x float16 or int8 (32 * groups, columns); scales float32 (32 * groups,) for int8, else empty; bias float32
    (32 * groups,), +inf in padding; living, the same with +inf for rows that died (see :class:`~.masks.Tombstones`);
    order int32 (32 * groups,), the position of each row, -1 in padding; places int32 (n,), where each position lies, or
    None where that is the position itself; full float32 (n, dim) by position, or None; centre float32 (dim,).
    """

    metric: Metric
    x: Any
    scales: Any
    bias: Any
    living: Any
    order: Any
    places: Any
    full: Any
    centre: Any
    scale: float

    @classmethod
    def empty(cls, metric: Metric, space: Space, shape: tuple[int, int, int], device: Any, **kinds: bool) -> Resident:
        """Room for ``shape`` = (n, dim, groups); kinds: ``int8``, ``full`` for float32 rows beside it, ``listed`` for
        rows in another order than that of their positions.
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
            torch.zeros((n, dim), dtype=torch.float32, device=device) if kinds.get("full") else None,
            host_tensor(space.centre).to(device),
            space.scale,
        )

    @property
    def columns(self) -> int:
        """Columns of a row, padding included."""
        return int(self.x.shape[1])

    @property
    def groups(self) -> int:
        """Groups of 32 rows, padding included."""
        return int(self.x.shape[0]) // GROUP

    def entered(self, query: FloatArray, space: Space) -> FloatArray:
        """One query, float32 (1, dim) on the host, as a scan wants it: float32 (1, columns), on the host."""
        wide = np.zeros((1, self.columns), np.float32)
        own = wide[:, : query.shape[1]]
        if self.metric == "ip":
            own[:] = query
        else:
            np.subtract(query, space.centre, out=own)
            own *= np.float32(space.scale)
        return wide

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        own = (self.x, self.scales, self.bias, self.living, self.order, self.places, self.full, self.centre)
        return sum(int(one.numel() * one.element_size()) for one in own if one is not None)

    def put(self, start: int, block: Any, places: Any, codes: tuple[Any, Any] | None, vectors: Any) -> None:
        """Fill in rows ``start`` and following at ``places`` int64 (m,).

        block float32 (m, columns) as :meth:`Space.enter` gives them; codes: int8 rows and scales, for int8;
        vectors float32 (m, dim), kept when there is room for them.
        """
        torch = load_torch()
        if codes is None:
            narrow = block.to(torch.float16)
            self.x.index_copy_(0, places, narrow)
            block = narrow.to(torch.float32)
        else:
            self.x.index_copy_(0, places, torch.nn.functional.pad(codes[0], (0, self.columns - codes[0].shape[1])))
            self.scales.index_copy_(0, places, codes[1] * self.scale)
        bias = (
            torch.zeros(len(places), dtype=torch.float32, device=self.x.device)
            if self.metric == "ip"
            else block.square().sum(1)
        )
        self.bias.index_copy_(0, places, bias)
        self.living.index_copy_(0, places, bias)
        if self.places is not None:
            self.places[start : start + len(places)] = places
        positions = torch.arange(start, start + len(places), dtype=torch.int32, device=self.x.device)
        self.order.index_copy_(0, places, positions)
        if self.full is not None:
            self.full[start : start + len(places)] = vectors

    def take_over(self, old: Resident, moved: Any) -> None:
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
        if old.full is not None and self.full is not None:
            self.full[: len(old.full)] = old.full

    def only(self, allowed: Any) -> Resident:
        """The same rows with those hidden that ``allowed`` bool (n,) on the device does not name."""
        bias = self.bias.clone()
        for start in range(0, len(bias), _SLICE):
            some = slice(start, start + _SLICE)
            shown = allowed.index_select(0, self.order[some].clamp_min(0))
            bias[some].masked_fill_(~shown, float("inf"))
        return replace(self, bias=bias)
