"""A bounded dictionary that drops what was not used for longest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """At most ``capacity`` values by key; the least recently used one is dropped first. Callers lock it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        """May be changed at any time; the next :meth:`put` keeps to it."""
        self._entries: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def get(self, key: K) -> V | None:
        """The value of ``key``, which counts as used now; None where there is none."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def peek(self, key: K) -> V | None:
        """As :meth:`get`; the value does not count as used."""
        return self._entries.get(key)

    def put(self, key: K, value: V) -> V:
        """Keep ``value``, drop what is beyond the capacity, and return ``value``."""
        self._entries[key] = value
        self._entries.move_to_end(key)
        while len(self._entries) > self.capacity:
            self._entries.popitem(last=False)
        return value

    def __iter__(self) -> Iterator[K]:
        """All keys, least recently used first."""
        return iter(list(self._entries))

    def drop(self, key: K) -> None:
        """Forget the value of ``key``, if there is one."""
        self._entries.pop(key, None)

    def values(self) -> list[V]:
        """All values, least recently used first."""
        return list(self._entries.values())

    def clear(self) -> None:
        self._entries.clear()
