"""The one bounded cache of the package."""

from __future__ import annotations

from memevolve_gpu.utils.lru import LruCache


def test_the_least_recently_used_value_is_dropped_first() -> None:
    cache: LruCache[str, int] = LruCache(2)
    for key, value in (("a", 1), ("b", 2)):
        assert cache.put(key, value) == value
    assert cache.get("a") == 1, "b is now the one not used for longest"
    cache.put("c", 3)
    assert (cache.get("b"), len(cache), cache.values()) == (None, 2, [1, 3])


def test_a_value_put_again_replaces_the_old_one_and_counts_as_used() -> None:
    cache: LruCache[str, int] = LruCache(2)
    for key, value in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
        cache.put(key, value)
    assert cache.values() == [3, 4]


def test_a_smaller_capacity_holds_from_the_next_value_on() -> None:
    cache: LruCache[int, int] = LruCache(8)
    for key in range(8):
        cache.put(key, key)
    cache.capacity = 1
    assert len(cache) == 8
    cache.put(9, 9)
    assert cache.values() == [9]
    cache.clear()
    assert len(cache) == 0
