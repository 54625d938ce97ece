"""The command that tries the embedding function out: embed."""

from __future__ import annotations

import time
from typing import Annotated, Any

import numpy as np
import typer

from ..components.store.vector_store import VectorStore
from ..errors import DimensionMismatchError, ModelMismatchError
from ..records import Records
from ..types import FloatArray
from ..utils.embeddings import Embedder as Checked
from .opening import EmbedderName, choose_embedder, remembered_model, store_at
from .options import AsJson, Embedder, Prefix
from .output import Output, Rows

__all__ = ["embed"]


def embed(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="What to embed.")],
    *,
    store: Prefix = None,
    embedder: Embedder = EmbedderName.AUTO,
    as_json: AsJson = False,
) -> None:
    """Embed texts and show what came of it: does the service answer, and does it fit the store?

    With --json the vectors are printed; for people the model, the dimension and how similar the texts are. Exits with 6
    when the embedder fails, or when a store is there that another model filled. Stores nothing.
    """
    prefix = store_at(store)
    held = remembered_model(prefix)
    checked = Checked(choose_embedder(embedder, held))
    started = time.perf_counter()
    vectors = checked.embed_many(texts)
    seconds = time.perf_counter() - started
    _refuse_misfit(prefix, checked, held)
    document = {
        "model": checked.model_name,
        "dimension": vectors.shape[1],
        "seconds": seconds,
        "vectors": vectors.tolist(),
    }
    rows: list[list[str]] = [
        [f"{length:.4f}", f"{cosine:.4f}", text] for length, cosine, text in _described(vectors, texts)
    ]
    told = f"{checked.model_name or 'a model without a name'}: {vectors.shape[1]} numbers, {seconds * 1e3:.1f} ms"
    Output(as_json).show(document, told, Rows(("length", "cosine to first", "text"), rows))


def _refuse_misfit(prefix: str, checked: Checked, held: str | None) -> None:
    """Raise what opening the store with this embedder would raise."""
    if not VectorStore.exists_at(prefix):
        return
    facts = Records.peek(prefix)
    if facts is not None and facts.dim != checked.dimension:
        raise DimensionMismatchError(facts.dim, checked.dimension, f"the store {prefix} was filled by another model")
    if held and checked.model_name and held != checked.model_name:
        raise ModelMismatchError(
            f"the store {prefix} was filled by the embedding model {held!r}, this is {checked.model_name!r}"
        )


def _described(vectors: FloatArray, texts: list[str]) -> list[tuple[float, float, str]]:
    lengths = np.linalg.norm(vectors, axis=1)
    scaled: Any = vectors / np.where(lengths > 0, lengths, 1)[:, None]
    return list(zip(lengths.tolist(), (scaled @ scaled[0]).tolist(), texts, strict=True))
