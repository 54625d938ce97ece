"""How rows lie on the device: in groups, padded, in wide enough columns."""

from __future__ import annotations

__all__ = ["BLOCK_GROUPS", "GROUP", "padded_columns", "padded_groups", "span_columns", "tile_columns"]

GROUP = 32
"""Rows of which a scan keeps one number, the best of their scores. The k best rows of all lie in the k groups with the
best such numbers, so a scan writes 4 bytes per 32 rows and query instead of 128, and what it read is never sorted."""
BLOCK_GROUPS = 8
"""The number of groups is a multiple of this, so that no kernel needs to ask where the rows end."""


def padded_columns(dim: int) -> int:
    """Columns of a row on the device: a multiple of 16 (aligned, and what matrix units want), 32 from 128 on, 64 from
    512 on, so that :func:`tile_columns` stays wide."""
    step = 16 if dim < 128 else 32 if dim < 512 else 64
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
