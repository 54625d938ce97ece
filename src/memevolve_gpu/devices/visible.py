"""The GPUs of a machine as CUDA shows them to this process, by the variables that steer it.

CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER are NVIDIA's (CUDA C++ Programming Guide, "CUDA Environment Variables"); the
driver's own lists, which are in the order of the PCI bus, obey neither.
"""

from __future__ import annotations

import re

__all__ = ["BY_BUS", "chosen", "is_by_number", "names_slices"]

BY_BUS = "PCI_BUS_ID"
"""CUDA_DEVICE_ORDER under which CUDA numbers GPUs as the driver lists them; by default the fastest comes first."""

_NUMBER = re.compile(r"\s*\+?([0-9]{1,9})")


def is_by_number(visible: str | None) -> bool:
    """Are GPUs numbered, so that their numbers depend on the order in which CUDA counts?"""
    return visible is None or not visible.strip().startswith("GPU-")


def names_slices(visible: str | None) -> bool:
    """Does the variable name MIG slices?"""
    return visible is not None and visible.strip().startswith("MIG-")


def chosen(visible: str | None, uuids: list[str]) -> list[int]:
    """Places in ``uuids`` of the GPUs that CUDA shows, in its order.

    Entries count up to the first that names no GPU: a number out of range or below 0, a text, a start of an UUID that
    fits none or several. The same entry twice leaves nothing. ``1gpu`` is 1, as C's strtoul reads it.

    Args:
        visible: CUDA_VISIBLE_DEVICES; None shows all.
        uuids: of all GPUs, in the order of their numbers.
    """
    if visible is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for entry in visible.split(","):
        place = _numbered(entry, len(uuids)) if is_by_number(visible) else _named(entry.strip(), uuids)
        if place in found:
            return []
        if place is None:
            break
        found.append(place)
    return found


def _numbered(entry: str, count: int) -> int | None:
    number = _NUMBER.match(entry)
    return int(number[1]) if number is not None and int(number[1]) < count else None


def _named(entry: str, uuids: list[str]) -> int | None:
    matching = [place for place, uuid in enumerate(uuids) if uuid.startswith(entry)]
    return matching[0] if len(entry) > len("GPU-") and len(matching) == 1 else None
