"""Filters: the grammar, its meaning, and the agreement of SQL with the definition in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from records_kit import DIM, put, vector

from memevolve_gpu.errors import InvalidFilterError
from memevolve_gpu.records import Records, canonical, filter_sql, matches
from memevolve_gpu.records.filters import MAX_CONDITIONS, MAX_VALUES, parse

UNITS: list[dict[str, Any]] = [
    {"id": "a", "type": "skill", "tags": ["git", "linux"], "metadata": {"score": 0.5, "n": 1}},
    {"id": "b", "type": "tool", "tags": ["git"], "metadata": {"score": 1, "n": "1"}},
    {"id": "c", "type": "lesson", "tags": [], "metadata": {"score": None, "n": True}},
    {"id": "d", "tags": "git", "metadata": {"n": 1.0, "list": [None, 3, "x", [9], {"y": 9}]}},
    {"id": "e", "type": ["skill", 7], "tags": {"0": "git"}, "metadata": "none", 'odd "key"[0] \\ é\n': 5},
]

CASES: list[tuple[dict[str, Any] | None, str]] = [
    (None, "abcde"),
    ({}, "abcde"),
    ({"type": "skill"}, "ae"),
    ({"type": ["skill", "tool"]}, "abe"),
    ({"type": []}, ""),
    ({"type": 7}, "e"),
    ({"type": {"ne": "skill"}}, "bcd"),
    ({"type": {"nin": []}}, "abcde"),
    ({"type": {"nin": ["skill", "tool"]}}, "cd"),
    ({"type": {"exists": False}}, "d"),
    ({"type": {"exists": True}}, "abce"),
    ({"type": None}, ""),
    ({"type": {"gt": "skill"}}, "b"),
    ({"type": {"gte": "skill"}}, "abe"),
    ({"type": {"lt": 10}}, "e"),
    ({"tags": "git"}, "abd"),
    ({"tags": ["linux", "none"]}, "a"),
    ({"tags": "git", "type": "skill"}, "a"),
    ({"tags": {"in": ["git"], "ne": "linux"}}, "bd"),
    ({"tags": {"exists": True}}, "abcde"),
    ({"tags.0": "git"}, "e"),
    ({"metadata.score": {"gte": 0.5, "lt": 1}}, "a"),
    ({"metadata.score": {"gte": 0.5}}, "ab"),
    ({"metadata.score": 1.0}, "b"),
    ({"metadata.score": None}, "c"),
    ({"metadata.score": {"ne": None}}, "abde"),
    ({"metadata.score": {"exists": True}}, "abc"),
    ({"metadata.n": 1}, "ad"),
    ({"metadata.n": "1"}, "b"),
    ({"metadata.n": True}, "c"),
    ({"metadata.n": [True, "1"]}, "bc"),
    ({"metadata.n": {"nin": [1, False]}}, "bce"),
    ({"metadata.list": None}, "d"),
    ({"metadata.list": 3}, "d"),
    ({"metadata.list": 9}, ""),
    ({"metadata.list": {"gt": 2, "lt": "y"}}, "d"),
    ({"metadata": "none"}, "e"),
    ({"metadata.score.deeper": {"exists": False}}, "abcde"),
    ({"id": "a"}, "a"),
    ({"id": ["a", "c", "x", 3]}, "ac"),
    ({"id": {"gt": "c"}}, "de"),
    ({"id": {"ne": "a"}}, "bcde"),
    ({'odd "key"[0] \\ é\n': 5}, "e"),
    ({'"; DROP TABLE units; --': 1}, ""),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Records.open(tmp_path_factory.mktemp("filters") / "s", dim=DIM, durability="normal") as opened:
        yield opened


def refill(store: Records, units: Sequence[dict[str, Any]], folded: int) -> None:
    """Store the units again, the first ``folded`` of them folded into the terms index."""
    with store.write() as tx:
        tx.clear()
        for number, one in enumerate(units):
            if number == folded:
                tx.merge_pending()
            tx.put(one, "", vector(), one["id"])
        if folded >= len(units):
            tx.merge_pending()


@pytest.mark.parametrize(("filters", "expected"), CASES)
def test_the_definition(filters: dict[str, Any] | None, expected: str) -> None:
    assert "".join(one["id"] for one in UNITS if matches(filters, one)) == expected


@pytest.mark.parametrize("folded", [0, 2, 5])
def test_sql_follows_the_definition_on_the_examples(store: Records, folded: int) -> None:
    refill(store, UNITS, folded)
    for filters, expected in CASES:
        assert (
            "".join(store.units_at(store.matching(filters))[slot]["id"] for slot in store.matching(filters)) == expected
        )
        assert "".join(one["id"] for one in store.units(filters=filters)) == expected


@pytest.mark.parametrize(
    ("filters", "named"),
    [
        ({"a": {"near": 1}}, "'near'"),
        ({"a": {}}, "filters['a']"),
        ({"a": {1: 2}}, "unknown operator 1"),
        ({"a": {"in": "text"}}, "takes a list"),
        ({"a": {"in": {"x": 1}}}, "takes a list"),
        ({"a": {"exists": 1}}, "True or False"),
        ({"a": {"exists": None}}, "True or False"),
        ({"a": {"gt": None}}, "gt compares"),
        ({"a": {"lt": True}}, "lt compares"),
        ({"a": {"eq": [1]}}, "eq takes"),
        ({"a": [[1]]}, "in takes"),
        ({"a": [{"b": 1}]}, "in takes"),
        ({"a": {1, 2}}, "filters['a']"),
        ({"a": b"x"}, "bytes"),
        ({"a": float("nan")}, "finite"),
        ({"a": {"lt": float("inf")}}, "finite"),
        ({"a": [1, float("nan")]}, "finite"),
        ({"a": 10**400}, "finite"),
        ({"a": "\ud800"}, "Unicode"),
        ({"\ud800": 1}, "Unicode"),
        ({"": 1}, "empty path"),
        ({"a..b": 1}, "empty path"),
        ({".a": 1}, "empty path"),
        ({1: 1}, "must be a string"),
        ({None: 1}, "must be a string"),
        ("type", "mapping"),
        ([("a", 1)], "mapping"),
        ({"a": list(range(MAX_VALUES + 1))}, "under 'a'"),
        ({f"a{n}": 1 for n in range(MAX_CONDITIONS + 1)}, "100 operators"),
    ],
)
def test_everything_outside_the_grammar_is_refused_by_name(store: Records, filters: Any, named: str) -> None:
    doors: list[Callable[[Any], object]] = [
        parse,
        canonical,
        store.matching,
        lambda given: store.keyword("x", 1, given),
        lambda given: matches(given, {}),
    ]
    for door in doors:
        with pytest.raises(InvalidFilterError) as caught:
            door(filters)
        assert named in str(caught.value)


def test_the_most_values_still_work(store: Records) -> None:
    refill(store, UNITS, 0)
    many = [f"x{n}" for n in range(MAX_VALUES - 1)]
    assert len(store.matching({"id": [*many, "a"]})) == 1
    assert len(store.matching({"tags": [*many, "linux"]})) == 1
    assert len(store.matching({"metadata.n": [*range(MAX_VALUES)]})) == 2
    wide = {f"none{n}": {"ne": [None, True, "x", 1][n % 4]} for n in range(MAX_CONDITIONS - 1)}
    assert (
        len(store.matching({**wide, "metadata.n": {"nin": [None, True, *range(MAX_VALUES - MAX_CONDITIONS - 2)]}})) == 2
    )


def test_matching_among_given_slots(store: Records) -> None:
    refill(store, [{"id": f"u{n}", "type": ["a", "b"][n % 2], "n": n} for n in range(40)], 30)
    everything = store.matching({})
    assert everything.dtype == np.int64
    assert len(everything) == 40
    for slots in (everything, everything[::3], everything[35:], everything[:2], everything[:0]):
        inside = set(slots.tolist())
        for filters in ({}, {"type": "a"}, {"n": {"lt": 20}}, {"type": "b", "n": {"gte": 33}}, {"type": ["a", "b"]}):
            expected = [slot for slot in store.matching(filters).tolist() if slot in inside]
            assert store.matching(filters, slots).tolist() == expected
    gone = np.array([1, 2, 10**12], dtype=np.int64)
    assert store.matching({}, gone).tolist() == [slot for slot in everything.tolist() if slot in (1, 2)]


def test_dropped_replaced_and_edited_rows_leave_the_terms_index(store: Records) -> None:
    refill(store, [{"id": f"u{n}", "type": "old", "tags": ["t"]} for n in range(6)], 6)
    with store.write() as tx:
        tx.drop("u0")
        tx.put({"id": "u1", "type": "new"}, "", vector(), "u1")
        tx.edit("u2", {"id": "u2", "type": "new", "tags": ["t", "t"]})

    def ids(filters: dict[str, Any]) -> list[str]:
        return sorted(one["id"] for one in store.units_at(store.matching(filters)).values())

    for _ in range(2):
        assert ids({"type": "old"}) == ["u3", "u4", "u5"]
        assert ids({"type": "new"}) == ["u1", "u2"]
        assert ids({"tags": "t", "type": ["old", "new"]}) == ["u2", "u3", "u4", "u5"]
        assert store.check() == []
        with store.write() as tx:
            tx.merge_pending()


def test_canonical_is_equal_for_equal_meaning_only() -> None:
    assert canonical(None) == canonical({})
    assert canonical({"a": 1, "b": [2, 1]}) == canonical({"b": [1, 2, 2], "a": {"eq": 1}})
    assert canonical({"a": {"gte": 1, "lt": 2}}) == canonical({"a": {"lt": 2, "gte": 1}})
    different: list[dict[str, Any]] = [
        {"a": 1},
        {"a": True},
        {"a": "1"},
        {"a": None},
        {"a": []},
        {"a": {"ne": 1}},
        {"a.b": 1},
        {"a": [1, 2]},
    ]
    assert len({canonical(filters) for filters in different}) == len(different)
    assert canonical({"a\n": "b"}) != canonical({"a": "\nb"})


KEYS = st.sampled_from(["a", "b", "tags", "type", 'q"', "b\\", "[0]", "é", " ", "$", "a'b", "\n", "\x00", "🙂"])
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.floats(-3, 3, allow_nan=False),
    st.sampled_from(
        [0.1, 0.30000000000000004, -0.0, 1e300, 5e-324, 2**53, 2**53 + 1, 2**63 - 1, -(2**63), float(2**63)]
    ),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", "1", "true", "null", "git", "Git", "a\x00b", "a\x00", "é", "e\u0301", "🙂", "\uffff", '"', "\\", "[1]"]
    ),
    st.text(st.characters(codec="utf-8"), max_size=4),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)
PATHS = st.lists(KEYS, min_size=1, max_size=2).map(".".join)


@st.composite
def conditions(draw: st.DrawFn, near: st.SearchStrategy[Any]) -> Any:
    scalar = st.one_of(SCALARS, near)
    simple = st.one_of(scalar, st.lists(scalar, max_size=3))
    operators = st.fixed_dictionaries(
        {},
        optional={
            "eq": scalar,
            "ne": scalar,
            "in": st.lists(scalar, max_size=3),
            "nin": st.lists(scalar, max_size=3),
            **{op: st.one_of(NUMBERS, TEXTS) for op in ("gt", "gte", "lt", "lte")},
            "exists": st.booleans(),
        },
    ).filter(bool)
    return draw(st.one_of(simple, operators))


def scalars_of(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [one for child in value.values() for one in scalars_of(child)]
    if isinstance(value, list):
        return [one for child in value for one in scalars_of(child)]
    return [value]


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[dict[str, Any]], int, list[dict[str, Any]]]:
    indexes = draw(st.lists(st.dictionaries(KEYS, VALUES, max_size=4), min_size=1, max_size=6))
    units = [{**index, "id": f"u{number}"} for number, index in enumerate(indexes)]
    near = st.sampled_from([one for unit in units for one in scalars_of(unit)])
    filters = draw(
        st.lists(
            st.dictionaries(PATHS | st.just("id"), conditions(near), min_size=1, max_size=2), min_size=1, max_size=5
        )
    )
    return units, draw(st.integers(0, len(units))), filters


@settings(max_examples=250)
@given(worlds(), st.booleans())
@example(([{"id": "u0", "a": [1]}], 1, [{"a": {"ne": 1}}]), False)
def test_sql_and_python_agree(
    store: Records, world: tuple[list[dict[str, Any]], int, list[dict[str, Any]]], as_lists: bool
) -> None:
    units, folded, filters = world
    refill(store, units, folded)
    with pytest.MonkeyPatch.context() as patch:
        if as_lists:  # values are bound as one JSON list, as many of them are
            patch.setattr(filter_sql, "MOST_PLACES", 0)
        agree(store, units, filters)
    assert [finding.code for finding in store.check() if finding.code == "terms"] == []


def agree(store: Records, units: list[dict[str, Any]], filters: list[dict[str, Any]]) -> None:
    for one in filters:
        expected = [unit["id"] for unit in units if matches(one, unit)]
        found = store.units_at(store.matching(one))
        assert [found[slot]["id"] for slot in sorted(found)] == expected
        assert [unit["id"] for unit in store.units(filters=one)] == expected


def test_integers_beyond_64_bits_compare_as_doubles(store: Records) -> None:
    refill(store, [{"id": "a", "n": 2**64}, {"id": "b", "n": 2**63 - 1}, {"id": "c", "n": -(2**70)}], 0)
    for filters in ({"n": 2**64}, {"n": float(2**64)}, {"n": {"gt": 2**63}}, {"n": {"lt": -(2**69)}}, {"n": 2**63 - 1}):
        found = [one["id"] for one in store.units(filters=filters)]
        assert found == [one["id"] for one in store.units() if matches(filters, one)]
        assert len(found) == 1


def test_real_units_filter_the_same_in_sql_and_python(shared_data: Path, tmp_path: Path) -> None:
    import gzip
    import json

    with gzip.open(shared_data / "tldr_units.jsonl.gz", "rt", encoding="utf-8") as lines:
        units = [{**json.loads(line), "id": f"u{n}"} for n, line in zip(range(3000), lines, strict=False)]
    with Records.open(tmp_path / "real", dim=DIM) as opened:
        with opened.write() as tx:
            tx.put_many((one, one["content"], vector(), one["id"]) for one in units[:2900])
        for one in units[2900:]:
            put(opened, one["id"], **{key: value for key, value in one.items() if key != "id"})
        page = units[17]["metadata"]["page"]
        for filters in (
            {"type": "tool"},
            {"tags": ["linux", "osx"], "type": "skill"},
            {"metadata.page": {"gte": page}},
        ):
            expected = [number + 1 for number, one in enumerate(units) if matches(filters, one)]
            assert opened.matching(filters).tolist() == expected
            assert expected


def test_canonical_forms_that_were_seen_are_not_mixed_up() -> None:
    class Shouted(str):
        __slots__ = ()

    values = [True, 1, 1.0, "1", [1], None, "", Shouted("1")]
    fresh = {i: canonical({f"first{i}": value}) for i, value in enumerate(values)}
    for _ in range(2):
        assert {i: canonical({f"first{i}": value}) for i, value in enumerate(values)} == fresh
    assert canonical({"a": True}) != canonical({"a": 1}) == canonical({"a": [1]}) != canonical({"a": "1"})
    assert canonical({"a": "1"}) == canonical({"a": Shouted("1")})
    for _ in range(2):
        with pytest.raises(InvalidFilterError):
            canonical({"a": {}})
