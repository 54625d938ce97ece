"""Filters on the device, kept while they are in use."""

from __future__ import annotations

import threading
from collections import OrderedDict

from ..allowed import Allowed
from .door import host_tensor
from .resident import Resident

__all__ = ["Masks"]

_KEPT_BYTES = 64 << 20
_KEPT = 8


class Masks:
    """The last few filters as rows with the others hidden: 4 bytes per row and filter, 64 MB in all or one.

    A filter is known by the object that states it, which is kept alive as long as it is remembered here.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[int, tuple[Allowed, Resident]] = OrderedDict()
        self._lock = threading.Lock()

    def rows(self, resident: Resident, allowed: Allowed) -> Resident:
        """``resident`` with the rows hidden that are not ``allowed``; the same numbers in the same places."""
        with self._lock:
            known = self._kept.get(id(allowed))
            if known is not None:
                self._kept.move_to_end(id(allowed))
                return known[1]
            shown = host_tensor(allowed.rows.view("u1")).to(resident.x.device).bool()
            hidden = resident.only(shown)
            self._kept[id(allowed)] = (allowed, hidden)
            most = max(1, min(_KEPT, _KEPT_BYTES // (hidden.bias.numel() * 4)))
            while len(self._kept) > most:
                self._kept.popitem(last=False)
            return hidden

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._kept.clear()
