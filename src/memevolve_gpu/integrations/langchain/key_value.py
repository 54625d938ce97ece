"""``MemEvolveKeyValueStore``: LangChain's key-value store, for cached embeddings, parent documents and the like."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from langchain_core.stores import BaseStore

from ...components.store.units import is_id
from ...components.store.vector_store import VectorStore
from ...errors import InvalidUnitError
from ...types import Json, JsonObject
from ...utils.arguments import listed, shown

_Self = TypeVar("_Self", bound="MemEvolveKeyValueStore")


class MemEvolveKeyValueStore(BaseStore[str, Any]):
    """Keeps bytes and JSON values by key in a file of its own, durable when a call returns.

    It is a ``ByteStore`` where the values are bytes. Several processes and threads may use one file.

    Examples:
        >>> import tempfile
        >>> from memevolve_gpu.integrations.langchain import MemEvolveKeyValueStore
        >>> with tempfile.TemporaryDirectory() as folder, MemEvolveKeyValueStore(f"{folder}/cache") as store:
        ...     store.mset([("a", b"bytes"), ("b", {"json": 1})])
        ...     store.mget(["b", "a", "c"])
        [{'json': 1}, b'bytes', None]
    """

    def __init__(self, index_file: str | os.PathLike[str], storage_config: object = None) -> None:
        """Open the store at a path prefix, or make it.

        Args:
            index_file: The path prefix, of no store with other units.
            storage_config: As for ``VectorStore``; ``max_memory_units`` limits the number of keys.

        Raises:
            MemEvolveError: As ``VectorStore``.
        """
        self._store = VectorStore(index_file, None, 1, storage_config=storage_config)

    def mget(self, keys: Sequence[str]) -> list[Json]:
        """Return the value of each key, or None.

        Args:
            keys: The keys.

        Returns:
            The values in the order of the keys.

        Raises:
            InvalidUnitError: ``keys`` is not a list.
        """
        wanted = listed("keys", keys, InvalidUnitError)
        found = self._store.retrieve_batch(wanted)
        return [_value(found[key]) if is_id(key) and key in found else None for key in wanted]

    def mset(self, key_value_pairs: Sequence[tuple[str, Json]]) -> None:
        """Store values, all or none; those of known keys are replaced.

        Args:
            key_value_pairs: (key, bytes or a JSON value) pairs.

        Raises:
            InvalidUnitError: A key is no text of 1 to 1024 characters, or JSON cannot represent a value.
            CapacityError: There are more keys than ``max_memory_units``.
        """
        units = []
        for pair in listed("key_value_pairs", key_value_pairs, InvalidUnitError):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise InvalidUnitError(f"key_value_pairs must be pairs of key and value, got {shown(pair)}")
            key, value = pair
            if not isinstance(key, str):
                raise InvalidUnitError(f"a key must be a string, got {shown(key)}")
            kept = {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else {"json": value}
            units.append({"id": key, "content": "", "value": kept})
        if units:
            self._store.store_batch(units, [[0.0]] * len(units))

    def mdelete(self, keys: Sequence[str]) -> None:
        """Delete the keys that exist.

        Args:
            keys: The keys.

        Raises:
            InvalidUnitError: ``keys`` is not a list.
        """
        self._store.delete_batch(listed("keys", keys, InvalidUnitError))

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """Iterate over the keys, the oldest first.

        Args:
            prefix: The start of the keys; None for all.

        Returns:
            The keys.

        Raises:
            InvalidUnitError: ``prefix`` is no string.
        """
        if prefix is not None and not isinstance(prefix, str):
            raise InvalidUnitError(f"prefix must be a string, got {shown(prefix)}")
        return (unit["id"] for unit in self._store.units() if unit["id"].startswith(prefix or ""))

    def close(self) -> None:
        """Close the file."""
        self._store.close()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _value(unit: JsonObject) -> Json:
    kept = unit["value"]
    return base64.b64decode(kept["base64"]) if "base64" in kept else kept["json"]
