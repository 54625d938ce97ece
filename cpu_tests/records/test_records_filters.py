"""Filters: the grammar, its meaning, and the agreement of SQL with the definition in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
from filter_oracle import means
from hypothesis import example, given, settings
from hypothesis import strategies as st
from records_kit import DIM, put, vector
from support import each

from memevolve_gpu import F
from memevolve_gpu.errors import InvalidFilterError
from memevolve_gpu.live.field_columns import FieldColumns, Log
from memevolve_gpu.records import Records, canonical, filter_sql, matches
from memevolve_gpu.records.filters import MAX_CONDITIONS, MAX_VALUES, parse

UNITS: list[dict[str, Any]] = [
    {"id": "a", "type": "skill", "tags": ["git", "linux"], "metadata": {"score": 0.5, "n": 1}},
    {"id": "b", "type": "tool", "tags": ["git"], "metadata": {"score": 1, "n": "1"}},
    {"id": "c", "type": "lesson", "tags": [], "metadata": {"score": None, "n": True}},
    {"id": "d", "tags": "git", "metadata": {"n": 1.0, "list": [None, 3, "x", [9], {"y": 9}]}},
    {"id": "e", "type": ["skill", 7], "tags": {"0": "git"}, "metadata": "none", 'odd "key"[0] \\ é\n': 5},
]

MORE_UNITS: list[dict[str, Any]] = [
    {"id": "a", "text": "Straße nach Köln", "at": "2026-01-01T12:00:00+02:00", "x.y": {"a.b": 1, "": 2}, "and": 1},
    {"id": "b", "text": "STRASSE", "at": "2026-01-01T10:00:00Z", "list": ["github", "git"], "n": None},
    {"id": "c", "text": "Ko\u0308ln 100% _", "at": "2026-01-01", "list": [], '"q"': 1},
    {"id": "d", "text": ["git push", "\u212a"], "at": "2026-01-02 00:00:00.000001", "list": ["git", 3, None], "$x": 1},
    {"id": "e", "text": 7, "at": ["2025-12-31T23:00:00-01:00", "later"], "list": "git"},
]

MORE_CASES: list[tuple[Any, str]] = [
    ({"or": [{"id": "a"}, {"text": 7}]}, "ae"),
    ({"$or": [{"id": "a"}, {"text": 7}], "id": {"$ne": "a"}}, "e"),
    ({"and": [{"id": ["a", "b"]}, {"not": {"id": "a"}}]}, "b"),
    ([{"id": ["a", "b"]}, {"id": ["b", "c"]}], "b"),
    ({"nor": [{"id": "a"}, {"id": "b"}]}, "cde"),
    ({"not": [{"id": ["a", "b"]}, {"id": "b"}]}, "acde"),
    ({"or": []}, ""),
    ({"and": []}, "abcde"),
    ({"id": {"not": {"in": ["a"]}}}, "bcde"),
    ({"text": "Köln"}, ""),
    ({"text": {"contains": "Köln"}}, "ac"),
    ({"text": {"contains": "Ko\u0308ln"}}, "ac"),
    ({"list": {"contains": "git"}}, "bde"),
    ({"list": {"contains": 3}}, "d"),
    ({"list": {"$not_contains": "git"}}, "ac"),
    ({"text": {"startswith": "git"}}, "d"),
    ({"text": {"endswith": "E"}}, "b"),
    ({"text": {"ieq": "straße"}}, "b"),
    ({"text": {"ieq": "k"}}, "d"),
    ({"text": "K"}, "d"),
    ({"text": {"ne": "K"}}, "abce"),
    ({"text": {"like": "St%K_ln"}}, "a"),
    ({"text": {"like": "%100\\% \\_"}}, "c"),
    ({"text": {"ilike": "strasse%"}}, "ab"),
    ({"list": {"all": ["git", "github"]}}, "b"),
    ({"list": {"size": 2}}, "b"),
    ({"list": {"size": {"gte": 1, "lt": 3}}}, "b"),
    ({"list": {"size": 0}}, "c"),
    ({"n": {"is_null": True}}, "abcde"),
    ({"list": {"is_null": False}}, "bcde"),
    ({"at": "2026-01-01T10:00:00Z"}, "ab"),
    ({"at": datetime(2026, 1, 1, 10, tzinfo=timezone.utc)}, "ab"),
    ({"at": np.datetime64("2026-01-01T10:00:00")}, "ab"),
    ({"at": {"gte": date(2026, 1, 1), "lt": datetime(2026, 1, 1, 11, tzinfo=timezone.utc)}}, "abce"),
    ({"at": {"gt": "2026-01-01T23:59:59.999999Z"}}, "d"),
    ({"at": {"between": ["2026-01-01T00:00:00Z", "2026-01-01T00:00:00+00:00"]}}, "ce"),
    ({"at": "2026-01-01"}, "c"),
    ({'"x.y"."a.b"': 1}, "a"),
    ({'"x.y".""': 2}, "a"),
    ({'"and"': 1}, "a"),
    ({'"\\"q\\""': 1}, "c"),
    ({'"$x"': 1}, "d"),
    ((F("id") == "a") | ~(F("text").contains("a") | (F("id") > "b")), "ab"),
    (F("list").size({"gte": 1}) & F("at").exists(), "bd"),
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


def deep(levels: int) -> Any:
    return {"not": deep(levels - 1)} if levels else {"a": 1}


def refill(store: Records, units: Sequence[dict[str, Any]], folded: int) -> None:
    """Store the units again, the first ``folded`` of them folded into the terms index."""
    with store.write() as tx:
        tx.clear()
        for number, one in enumerate(units):
            if number == folded:
                tx.merge_pending()
            tx.put(one, vector(), one["id"])
        if folded >= len(units):
            tx.merge_pending()


@each(("filters", "expected"), CASES)
def test_the_definition(filters: dict[str, Any] | None, expected: str) -> None:
    assert "".join(one["id"] for one in UNITS if matches(filters, one)) == expected


@pytest.mark.parametrize("folded", [0, 5])
def test_every_operator_means_the_same_everywhere(store: Records, folded: int) -> None:
    refill(store, MORE_UNITS, folded)
    for filters, expected in MORE_CASES:
        assert "".join(one["id"] for one in MORE_UNITS if matches(filters, one)) == expected, filters
        assert "".join(one["id"] for one in store.units(filters=filters)) == expected, filters
        assert [unit["id"] for unit in store.units_at(store.matching(filters)).values()] == list(expected), filters
        assert canonical(filters) == canonical([filters])


def test_texts_compare_as_they_are_when_asked() -> None:
    unit = {"id": "Ko\u0308ln", "text": "Ko\u0308ln"}
    assert matches({"text": "Köln"}, unit)
    assert not matches(parse({"text": "Köln"}, "exact"), unit)
    assert matches(parse({"text": "Ko\u0308ln"}, "exact"), unit)
    assert not matches({"id": "Köln"}, unit)


def test_no_character_but_three_becomes_ascii_in_nfc() -> None:
    made = {normalize("NFC", chr(code)) for code in range(128, 0x110000) if not 0xD800 <= code < 0xE000}
    assert {text for text in made if text.isascii()} == {"K", ";", "`"}


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|aa)*c", "x*x*x*x*x*y", ".*.*.*=.*"])
def test_regular_expressions_take_linear_time(store: Records, pattern: str) -> None:
    pytest.importorskip("re2")
    refill(store, [{"id": "a", "text": "a" * 200_000}, {"id": "b", "text": "aab xy = c"}], 0)
    assert [one["id"] for one in store.units(filters={"text": {"$regex": pattern}})] == ["b"]
    for bad in ("(?=a)", "(", r"(a)\1"):
        with pytest.raises(InvalidFilterError, match="RE2"):
            parse({"text": {"regex": bad}})


def test_the_builder_refuses_to_drop_a_condition() -> None:
    with pytest.raises(TypeError, match="combine conditions with &"):
        _ = (F("a") > 1) and (F("b") > 2)
    with pytest.raises(TypeError, match="combine conditions with &"):
        _ = 0 < F("a") < 1
    assert ({"a": 1} | (F("b") != 2)) == {"or": [{"b": {"ne": 2}}, {"a": 1}]}


@pytest.mark.parametrize("folded", [0, 2, 5])
def test_sql_follows_the_definition_on_the_examples(store: Records, folded: int) -> None:
    refill(store, UNITS, folded)
    for filters, expected in CASES:
        assert (
            "".join(store.units_at(store.matching(filters))[slot]["id"] for slot in store.matching(filters)) == expected
        )
        assert "".join(one["id"] for one in store.units(filters=filters)) == expected


@each(
    ("filters", "named"),
    [
        ({"a": {"near": 1}}, "'near'"),
        ({"a": {"$gtt": 1}}, "'$gtt', did you mean 'gt'?"),
        ({"a": {">=": 1}}, "did you mean 'gte'?"),
        ({"a": {"contain": 1}}, "did you mean 'contains'?"),
        ({"a": {"b": 1}}, "'a.b'"),
        ({"$nand": []}, "did you mean"),
        ({"or": {"a": 1}}, "takes a list of filters"),
        ({"and": [1]}, "filters['and'][0] must be a mapping"),
        ({"a": {"all": []}}, "all takes a list that is not empty"),
        ({"a": {"between": [1]}}, "[least, largest]"),
        ({"a": {"size": -1}}, "size takes"),
        ({"a": {"size": {"near": 1}}}, "size takes"),
        ({"a": {"startswith": 1}}, "startswith takes a string"),
        ({"a": {"like": "x" * 1001}}, "1001 characters"),
        ({"a": np.datetime64("NaT")}, "not datetime64"),
        (deep(30), "nested more than 20 deep"),
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
    entries: list[Callable[[Any], object]] = [
        parse,
        canonical,
        store.matching,
        lambda given: store.keyword("x", 1, given),
        lambda given: matches(given, {}),
    ]
    for entry in entries:
        with pytest.raises(InvalidFilterError) as caught:
            entry(filters)
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
        tx.put({"id": "u1", "type": "new"}, vector(), "u1")
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
TIMES = st.sampled_from(
    ["2026-01-01T00:00:00Z", "2026-01-01T01:00:00+01:00", "2026-01-01", "2025-12-31 23:59:59.999999-00:30"]
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, TIMES)
TEXT_OPERATORS = ("startswith", "endswith", "ieq")
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
            **{op: st.one_of(NUMBERS, TEXTS, TIMES) for op in ("gt", "gte", "$lt", "lte")},
            "exists": st.booleans(),
            "is_null": st.booleans(),
            "size": st.integers(0, 3),
            "$all": st.lists(scalar, min_size=1, max_size=2),
            "contains": scalar,
            "not_contains": scalar,
            **{op: st.one_of(TEXTS, near.filter(lambda one: isinstance(one, str))) for op in TEXT_OPERATORS},
            "between": st.lists(NUMBERS, min_size=2, max_size=2),
        },
    ).filter(bool)
    operators = operators.map(lambda many: dict(list(many.items())[:3]))
    return draw(st.one_of(simple, operators, operators.map(lambda one: {"$not": one})))


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
    leaf = st.dictionaries(PATHS | st.just("id"), conditions(near), min_size=1, max_size=2)
    tree = st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.fixed_dictionaries({"or": st.lists(inner, max_size=3)}),
            st.fixed_dictionaries({"$and": st.lists(inner, max_size=2)}),
            st.fixed_dictionaries({"not": inner}),
        ),
        max_leaves=3,
    )
    filters = draw(st.lists(tree, min_size=1, max_size=5))
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
        expected = [unit["id"] for unit in units if means(one, unit)]
        assert [unit["id"] for unit in units if matches(one, unit)] == expected, one
        found = store.units_at(store.matching(one))
        assert [found[slot]["id"] for slot in sorted(found)] == expected
        live = store.matching(None)
        slots = FieldColumns(store).matching(parse(one), Log(1, lambda: live, lambda _: None))  # noqa: B023
        assert slots.tolist() == sorted(found), one
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
