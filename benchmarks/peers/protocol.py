"""What every peer must do, so that all are given the same work.

Identifiers are whole numbers and payloads are dicts (a unit: ``type``, ``content``, ``tags``, ``metadata``); an adapter
maps both to what its peer wants. ``metadata.part``, a number from 0 to 999, is what filtered searches ask for.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["BEFORE", "EF", "Array", "Facts", "Payload", "Peer", "part_of"]

Array = npt.NDArray[np.float32]
Payload = dict[str, Any]
BEFORE = "memevolve-gpu before"
"""This store in an older state, where its source lies in ``build/before``: measured beside, never ranked."""
EF: tuple[float, ...] = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
"""Lengths of the candidate list of a graph search, close enough that none overshoots a recall by much."""


@dataclass(frozen=True)
class Facts:
    """What a peer is, can do and was set to.

    kind: a ``store`` keeps vectors, ids and units in files by itself; a ``library`` is an index in memory.
    modules: what must be installed, the first giving the version. knobs: settings of a search from the cheapest to the
    most exact; one alone means that there is nothing to set. synced: whether ``insert(synced=True)`` is on stable
    storage when it returns. durability: what an acknowledged write means, synced and by default.
    """

    name: str
    kind: Literal["store", "library"]
    modules: tuple[str, ...]
    knobs: tuple[float, ...]
    knob: str
    settings: str
    durability: str
    synced: bool = True
    default_is_synced: bool = False
    payloads: bool = True
    filters: bool = True
    updates: bool = True
    deletes: bool = True


class Peer(ABC):
    """One store or library under test. Every array of vectors is float32 (n, dim) of unit length."""

    facts: Facts

    @abstractmethod
    def open(self, folder: Path, dim: int) -> None:
        """Open what is in the folder, or make a new one there."""

    @abstractmethod
    def ingest(self, ids: Sequence[int], vectors: Array, payloads: Sequence[Payload]) -> None:
        """Take everything in the quickest documented way; when this returns a search finds all of it."""

    def settle(self) -> None:  # noqa: B027 - most have nothing left to do
        """Wait for, or do, what is left of building the index."""

    @abstractmethod
    def search(self, vectors: Array, k: int, knob: float) -> list[list[int]]:
        """The ids of the k nearest of each row, nearest first."""

    def search_units(self, vectors: Array, k: int, knob: float) -> list[list[Payload]]:
        """The same with the units as dicts."""
        raise NotImplementedError

    def search_filtered(self, vectors: Array, k: int, knob: float, below: int) -> list[list[int]]:
        """As ``search``, among the units whose ``metadata.part`` is less than ``below``."""
        raise NotImplementedError

    @abstractmethod
    def insert(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:
        """Take one unit; vector (dim,). With synced, return when it is on stable storage, where that can be had."""

    def delete(self, number: int, synced: bool) -> None:
        raise NotImplementedError

    def update(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:
        """Give an id another vector and another unit."""
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Leave everything in the files; a library saves its index."""

    def disk_bytes(self, folder: Path) -> int:
        """What the files under the folder occupy."""
        paths = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
        return sum(path.stat().st_blocks * 512 for path in paths)


def part_of(payload: Payload) -> int:
    return int(payload["metadata"]["part"])
