"""What callers give, checked where it comes in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.documents import Document

from ..errors import InvalidQueryError, InvalidUnitError
from ..utils.arguments import whole_number
from .filters import Conjunction, alternatives

__all__ = ["Asked", "batches", "checked_ids", "documents_of", "no_more", "pairs_of", "query_text"]


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of one search, checked. ``filters`` are alternatives; ``fetch_k`` is at least ``k``."""

    k: int
    fetch_k: int
    filters: list[Conjunction]
    recall: float | None

    @classmethod
    def of(cls, k: int, options: dict[str, Any], fetch_k: int | None = None) -> Asked:
        rest = dict(options)
        filters = alternatives(rest.pop("filter", None), rest.pop("filters", None))
        recall = rest.pop("recall", None)
        no_more(rest)
        wanted = whole_number("k", k)
        return cls(
            wanted, wanted if fetch_k is None else max(wanted, whole_number("fetch_k", fetch_k)), filters, recall
        )


def documents_of(texts: Iterable[str], metadatas: Sequence[dict[str, Any]] | None) -> list[Document]:
    """One document per text. Raises InvalidUnitError when the two have not the same length."""
    given = list(texts)
    if not metadatas:
        return [Document(page_content=text) for text in given]
    if len(metadatas) != len(given):
        raise InvalidUnitError(f"metadatas has {len(metadatas)} entries for {len(given)} texts; pass one for each")
    return [Document(page_content=text, metadata=one or {}) for text, one in zip(given, metadatas, strict=True)]


def pairs_of(
    text_embeddings: Iterable[tuple[str, Sequence[float]]] | None,
    embeddings: Iterable[Sequence[float]] | None,
    metadatas: Sequence[dict[str, Any]] | None,
) -> list[tuple[str, Sequence[float]]]:
    """(text, vector) pairs; of vectors alone the texts are ``data`` in the metadata, or empty."""
    if embeddings is None:
        return list(text_embeddings or ())
    if text_embeddings is not None:
        raise InvalidUnitError("text_embeddings and embeddings exclude each other; give one of them")
    vectors = list(embeddings)
    texts = [str((one or {}).get("data") or "") for one in metadatas or [{}] * len(vectors)]
    if len(texts) != len(vectors):
        raise InvalidUnitError(f"metadatas has {len(texts)} entries for {len(vectors)} vectors; pass one for each")
    return list(zip(texts, vectors, strict=True))


def batches(texts: list[str], batch_size: int | None) -> list[list[str]]:
    """The texts in lists of at most ``batch_size``, in order; all in one when it is None."""
    size = len(texts) if batch_size is None else whole_number("batch_size", batch_size)
    return [texts[start : start + size] for start in range(0, len(texts), size or 1)]


def checked_ids(ids: Sequence[str]) -> list[str]:
    """The ids as a list; a string is refused, for it would be read as one id per letter."""
    if isinstance(ids, str):
        raise InvalidUnitError(f"ids must be a list of ids, got the string {ids[:40]!r}; write [{ids[:40]!r}]")
    return list(ids)


def query_text(query: str) -> str:
    """The query itself, once it is known to be a string."""
    if not isinstance(query, str):
        raise InvalidQueryError(f"query must be a string, got {type(query).__name__}; see similarity_search_by_vector")
    return query


def no_more(options: Mapping[str, Any]) -> None:
    """Refuse options that nobody knows."""
    if options:
        unknown = ", ".join(map(repr, options))
        raise InvalidQueryError(
            f"unknown option {unknown}; leave it out, or see docs/how-to/langchain.md for what is taken"
        )
