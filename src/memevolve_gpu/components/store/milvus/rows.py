"""One unit as one row, bit for bit, and back."""

from __future__ import annotations

import json
import zlib
from base64 import b85decode, b85encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....errors import CorruptStoreError, InvalidUnitError
from ....types import FloatArray, MemoryUnit
from .facts import facts_of

__all__ = ["MAX_BODY_BYTES", "Row", "body_of", "kind_of_unit", "record_of", "unit_of", "vector_of"]

MAX_BODY_BYTES = 65_535
"""The longest text that a Milvus column takes."""

MAX_KIND_CHARS = 255
_PACKED = "z"


@dataclass(frozen=True, slots=True)
class Row:
    """What is written: ``vector`` float32 (dim,); ``born``, its place in the order, and ``wrote``, when it was sent, in
    nanoseconds by the server's clock.
    """

    unit: MemoryUnit
    vector: FloatArray
    born: int
    wrote: int

    @property
    def id(self) -> str:
        return str(self.unit["id"])


def record_of(row: Row, body: str) -> dict[str, Any]:
    """The row as the client takes it."""
    facts, vague = facts_of(row.unit)
    return {
        "id": row.id,
        "vector": row.vector,
        "body": body,
        "kind": kind_of_unit(row.unit),
        "born": row.born,
        "wrote": row.wrote,
        "facts": facts,
        "vague": vague,
    }


def body_of(unit: MemoryUnit, where: str = "unit") -> str:
    """The unit's JSON, packed when it is too long for a column. Raises InvalidUnitError when that does not help."""
    text = json.dumps(unit, ensure_ascii=False, separators=(",", ":"))
    if len(text.encode()) <= MAX_BODY_BYTES:
        return text
    packed = _PACKED + b85encode(zlib.compress(text.encode(), 9)).decode()
    if len(packed) > MAX_BODY_BYTES:
        raise InvalidUnitError(
            f"{where} has {len(text.encode())} bytes as JSON and {len(packed)} packed; a row of Milvus takes "
            f"{MAX_BODY_BYTES}: split it"
        )
    return packed


def unit_of(body: str) -> MemoryUnit:
    """The unit of a column. Raises CorruptStoreError for what we have not written."""
    try:
        text = zlib.decompress(b85decode(body[1:])).decode() if body.startswith(_PACKED) else body
        unit = json.loads(text)
    except (ValueError, zlib.error) as error:
        raise CorruptStoreError(f"column body holds no unit of ours ({error}); was it written by others?") from error
    if not isinstance(unit, dict):
        raise CorruptStoreError("column body holds no unit of ours; was it written by others?")
    return unit


def vector_of(value: Any) -> FloatArray:
    """float32 (dim,) as it was written."""
    return np.asarray(value, dtype=np.float32)


def kind_of_unit(unit: Mapping[str, Any]) -> str:
    """The unit's type, for counting; "" where there is none."""
    kind = unit.get("type")
    return str(kind)[:MAX_KIND_CHARS] if kind is not None else ""
