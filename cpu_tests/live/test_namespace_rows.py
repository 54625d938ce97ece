"""The rows of an index by namespace, and the times at which rows expire, against plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memevolve_gpu.index.bitmap import RowFilter, RowList
from memevolve_gpu.live.delta_buffer import DeltaBuffer
from memevolve_gpu.live.namespaces import Expiring, RowGroups, grouped, joined

KEYS = st.lists(st.integers(0, 5), max_size=60)


@given(keys=KEYS, wanted=st.lists(st.integers(0, 6), unique=True, max_size=4))
def test_groups_hold_the_rows_of_each_namespace(keys: list[int], wanted: list[int]) -> None:
    groups = RowGroups(np.array(keys, np.int32))
    rows = [row for row, key in enumerate(keys) if key in wanted]
    assert groups.rows(sorted(wanted)).tolist() == rows
    assert groups.count(wanted) == len(rows)
    assert groups.covered_by(wanted) == (set(keys) <= set(wanted))
    assert groups.by_row().tolist() == keys


@given(keys=KEYS, more=KEYS, data=st.data())
def test_an_index_that_grows_keeps_its_groups(keys: list[int], more: list[int], data: st.DataObject) -> None:
    slots = 10 + 3 * np.arange(len(keys), dtype=np.int64)
    named = [at for at, key in enumerate(keys) if key]
    groups = grouped(slots, (slots[named], np.array(keys, np.int32)[named]))
    assert (groups is None) == (not named)
    kept = sorted(data.draw(st.sets(st.sampled_from(range(len(keys))) if keys else st.nothing())))
    longer = joined(groups, len(keys), np.array(more, np.int32), np.array(kept, np.int64))
    expected = [keys[row] for row in kept] + more
    if longer is None:
        assert not any(more)
        assert groups is None
    else:
        assert longer.by_row().tolist() == expected


@given(
    steps=st.lists(
        st.one_of(st.tuples(st.just("add"), KEYS), st.tuples(st.just("cut"), st.integers(0, 60)), st.just(("rest", 3))),
        max_size=8,
    )
)
def test_a_delta_buffer_knows_its_ids_and_the_rows_of_each_namespace(steps: list[tuple[str, object]]) -> None:
    delta, model, ids, slot = DeltaBuffer(2), list[int](), list[str](), 0
    for step, argument in steps:
        if step == "add":
            assert isinstance(argument, list)
            slots = range(slot, slot + len(argument))
            delta.extend(slots, [f"é{at}" for at in slots], np.zeros((len(argument), 2), np.float32), argument)
            model, slot = [*model, *argument], slot + len(argument)
            ids += [f"é{at}" for at in slots]
        elif step == "cut":
            assert isinstance(argument, int)
            model, ids = model[: min(argument, len(model))], ids[:argument]
            delta.truncate(len(model))
        else:
            start = min(3, len(model))
            model, ids, delta = model[start:], ids[start:], delta.rest(start, delta.n)
    for end in {0, len(model) // 2, len(model)}:
        for key in range(6):
            assert delta.rows_of([key], end).tolist() == [at for at, one in enumerate(model[:end]) if one == key]
        assert delta.rows_of([1, 3], end).tolist() == [at for at, one in enumerate(model[:end]) if one in (1, 3)]
    assert delta.covered_by([0, 1, 2, 3, 4, 5])
    for held in (delta, delta.copy(delta.n)):
        assert [held.id_at(position) for position in range(held.n)] == ids
        text, ends = held.ids(len(ids) // 3, len(ids))
        assert text.tobytes().decode() == "".join(ids[len(ids) // 3 :])
        assert np.diff(ends, prepend=0).tolist() == [len(one.encode()) for one in ids[len(ids) // 3 :]]


@settings(max_examples=200)
@given(
    at_first=st.dictionaries(st.integers(1, 40), st.integers(0, 20)),
    later=st.lists(st.tuples(st.integers(1, 40), st.one_of(st.none(), st.integers(0, 20))), max_size=30),
    merge_at=st.sampled_from([1, 1024]),
    times=st.lists(st.integers(-1, 21), max_size=6),
)
def test_what_has_expired_is_known_at_any_time(
    at_first: dict[int, int], later: list[tuple[int, int | None]], merge_at: int, times: list[int]
) -> None:
    slots, moments = np.array(list(at_first), np.int64), np.array(list(at_first.values()), np.float64)
    expiring = Expiring(lambda: (slots, moments))
    model: dict[int, float] = {slot: float(time) for slot, time in at_first.items()}
    expiring.restart()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memevolve_gpu.live.namespaces._MERGE_AT", merge_at)
        for start in range(0, len(later), 5):
            part = later[start : start + 5]
            expiring.extend((slot, None if time is None else float(time)) for slot, time in part)
            for slot, time in part:
                model.pop(slot, None)
                if time is not None:
                    model[slot] = float(time)
            for now in times:
                gone = expiring.gone(now)
                expected = sorted(slot for slot, time in model.items() if time <= now)
                assert ([] if gone is None else gone.tolist()) == expected


@given(n=st.integers(1, 40), data=st.data())
def test_a_list_of_rows_is_a_filter_like_its_mask(n: int, data: st.DataObject) -> None:
    positions = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1)))), np.int64)
    rows = np.zeros(n, np.bool_)
    rows[positions] = True
    few, mask = RowList(n, positions), RowFilter(rows)
    asked = np.arange(-1, n, dtype=np.int64)
    low, high = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    assert (few.count, few.n) == (mask.count, mask.n)
    assert few.rows.tolist() == rows.tolist()
    assert few.packed.tolist() == mask.packed.tolist()
    assert few.test(asked).tolist() == mask.test(asked).tolist()
    assert few.part(low, high).positions.tolist() == mask.part(low, high).positions.tolist()
