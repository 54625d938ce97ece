"""Documents and memory units.

A document is kept as ``{"id", "content", "metadata", "langchain"}``. The store adds time stamps to the metadata;
``langchain`` lists which of them are the document's own, so that it comes back as it was given. The text that a store
embeds by itself is then the content alone, so that an edit of the metadata costs no embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from langchain_core.documents import Document

from ..components.store.units import checked_unit, unit_to_text
from ..errors import InvalidUnitError
from ..types import MemoryUnit

__all__ = ["to_document", "to_documents", "to_units"]

MARK = "langchain"
STAMPS = ("created_at", "updated_at")
"""What a store writes into ``metadata``."""

_OF_A_DOCUMENT = {"id", "content", "metadata", MARK}


def to_units(documents: Sequence[Document], ids: Sequence[str | None] | None = None) -> list[MemoryUnit]:
    """One unit per document, checked; an id is taken from ``ids``, else from the document, else it is a new UUID.

    The documents stay as they are. Raises InvalidUnitError, naming the document at fault.
    """
    if ids is not None and len(ids) != len(documents):
        raise InvalidUnitError(
            f"ids has {len(ids)} entries for {len(documents)} documents; pass one, or None, for each"
        )
    given = [None] * len(documents) if ids is None else ids
    return [
        _checked(_unit(document, own), f"documents[{position}]")
        for position, (document, own) in enumerate(zip(documents, given, strict=True))
    ]


def to_document(unit: MemoryUnit) -> Document:
    """The document that a unit was made from.

    Of a unit that came another way the metadata holds its other fields too (``type``, ``tags``, ...), as far as the
    metadata has no such key, and its time stamps.
    """
    content = unit.get("content")
    text = content if isinstance(content, str) else unit_to_text(unit)
    return Document(id=unit["id"], page_content=text, metadata=_metadata(unit))


def to_documents(units: Sequence[MemoryUnit]) -> list[Document]:
    """One document per unit, in order."""
    return [to_document(unit) for unit in units]


def _unit(document: Document, own_id: str | None) -> MemoryUnit:
    metadata = document.metadata
    unit_id = own_id if own_id is not None else document.id
    return {
        "id": str(uuid4()) if unit_id is None else unit_id,
        "content": document.page_content,
        "metadata": metadata,
        MARK: [stamp for stamp in STAMPS if stamp in metadata],
    }


def _checked(unit: MemoryUnit, where: str) -> MemoryUnit:
    try:
        return checked_unit(unit, where)
    except RecursionError:
        raise InvalidUnitError(f"{where} is nested too deeply or contains itself; flatten its metadata") from None


def _metadata(unit: MemoryUnit) -> dict[str, Any]:
    metadata: dict[str, Any] = unit.get("metadata") or {}
    own = unit.get(MARK)
    if isinstance(own, list):
        return {key: value for key, value in metadata.items() if key not in STAMPS or key in own}
    rest = {key: value for key, value in unit.items() if key not in _OF_A_DOCUMENT}
    return {**rest, **metadata}
