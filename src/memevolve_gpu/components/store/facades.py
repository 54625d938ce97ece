"""Read-only faces that users of the old store know: ``store.data`` and ``store.index``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...live import LiveIndex, Maintenance
from ...records.records import Records
from ...types import MemoryUnit
from .units import is_id

__all__ = ["IndexFace", "UnitMapping"]


class UnitMapping(Mapping[str, MemoryUnit]):
    """id -> unit, read from the records at each access; never a copy of the store in memory."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def __getitem__(self, unit_id: str) -> MemoryUnit:
        unit = self._records.get(unit_id) if is_id(unit_id) else None
        if unit is None:
            raise KeyError(unit_id)
        return unit

    def __contains__(self, unit_id: object) -> bool:
        return is_id(unit_id) and self._records.exists(unit_id)

    def __iter__(self) -> Iterator[str]:
        return self._records.ids()

    def __len__(self) -> int:
        return self._records.count()

    def __repr__(self) -> str:
        return f"<{len(self)} memory units>"


class IndexFace:
    """What the index holds now; every property is up to date with the records."""

    def __init__(self, live: LiveIndex, maintenance: Maintenance) -> None:
        self._live = live
        self._maintenance = maintenance

    @property
    def ntotal(self) -> int:
        """Live vectors."""
        return self._live.catch_up().count

    @property
    def nlist(self) -> int:
        """Inverted lists of the body in use; 0 while none are used."""
        return self._live.view.body.nlist

    @property
    def is_trained(self) -> bool:
        """Does the body in use need no training, or has it been trained? Never False while it answers."""
        return True

    @property
    def is_building(self) -> bool:
        """Is a round of maintenance on in this process? Searches go on meanwhile."""
        return self._maintenance.running

    @property
    def kind(self) -> str:
        """exact, two_stage, ivf or hnsw."""
        return self._live.view.body.kind
